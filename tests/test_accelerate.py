"""`accelerate` on a stand-in of the published class: its attributes and entries, and another forward pass."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import var_ext
from tests.models.conftest import small_pair
from var_ext.engine.compare import UnsupportedModel
from var_ext.models import VAR, MultiScaleQuantizer
from var_ext.models.var import FFN
from var_ext.models.vqvae import ResnetBlock

ARGUMENTS = {"B": 3, "label_B": torch.tensor([1, 4, 0]), "g_seed": 5, "cfg": 3.0, "top_k": 12, "top_p": 0.9}


def published(**options) -> nn.Module:
    """This project's model behind the published attributes: what `accelerate` may rely on."""
    vae, var = small_pair(**options)
    vae.quantize.quant_resi_ratio = 0.5
    for block in var.blocks:
        block.ln_wo_grad = nn.LayerNorm(var.C, eps=1e-6, elementwise_affine=False)
    return var.eval()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("smooth", [False, True])
def test_same_answers_from_shared_weights(shared, smooth):
    model = published(shared_aln=shared)
    fast = var_ext.accelerate(model)
    expected, tokens = model.autoregressive_infer_cfg(**ARGUMENTS, more_smooth=smooth, return_tokens=True)
    images, drawn = fast.autoregressive_infer_cfg(**ARGUMENTS, more_smooth=smooth, return_tokens=True)
    assert torch.equal(drawn, tokens) and torch.equal(images, expected)
    mine = dict(fast.var.named_parameters()) | dict(fast.var.vae_proxy[0].named_parameters())
    theirs = dict(model.named_parameters()) | dict(model.vae_proxy[0].named_parameters())
    assert all(mine[name].data_ptr() == theirs[name].data_ptr() for name in theirs)
    with torch.no_grad():
        model.head.weight.neg_()
    assert not torch.equal(fast.autoregressive_infer_cfg(**ARGUMENTS), images)


def test_the_precision_follows_autocast_unless_one_is_asked_for():
    model = published()
    fast, exact = var_ext.accelerate(model), var_ext.accelerate(model, "fp32")
    plain = fast.autoregressive_infer_cfg(**ARGUMENTS)
    with torch.autocast("cpu", torch.bfloat16):
        low, same = fast.autoregressive_infer_cfg(**ARGUMENTS), exact.autoregressive_infer_cfg(**ARGUMENTS)
    torch.testing.assert_close(same, plain, rtol=1e-4, atol=1e-5)
    assert low.dtype == torch.float32 and (low - plain).abs().max() > 0
    for dtype in ("bf16", torch.bfloat16, "int8"):
        images = var_ext.accelerate(model, dtype).autoregressive_infer_cfg(**ARGUMENTS)
        assert images.isfinite().all() and (images - plain).abs().max() > 0


class Wrapped(nn.Module):
    """As an adapter library wraps a layer: without a `weight`."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return self.base(x)


def test_a_wrapped_head_draws_what_the_head_draws():
    model = published()
    expected = model.autoregressive_infer_cfg(**ARGUMENTS, return_tokens=True)[1]
    fast = var_ext.accelerate(model)
    for var in (model, fast.var):
        var.head = Wrapped(var.head)
    for owner in (model, fast):
        assert torch.equal(owner.autoregressive_infer_cfg(**ARGUMENTS, return_tokens=True)[1], expected)


def test_seeds_give_each_image_its_own_stream():
    fast = var_ext.accelerate(published(), "bf16")
    given = {**ARGUMENTS, "g_seed": None, "seeds": torch.tensor([7, 8, 9])}
    images, tokens = fast.autoregressive_infer_cfg(**given, return_tokens=True)
    assert torch.equal(fast.sampler([1, 4, 0], [7, 8, 9], cfg=3.0, top_k=12, top_p=0.9), images)
    alone = {**given, "B": 1, "label_B": torch.tensor([4]), "seeds": [8]}
    assert torch.equal(fast.autoregressive_infer_cfg(**alone, return_tokens=True)[1], tokens[1:2])
    with pytest.raises(ValueError, match="either g_seed or seeds must be given"):
        fast.autoregressive_infer_cfg(**{**given, "g_seed": 3})
    with pytest.raises(ValueError, match=r"seeds must be \(3,\) int64, got \(2,\)"):
        fast.autoregressive_infer_cfg(**{**given, "seeds": [1, 2]})


def test_other_models_are_told_what_is_missing():
    with pytest.raises(TypeError, match="got a Linear without autoregressive_infer_cfg, num_classes"):
        var_ext.accelerate(nn.Linear(2, 3))
    model = published()
    model.vae_proxy = (SimpleNamespace(decoder=None),)
    with pytest.raises(TypeError, match="got a SimpleNamespace without encoder, quantize, quant_conv"):
        var_ext.accelerate(model)
    model = published()
    model.blocks[1].attn.proj = nn.Linear(64, 64, bias=False)
    with pytest.raises(
        TypeError, match=r"takes the published VAR, but the model must have .*blocks.1.attn.proj.bias"
    ):
        var_ext.accelerate(model)
    with pytest.raises(ValueError, match="precision must be one of fp32, bf16, fp16, int8, got 'fp8'"):
        var_ext.accelerate(published(), "fp8")


def test_weights_are_released_on_request():
    model = published()
    expected = var_ext.accelerate(model, "bf16").autoregressive_infer_cfg(**ARGUMENTS)
    fast = var_ext.accelerate(model, "bf16", release=True)
    for _ in range(2):  # nothing is packed a second time
        assert torch.equal(fast.autoregressive_infer_cfg(**ARGUMENTS), expected)
    left = sum(p.numel() for p in (*model.blocks.parameters(), *model.vae_proxy[0].decoder.parameters()))
    assert left < 10_000 and model.head.weight.numel() == 0
    with pytest.raises(ValueError, match="release needs a dtype, got None"):
        var_ext.accelerate(published(), release=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_of_another_dtype_are_shared_as_they_are(dtype):
    model = published().to(dtype)
    fast = var_ext.accelerate(model)
    assert fast.var.head.weight.data_ptr() == model.head.weight.data_ptr()
    assert fast.engine.precision.dtype == dtype
    expected = model.autoregressive_infer_cfg(**ARGUMENTS)
    assert torch.equal(fast.autoregressive_infer_cfg(**ARGUMENTS), expected)
    assert fast.sampler(1, 2).isfinite().all()


def test_a_sampler_that_released_weights_stays_where_it_is():
    fast = var_ext.accelerate(published(), "bf16", release=True)
    fast.sampler(1, 2)
    with pytest.raises(RuntimeError, match="released and cannot be moved: load them again"):
        fast.sampler.to("cpu")


class Relu(FFN):
    def forward(self, x):
        return self.fc2(nn.functional.relu(self.fc1(x)))


class Loud(ResnetBlock):
    def forward(self, x):
        return 2 * super().forward(x)


class Louder(MultiScaleQuantizer):
    def get_next_autoregressive_input(self, si, SN, f_hat, h_BChw):
        return super().get_next_autoregressive_input(si, SN, f_hat, 3 * h_BChw)


class Shifted(VAR):
    def forward(self, label_B, x):
        return super().forward(label_B, x) + torch.arange(self.V)


def patched(module: nn.Module) -> None:
    old = module.forward
    module.forward = lambda *given: old(*given)


CHANGES = {
    "blocks.1 has a forward of its own": lambda model: patched(model.blocks[1]),
    "blocks.0.ffn has a forward of its own": lambda model: patched(model.blocks[0].ffn),
    "blocks.1.attn has a forward hook": lambda model: model.blocks[1].attn.register_forward_hook(lambda *_: None),
    "head has a forward hook": lambda model: model.head.register_forward_pre_hook(lambda *_: None),
    "the model has a get_logits of its own": lambda model: setattr(model, "get_logits", model.get_logits),
    "the model has a autoregressive_infer_cfg of its own": lambda model: setattr(
        model, "autoregressive_infer_cfg", model.autoregressive_infer_cfg
    ),
    "decoder.mid has a forward hook": lambda model: model.vae_proxy[0].decoder.mid.register_forward_hook(
        lambda *_: None
    ),
    r"blocks.0.ffn.fc2 is off by .* of its largest value": lambda model: setattr(
        model.blocks[0].ffn, "__class__", Relu
    ),
    r"blocks.1.attn.proj is off by": lambda model: setattr(model.blocks[1].attn, "scale", 3.0),
    r"decoder.mid.block_1 is off by": lambda model: setattr(
        model.vae_proxy[0].decoder.mid.block_1, "__class__", Loud
    ),
    r"quantize.get_next_autoregressive_input is off by": lambda model: setattr(
        model.vae_proxy[0].quantize, "__class__", Louder
    ),
    r"the output is off by": lambda model: setattr(model, "__class__", Shifted),
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_a_model_that_was_changed_is_refused(what):
    """The twin knows the published architecture: what was changed would be ignored without a word."""
    model = published()
    CHANGES[what](model)
    modes = [module.training for module in model.modules()]
    with pytest.raises(
        UnsupportedModel, match=f"published architecture, but {what}.*or leave it out on purpose"
    ):
        var_ext.accelerate(model)
    assert modes == [module.training for module in model.modules()]
    assert var_ext.accelerate(model, check=False).autoregressive_infer_cfg(1, 0, 0).isfinite().all()


def test_the_check_leaves_no_trace():
    model = published().train()
    state = torch.get_rng_state()
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    var_ext.accelerate(model)
    assert torch.equal(state, torch.get_rng_state()) and model.training and model.blocks[0].ffn.training
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_compiled_model_is_unwrapped():
    model = published()
    expected = var_ext.accelerate(model).autoregressive_infer_cfg(**ARGUMENTS)
    assert torch.equal(
        var_ext.accelerate(torch.compile(model)).autoregressive_infer_cfg(**ARGUMENTS), expected
    )
