"""Biases of the decoder's convolutions, added by what comes after them, as on a GPU: forced on other devices here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from var_ext import ops
from var_ext.engine import layers, named_precision
from var_ext.engine.execution import Execution
from var_ext.models import VQVAE
from var_ext.models.vqvae import AttnBlock, Decoder, ResnetBlock

CPU = torch.device("cpu")


def engines(module: nn.Module, mode: str = "fp32", *, pack: bool = True) -> Any:
    return Execution(named_precision(mode, CPU), pack=pack, free=False).of(module.eval())


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Call it to say whether biases are a pass of their own."""
    return lambda yes: monkeypatch.setattr(layers, "adds_bias_apart", lambda x: yes)


def with_biases(module: nn.Module) -> nn.Module:
    for p in module.parameters():
        if p.ndim == 1:
            nn.init.normal_(p)
    return module


class Twice(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Negated(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(-x)


def nothing(block: ResnetBlock) -> None:
    pass


def hook(name: str) -> Callable[[ResnetBlock], None]:
    def change(block: ResnetBlock) -> None:
        getattr(block, name).register_forward_hook(lambda module, given, result: 3 * result)

    return change


def pre_hook(name: str) -> Callable[[ResnetBlock], None]:
    def change(block: ResnetBlock) -> None:
        getattr(block, name).register_forward_pre_hook(lambda module, given: (given[0] + 1,))

    return change


def of_class(name: str, kind: type[nn.Module]) -> Callable[[ResnetBlock], None]:
    return lambda block: setattr(getattr(block, name), "__class__", kind)


def without(name: str) -> Callable[[ResnetBlock], None]:
    return lambda block: setattr(getattr(block, name), "bias", None)


def patched(name: str) -> Callable[[ResnetBlock], None]:
    def change(block: ResnetBlock) -> None:
        layer = getattr(block, name)
        forward = layer.forward
        layer.forward = lambda x: forward(x) - 5

    return change


def wrapped(name: str) -> Callable[[ResnetBlock], None]:
    return lambda block: setattr(block, name, nn.Sequential(getattr(block, name), nn.Tanh()))


PARTS = ("conv1", "conv2", "norm1", "norm2", "nin_shortcut", "dropout")
CHANGES: dict[str, Callable[[ResnetBlock], None]] = {
    "none": nothing,
    **{f"a hook on {name}": hook(name) for name in PARTS},
    **{f"a pre-hook on {name}": pre_hook(name) for name in PARTS},
    **{f"{name} patched": patched(name) for name in PARTS},
    **{f"{name} wrapped": wrapped(name) for name in PARTS},
    "conv1 of another class": of_class("conv1", Twice),
    "conv2 of another class": of_class("conv2", Twice),
    "norm2 of another class": of_class("norm2", Negated),
    "conv1 without bias": without("conv1"),
    "conv2 without bias": without("conv2"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(("mode", "off"), [("fp32", 1e-4), ("bf16", 0.1)])
def test_a_block_is_the_same(apart: Callable[[bool], None], change: str, mode: str, off: float) -> None:
    """Up to roundings: 2^-8 each in bf16, of values up to ten, through two convolutions."""
    block = with_biases(ResnetBlock(32, 64, 0.1))
    CHANGES[change](block)
    x = torch.randn(2, 32, 6, 5).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        truth = block.eval()(x)
        for yes in (True, False):
            apart(yes)
            kind = named_precision(mode, CPU).dtype
            y = engines(block, mode)(x.to(kind))
            assert y.dtype == kind
            assert (y.float() - truth).abs().max() < off * truth.abs().max()


def test_attention_and_decoder_are_the_same(apart: Callable[[bool], None]) -> None:
    attention, x = with_biases(AttnBlock(32)), torch.randn(2, 32, 4, 4)
    decoder, z = with_biases(Decoder(32, (1, 2, 2), 8, 0.0, blocks=2)), torch.randn(2, 8, 4, 4)
    apart(True)
    with torch.inference_mode():
        for module, given in ((attention, x), (decoder, z)):
            truth = module.eval()(given)
            for pack in (True, False):
                y = engines(module, pack=pack)(given)
                torch.testing.assert_close(y, truth, rtol=1e-4, atol=1e-4 * truth.abs().max().item())


def test_layers_of_the_cpu_keep_their_biases(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN adds them for nothing."""
    layer = engines(nn.Conv2d(3, 4, 3))
    x = torch.randn(1, 3, 5, 5)
    y, bias = layer.without_bias(x)
    assert bias is None
    assert torch.equal(y, layer(x))
    called = []
    monkeypatch.setattr(ops, "bias_residual", lambda *given, **options: called.append(given))
    with torch.inference_mode():
        engines(ResnetBlock(32, 32, 0.0))(torch.randn(1, 32, 3, 3))
    assert not called


def test_where_a_gradient_is_wanted_layers_keep_their_biases() -> None:
    on_gpu = type("OnGpu", (), {"is_cuda": True, "requires_grad": True})()
    assert not layers.adds_bias_apart(on_gpu)
    with torch.no_grad():
        assert layers.adds_bias_apart(on_gpu)


# launches, and passes over maps of the output's size
TABLE = {
    "convolution": (1, 0),
    "add": (1, 3),
    "add_": (1, 3),
    "clone": (1, 2),
    "native_group_norm": (2, 3),
    "group_norm_silu": (3, 3),
    "bias_residual_in_place": (1, 3),
}
FREE = {"empty", "empty_like", "_unsafe_view", "detach"}


class Costs(TorchDispatchMode):
    """Counts launches, and bytes that elementwise kernels and norms read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.launches, self.bytes, self.calls = 0, 0, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.is_view or name in FREE:
            return result
        launches, passes = TABLE[name]
        if name == "convolution" and args[2] is not None:
            launches, passes = 2, 2
        out = args[0] if result is None else result[0] if isinstance(result, tuple) else result
        self.launches += launches
        self.bytes += passes * out.numel() * out.element_size()
        self.calls[name] += 1
        return result


def costs(module: nn.Module, *shape: int) -> Costs:
    run = engines(module, "bf16")
    x = torch.empty(shape, dtype=torch.bfloat16, device="meta").contiguous(memory_format=torch.channels_last)
    with torch.no_grad():  # inference mode would show composite ops whole
        run(x)  # weights are laid out
        with Costs() as counted:
            run(x)
    return counted


def test_a_block_takes_nine_passes(apart: Callable[[bool], None]) -> None:
    """norm, norm and sum of three each; biases would be two more of two each. Assumptions as below."""
    with torch.device("meta"):
        block = ResnetBlock(160, 160, 0.0)
    one_pass = 2 * 160 * 64 * 64 * 2
    for yes, passes, launches in ((False, 13, 11), (True, 9, 9)):
        apart(yes)
        counted = costs(block, 2, 160, 64, 64)
        assert (counted.bytes / one_pass, counted.launches) == (passes, launches)


def test_the_published_decoder_moves_a_quarter_less(
    apart: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """256 px, ch = 160, bf16, eight images.

    Assumed of a GPU: a convolution is one launch and its bias another, which reads and writes its output; a norm reads
    twice and writes once, in three launches at most (two where SiLU does not follow); a sum reads two maps and writes
    one; no read comes from a cache. Products are not counted in bytes, the attention at 16 x 16 not at all.
    """
    with torch.device("meta"):
        decoder = VQVAE(ch=160, test_mode=False).decoder
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: torch.empty_like(q))
    apart(False)
    before = costs(decoder, 8, 32, 16, 16)
    apart(True)
    after = costs(decoder, 8, 32, 16, 16)
    blocks, attentions = 5 * 3 + 2, 3 + 1
    assert before.calls["add_"] == after.calls["bias_residual_in_place"] == blocks + attentions
    assert not after.calls["add_"] + after.calls["add"]
    assert not after.calls["clone"]
    assert (before.launches, after.launches) == (234, 234 - 2 * blocks - attentions)
    assert after.bytes <= 0.75 * before.bytes
