"""Plain linear layers of many rows run `ops.linear` where it is faster; all others are called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from var_ext import backend, ops
from var_ext.models import modules
from var_ext.models.modules import ROWS, linear, linear_float32, linear_gelu


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The dtype of x in each call of `ops.linear`, on any processor."""
    seen: list[torch.dtype] = []
    own = ops.linear

    def counted(x: Tensor, *rest: Any, **options: Any) -> Tensor:
        seen.append(x.dtype)
        return own(x, *rest, **options)

    monkeypatch.setattr(modules.ops, "linear", counted)
    monkeypatch.setattr(modules.backend, "multiplies", lambda device, *, bf16: device == "cpu")
    return seen


def of(layer: nn.Module, x: Tensor, function: Callable[[Any, Tensor], Tensor]) -> list[Tensor]:
    """Output and gradients."""
    x = x.clone().requires_grad_()
    y = function(layer, x)
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), [x, *layer.parameters()])]


def gelu(layer: Any, x: Tensor) -> Tensor:
    return nn.functional.gelu(layer(x), approximate="tanh")


SAME = [(linear, nn.Linear.__call__), (linear_gelu, gelu), (linear_float32, lambda f, x: f(x).float())]


@pytest.mark.parametrize(("ours", "torchs"), SAME)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("autocast", [False, True])
def test_as_the_layer(calls: list[torch.dtype], ours: Any, torchs: Any, bias: bool, autocast: bool) -> None:
    layer, x = nn.Linear(24, 40, bias=bias), torch.randn(2, ROWS, 24)
    if autocast:
        x = x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, wanted = of(layer, x, ours), of(layer, x, torchs)
    assert len(calls) == (ours is not linear_gelu or bias)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        # bfloat16 is rounded at other places, 2^-9 of a number each
        atol = (2e-2 if autocast else 1e-5) * other.abs().max().item()
        torch.testing.assert_close(one, other, rtol=0, atol=atol)


def test_logits_under_autocast_are_rounded_as_published(calls: list[torch.dtype]) -> None:
    head, hidden = nn.Linear(24, 40), torch.randn(ROWS, 24)
    with torch.autocast("cpu", torch.bfloat16):
        logits = linear_float32(head, hidden)
    assert calls == [torch.float32] and logits.dtype == torch.float32
    assert torch.equal(logits, logits.bfloat16().float())


class Adapter(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def hooked() -> nn.Linear:
    layer = nn.Linear(24, 40)
    layer.register_forward_hook(lambda module, args, output: output + 1)
    return layer


@pytest.mark.parametrize(
    ("layer", "x", "autocast"),
    [
        (nn.Linear(24, 40), torch.randn(ROWS - 1, 24), None),
        (Adapter(24, 40), torch.randn(ROWS, 24), None),
        (hooked(), torch.randn(ROWS, 24), None),
        (nn.Linear(24, 40).double(), torch.randn(ROWS, 24).double(), None),
        (nn.Linear(24, 40), torch.randn(ROWS, 24), torch.float16),
    ],
    ids=["few rows", "subclass", "hook", "float64", "fp16"],
)
def test_other_layers_are_called(
    calls: list[torch.dtype], layer: nn.Module, x: Tensor, autocast: Any
) -> None:
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        assert torch.equal(linear(layer, x), layer(x))
    assert not calls


def test_a_wrong_dtype_is_torchs_error(calls: list[torch.dtype]) -> None:
    with pytest.raises(RuntimeError, match="dtype"):
        linear(nn.Linear(24, 40), torch.randn(ROWS, 24).bfloat16())


def test_transforms_and_compilers_see_the_layer(calls: list[torch.dtype]) -> None:
    layer, x = nn.Linear(24, 40), torch.randn(3, ROWS, 24)
    with torch.no_grad():
        torch.testing.assert_close(torch.func.vmap(lambda x: linear(layer, x))(x), layer(x))
        compiled = torch.compile(lambda x: linear(layer, x), backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), layer(x))
    assert not calls


def test_torch_multiplies_where_it_is_faster() -> None:
    with backend.force("reference"):
        assert not backend.multiplies("cpu", bf16=False)
    assert not backend.multiplies("cuda", bf16=True)


def test_the_variants_that_pay(each_isa: str) -> None:
    """The choice follows the instruction set in force: none before AVX-512, and its bf16 for bfloat16."""
    wide = backend.multiplies("cpu", bf16=False)
    narrow = backend.multiplies("cpu", bf16=True)
    assert not wide or each_isa.startswith("avx512")
    assert not narrow or (wide and each_isa == "avx512_bf16")
