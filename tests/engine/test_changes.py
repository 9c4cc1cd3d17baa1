"""What a user changes in a model takes effect in a sampling, or is refused: never ignored."""

from __future__ import annotations

import copy
from types import MethodType, SimpleNamespace

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
from var_ext.models.vqvae import Level, ResnetBlock

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


class Negative(Level):
    def forward(self, x):
        return -super().forward(x)


DECODER = {
    "a block subclassed": lambda vae: became(vae.decoder.mid.block_1, Loud),
    "a block's forward patched": lambda vae: patched(vae.decoder.up[1].block[0]),
    "a level subclassed": lambda vae: became(vae.decoder.up[0], Negative),
    "a level's forward patched": lambda vae: patched(vae.decoder.up[1]),
    "a hook on a level": lambda vae: vae.decoder.up[0].register_forward_hook(lambda module, given, out: -out),
    "a norm without weights": lambda vae: setattr(
        vae.decoder.mid.block_1, "norm1", torch.nn.GroupNorm(2, 32, affine=False)
    ),
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


class Tanh(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 3 * torch.tanh(self.inner(x))


@torch.no_grad()
@pytest.mark.parametrize("mode", ["bf16", "int8"])
def test_guidance_is_mixed_before_a_linear_head_alone(mode):
    """The logits of a mixture are the mixture of logits for nothing else."""
    _, var = small_pair()
    var.eval().head = Tanh(var.head)
    engine = Engine(var, named_precision(mode, CPU), pack=True)
    hidden = torch.randn(6, 4, var.C, dtype=torch.bfloat16)
    logits, left = engine._logits(engine.parts().var.head, hidden, 3, 2.0)
    assert left == 2.0 and logits.shape == (6, 4, var.V)


def test_the_decoder_writes_into_memory_of_its_own_alone():
    """What an adapter or a hook keeps of a convolution stays as it was."""
    vae, var = small_pair()
    engine, kept = Engine(var.eval(), named_precision("fp32", CPU), pack=True), []
    vae.decoder.mid.block_1.conv2.register_forward_hook(
        lambda module, given, out: kept.extend((out, out.clone())) and None
    )
    engine.decode(torch.randn(1, 8, 4, 4))
    assert torch.equal(*kept)


class Conditioned(VAR):
    """With layers and a parameter beside the class embedding, in which precision ever the rest runs."""

    def more(self):
        self.style = nn.Sequential(nn.LayerNorm(3), nn.Linear(3, self.C))
        self.gain = nn.Parameter(torch.randn(3, 3))
        self.register_buffer("offset", torch.ones(3))

    def condition(self, labels, style):
        return super().condition(labels) + self.style(style @ self.gain + self.offset)

    def positions(self):
        return super().positions() * self.offset.mean()


@pytest.mark.parametrize("mode", OFF)
def test_what_a_subclass_adds_keeps_its_precision(mode):
    vae, var = small_pair()
    became(var, Conditioned)
    var.more()
    options = dict(seeds=[1, 2], conditions={"style": torch.randn(2, 3)}, cfg=2.0)
    sampler = Sampler(vae, var, precision=mode)
    before = sampler([1, 2], **options)
    with torch.no_grad():
        var.offset.fill_(3)  # a buffer, in place
    assert not torch.equal(sampler([1, 2], **options), before)


def test_a_compiled_model_is_copied_and_drawn_as_it_is():
    vae, var = small_pair()
    before = Sampler(vae, var, precision="bf16")([1], [2])
    var.compile(backend="eager")
    var.blocks[0].compile(backend="eager")
    assert torch.equal(Sampler(vae, var, precision="bf16")([1], [2]), before)
    other = copy.deepcopy(var).eval()
    with torch.no_grad():
        other.head.weight.zero_()
        other.head.bias.zero_()
    assert not other(torch.tensor([1]), None).any()


class Gelu(nn.Module):
    """A user's layer that has something of this name."""

    def __init__(self, linear):
        super().__init__()
        self.linear, self.gelu = linear, nn.GELU()

    def forward(self, x):
        return self.gelu(self.linear(x))


def test_a_layer_with_a_gelu_of_its_own_is_called():
    _, var = small_pair()
    ffn, x = var.blocks[0].ffn, torch.randn(2, 3, 64)
    ffn.fc1 = Gelu(ffn.fc1)
    torch.testing.assert_close(ffn(x), ffn.fc2(F.gelu(ffn.fc1(x), approximate="tanh")))


def test_hooks_and_patches_are_drawn_eagerly_and_seen_after_a_capture(monkeypatch):
    """A graph would not run their Python again."""
    monkeypatch.setattr("var_ext.engine.engine.backend.use_native", lambda *_: True)

    class OnGpu(SimpleNamespace):
        def __len__(self):
            return 1

    call = OnGpu(labels=SimpleNamespace(is_cuda=True), edit=None)
    vae, var = small_pair()
    engine = Engine(var.eval(), named_precision("fp32", CPU), pack=True)
    assert engine._captures(call)
    for place in (var.blocks[0], var.head_nm, var.class_emb, vae.decoder.mid, vae.decoder.mid.block_1.norm1):
        hook = place.register_forward_hook(lambda *_: None)
        assert not engine._captures(call)
        hook.remove()
        assert engine._captures(call)
    patched(var.blocks[0].ffn)
    assert not engine._captures(call)


def test_a_hook_on_the_model_itself_that_changes_logits_is_refused():
    vae, var = small_pair()
    var.register_forward_hook(lambda module, given, out: None)
    Sampler(vae, var, precision="fp32")([0], [1])
    var.register_forward_hook(lambda module, given, out: out * 0)
    with pytest.raises(UnsupportedModel, match=r"VAR\.forward computes something else"):
        Sampler(vae, var, precision="fp32")([0], [1])


def test_weights_that_are_gone_are_named():
    vae, var = small_pair()
    Sampler(vae, var, precision="bf16", release=True)([0], [1])
    with pytest.raises(
        RuntimeError, match="the weight of a layer is gone: it was released by another sampler"
    ):
        Sampler(vae, var, precision="bf16")([0], [1])
