"""What a user changes in a model takes effect in a sampling, or is refused: never ignored."""

from __future__ import annotations

import copy
from types import MethodType

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from tests.models.conftest import small_pair
from var_ext import Sampler
from var_ext.engine import Call, Engine, named_precision, options_for
from var_ext.engine.compare import UnsupportedModel
from var_ext.models import VAR
from var_ext.models.var import FFN, AdaLNSelfAttn, SelfAttention, Stream
from var_ext.models.vqvae import ResnetBlock

CPU = torch.device("cpu")
LABELS = torch.tensor([0, 4, 2])
# of the spread of logits: float32 in another order of sums; 8 bits; 7 bits and two roundings a layer
OFF = {"fp32": 1e-4, "bf16": 0.04, "int8": 0.1}


class Relu(FFN):
    def forward(self, x):
        return self.fc2(5 * F.relu(self.fc1(x)))


class Doubled(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return -3 * self.inner(x)


class Half(nn.Module):
    def forward(self, weight):
        return -3 * weight


class Sharper(SelfAttention):
    def forward(self, x, attend):
        return -3 * super().forward(x, attend)


class Skipping(AdaLNSelfAttn):
    def forward(self, stream, modulation, attend):
        return Stream(stream.sum() + super().forward(stream, modulation, attend).sum())


def became(module: nn.Module, kind: type[nn.Module]) -> None:
    module.__class__ = kind


def patched(module: nn.Module) -> None:
    """As researchers do: the old method is called by the new one."""
    old = module.forward
    module.forward = lambda x, *rest: -3 * old(x, *rest)


def patched_block(var: VAR) -> None:
    old = var.blocks[1].forward
    var.blocks[1].forward = lambda stream, *rest: Stream(old(stream, *rest).sum().roll(1, -1))


def bound(var: VAR) -> None:
    """A method of the instance that calls its layers."""
    var.blocks[0].ffn.forward = MethodType(
        lambda self, x: self.fc2(5 * F.relu(self.fc1(x))), var.blocks[0].ffn
    )


def own_logits(var: VAR) -> None:
    old = var.get_logits
    var.get_logits = lambda h, cond: 2 * old(h, cond) + 1


CHANGES = {
    "a block's forward patched": patched_block,
    "a method bound to the feed-forward": bound,
    "the feed-forward's forward patched": lambda var: patched(var.blocks[0].ffn),
    "attention's forward patched": lambda var: patched(var.blocks[1].attn),
    "another activation": lambda var: became(var.blocks[0].ffn, Relu),
    "attention subclassed": lambda var: became(var.blocks[1].attn, Sharper),
    "a block subclassed": lambda var: became(var.blocks[0], Skipping),
    "a hook on a block": lambda var: var.blocks[0].register_forward_hook(
        lambda module, given, out: Stream(out.sum().roll(1, -1))
    ),
    "a hook on attention": lambda var: var.blocks[1].attn.register_forward_hook(
        lambda module, given, out: -3 * out
    ),
    "a hook on a layer": lambda var: var.blocks[1].ffn.fc1.register_forward_hook(
        lambda module, given, out: 5 * out
    ),
    "a hook on a projection of the class": lambda var: var.blocks[1].ada_lin[1].register_forward_hook(
        lambda module, given, out: -3 * out
    ),
    "a hook before the norm of the head": lambda var: var.head_nm.register_forward_pre_hook(
        lambda module, given: (Stream(given[0].sum().roll(1, -1)), given[1])
    ),
    "an adapter around a layer": lambda var: setattr(var.blocks[0].attn, "proj", Doubled(var.blocks[0].attn.proj)),
    "an adapter around the head": lambda var: setattr(var, "head", Doubled(var.head)),
    "a parametrization": lambda var: parametrize.register_parametrization(var.blocks[0].ffn.fc2, "weight", Half()),
    "another scale of attention": lambda var: setattr(var.blocks[0].attn, "scale", 9.0),
    "another epsilon": lambda var: setattr(var.blocks[0], "norm_eps", 1.0),
    "logits of its own": own_logits,
    "an adapter around the words": lambda var: setattr(var, "word_embed", Doubled(var.word_embed)),
    "class embeddings exchanged": lambda var: setattr(var, "class_emb", nn.Embedding(6, 64)),
    "the projection of the class wrapped": lambda var: setattr(
        var.blocks[0], "ada_lin", Doubled(var.blocks[0].ada_lin)
    ),
}  # fmt: skip


@torch.no_grad()
def drawn_logits(engine: Engine, tokens: torch.Tensor) -> torch.Tensor:
    """Of a sampling that is told what to draw."""
    found: list[torch.Tensor] = []

    def draw(logits, k, cfg):
        found.append(logits[:3].float())
        return engine.codebook[tokens[:, engine.schedule.slices[k]]]

    for _ in engine.generate(Call(LABELS, None, options_for(engine.schedule)), draw):
        pass
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("mode", OFF)
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_transformer_takes_effect(change, mode):
    """Before the first sampling and after it: logits are those of the model's own teacher-forced pass."""
    vae, var = small_pair()
    var.eval()
    tokens = torch.randint(vae.vocab_size, (3, var.L), generator=torch.Generator().manual_seed(1))
    x = vae.quantize.idxBl_to_var_input([tokens[:, s] for s in var.schedule.slices])
    engine = Engine(var, named_precision(mode, CPU), pack=True)
    before = drawn_logits(engine, tokens)
    torch.manual_seed(2)
    CHANGES[change](var)
    with torch.no_grad():
        wanted = var(LABELS, x)
    spread = wanted.std()
    off = (before - wanted).square().mean().sqrt()
    assert off > 2 * OFF[mode] * spread  # the change is no small one
    for used in (engine, Engine(var, named_precision(mode, CPU), pack=True)):
        found = drawn_logits(used, tokens)
        assert (found - wanted).square().mean().sqrt() < OFF[mode] * spread


class Loud(ResnetBlock):
    def forward(self, x):
        return 2 * super().forward(x)


DECODER = {
    "a block subclassed": lambda vae: became(vae.decoder.mid.block_1, Loud),
    "a block's forward patched": lambda vae: patched(vae.decoder.up[1].block[0]),
    "a hook on the middle": lambda vae: vae.decoder.mid.register_forward_hook(
        lambda module, given, out: -out
    ),
    "a hook on a norm": lambda vae: vae.decoder.mid.block_1.norm1.register_forward_hook(
        lambda module, given, out: out + 1
    ),
    "a hook on an upsampling": lambda vae: vae.decoder.up[1].upsample.register_forward_hook(
        lambda module, given, out: -out
    ),
    "an adapter around a convolution": lambda vae: setattr(
        vae.decoder, "conv_out", Doubled(vae.decoder.conv_out)
    ),
    "pixels of its own": lambda vae: setattr(vae, "fhat_to_img", lambda f: vae.decode(f).clamp(-1, 1).neg()),
}


@pytest.mark.parametrize("change", DECODER)
def test_a_change_of_the_decoder_takes_effect(change):
    vae, var = small_pair()
    engine = Engine(var.eval(), named_precision("fp32", CPU), pack=True)
    f_hat = torch.randn(2, 8, 4, 4)
    before = engine.decode(f_hat)
    DECODER[change](vae)
    with torch.no_grad():
        wanted = vae.fhat_to_img(f_hat).add(1).mul(0.5)
    assert (before - wanted).abs().max() > 0.05
    for used in (engine, Engine(var, named_precision("fp32", CPU), pack=True)):
        torch.testing.assert_close(used.decode(f_hat), wanted, rtol=1e-3, atol=1e-4)


class Shifted(VAR):
    def forward(self, label_B, x):
        return super().forward(label_B, x) + torch.arange(self.V)


class Chatty(VAR):
    def forward(self, label_B, x):
        self.seen = label_B
        return super().forward(label_B, x)


def test_a_forward_that_computes_something_else_is_refused():
    vae, var = small_pair()
    became(var, Chatty)
    Sampler(vae, var, precision="fp32")([0], [1])
    became(var, Shifted)
    with pytest.raises(
        UnsupportedModel, match=r"Shifted.forward computes something else .* put the change into"
    ):
        Sampler(vae, var, precision="fp32")([0], [1])


@pytest.mark.parametrize("mode", ["bf16", "int8"])
def test_released_weights_stay_where_a_part_is_called_as_it_is(mode):
    vae, var = small_pair()
    patched(var.blocks[0].ffn)
    other = copy.deepcopy(small_pair())
    patched(other[1].blocks[0].ffn)
    kept = Sampler(vae, var, precision=mode)([1], [2])
    assert torch.equal(Sampler(*other, precision=mode, release=True)([1], [2]), kept)
    assert other[1].blocks[0].ffn.fc1.weight.numel() and not other[1].blocks[1].ffn.fc1.weight.numel()
