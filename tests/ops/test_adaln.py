from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.ops import oracle
from var_ext import ops

SHAPES = [(1, 1, 8), (2, 7, 64), (1, 129, 33), (3, 151, 192), (0, 7, 16), (2, 0, 16)]


def exact(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    x, scale, shift = x.double(), scale.double()[:, None], shift.double()[:, None]
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred / (centred.square().mean(dim=-1, keepdim=True) + eps).sqrt() * (1 + scale) + shift


def inputs(shape: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    batch, _, channels = shape
    x, branch = torch.randn(2, *shape, dtype=dtype)
    scale, shift, gate = torch.randn(3, batch, channels, dtype=dtype)
    return dict(x=x, scale=scale, shift=shift, branch=branch, gate=gate)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", oracle.LOW)
def test_against_float64(either_backend: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    given = inputs(shape, dtype)
    x, scale, shift = given["x"], given["scale"], given["shift"]
    torchs = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    oracle.assert_as_good_as_torch(ops.adaln(x, scale, shift), torchs, exact(x, scale, shift))


@pytest.mark.parametrize("dtype", oracle.LOW)
def test_branch_is_added_first(either_backend: str, dtype: torch.dtype) -> None:
    given = inputs((2, 7, 64), dtype)
    x, scale, shift, branch, gate = given.values()
    summed = x.double() + gate.double()[:, None] * branch.double()
    torch_sum = x + gate[:, None] * branch
    torchs = F.layer_norm(torch_sum, (64,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    new_x, y = ops.adaln(**given)
    oracle.assert_as_good_as_torch(new_x, torch_sum, summed)
    oracle.assert_as_good_as_torch(y, torchs, exact(summed, scale, shift))


def test_strided_arguments(either_backend: str) -> None:
    x = torch.randn(7, 2, 48)[..., ::2].transpose(0, 1)  # (2, 7, 24)
    scale, shift = torch.randn(2, 6, 24)[:, 1].chunk(2)  # (1, 24) views
    scale, shift = scale.expand(2, -1), shift.expand(2, -1)
    result = ops.adaln(x, scale, shift)
    oracle.assert_equal_up_to_rounding(result, exact(x, scale, shift))


def test_a_constant_row_is_only_shifted(either_backend: str) -> None:
    shift = torch.randn(1, 16)
    result = ops.adaln(torch.full((1, 3, 16), 5.0), torch.randn(1, 16), shift)
    torch.testing.assert_close(
        result, shift[:, None].expand(1, 3, 16)
    )  # the variance is 0: eps alone keeps it finite


def test_eps(either_backend: str) -> None:
    given = inputs((1, 2, 8))
    x, scale, shift = given["x"] * 1e-3, given["scale"], given["shift"]
    oracle.assert_equal_up_to_rounding(ops.adaln(x, scale, shift, eps=0.1), exact(x, scale, shift, eps=0.1))


def test_inputs_are_left_alone(either_backend: str) -> None:
    given = inputs((2, 3, 8))
    before = {name: tensor.clone() for name, tensor in given.items()}
    ops.adaln(**given)
    assert all(torch.equal(given[name], before[name]) for name in given)


def test_gradients(either_backend: str) -> None:
    given = [t.requires_grad_() for t in inputs((2, 3, 5), torch.float64).values()]
    assert torch.autograd.gradcheck(ops.adaln, given[:3])
    assert torch.autograd.gradcheck(
        lambda x, scale, shift, branch, gate: ops.adaln(x, scale, shift, branch=branch, gate=gate), given
    )


def test_registration() -> None:
    x, scale, shift, branch, gate = (t.requires_grad_() for t in inputs((2, 3, 8)).values())
    torch.library.opcheck(torch.ops.var_ext.adaln, (x, scale, shift, 1e-6))
    torch.library.opcheck(torch.ops.var_ext.adaln_residual, (x, scale, shift, branch, gate, 1e-6))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(x=torch.zeros(7, 8)), ValueError, r"x must have shape \(B, L, C\).*got \(7, 8\)"),
        (
            dict(scale=torch.zeros(2, 9)),
            ValueError,
            r"scale must have shape \(B, C\) = \(2, 8\), got \(2, 9\)",
        ),
        (dict(shift=torch.zeros(3, 8)), ValueError, r"shift must have shape.*got \(3, 8\)"),
        (dict(branch=torch.zeros(2, 4, 8)), ValueError, r"branch must have shape.*got \(2, 4, 8\)"),
        (dict(gate=torch.zeros(8)), ValueError, r"gate must have shape.*got \(8,\)"),
        (dict(gate=None), ValueError, "branch and gate must be given together, got no gate"),
        (dict(branch=None), ValueError, "branch and gate must be given together, got no branch"),
        (dict(x=torch.zeros(2, 3, 8, dtype=torch.int64)), TypeError, "x must be float32.*got int64"),
        (dict(scale=torch.zeros(2, 8).half()), TypeError, "one dtype, got.*scale float16"),
        (dict(gate=torch.zeros(2, 8).double()), TypeError, "one dtype, got.*gate float64"),
        (dict(shift=torch.zeros(2, 8, device="meta")), ValueError, "one device, got.*shift on meta"),
        (dict(x=[1.0]), TypeError, "x must be a tensor.*got list"),
    ],
)
def test_bad_input(
    either_backend: str, change: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"adaln: .*{message}"):
        ops.adaln(**{**inputs((2, 3, 8)), **change})  # type: ignore[arg-type]
