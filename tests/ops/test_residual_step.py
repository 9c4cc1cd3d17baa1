from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops import oracle
from var_ext import ops

SIZES = [  # batch, channels, f_hat, codes, next
    (2, 4, (16, 16), (1, 1), 2),
    (1, 3, (16, 16), (13, 13), 16),
    (2, 5, (7, 5), (3, 2), (4, 3)),
    (3, 1, (1, 9), (1, 4), (1, 1)),
    (2, 4, (6, 6), (6, 6), None),
    (1, 4, (6, 6), (2, 2), None),
    (0, 4, (4, 4), (2, 2), 3),
]


def inputs(
    batch: int,
    channels: int,
    size: tuple[int, int],
    codes: tuple[int, int],
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    f_hat, embedding = torch.randn(batch, channels, *size), torch.randn(batch, channels, *codes)
    weight, bias = torch.randn(channels, channels, 3, 3), torch.randn(channels)
    return [t.to(dtype) for t in (f_hat, embedding, weight, bias)]


def exact(
    f_hat: Tensor, embedding: Tensor, weight: Tensor, bias: Tensor, next_size: Any, ratio: float
) -> list[Tensor]:
    size = f_hat.shape[2:]
    matrices = [oracle.bicubic_matrix(out, n) for out, n in zip(size, embedding.shape[2:], strict=True)]
    up = embedding.double() if embedding.shape[2:] == size else oracle.resampled(embedding, *matrices)
    new = f_hat.double() + oracle.phi(up, weight, bias, ratio)
    target = (
        size if next_size is None else (next_size, next_size) if isinstance(next_size, int) else next_size
    )
    return [
        new,
        oracle.resampled(new, *(oracle.area_matrix(out, n) for out, n in zip(target, size, strict=True))),
    ]


@pytest.mark.parametrize(("batch", "channels", "size", "codes", "following"), SIZES)
@pytest.mark.parametrize("ratio", [0.5, 0.0, -0.25])
def test_against_float64(
    either_backend: str, batch: int, channels: int, size: Any, codes: Any, following: Any, ratio: float
) -> None:
    given = inputs(batch, channels, size, codes)
    results = ops.residual_step(*given, next_size=following, ratio=ratio)
    for mine, truth in zip(results, exact(*given, following, ratio), strict=True):
        assert mine.shape == truth.shape
        oracle.assert_equal_up_to_rounding(mine, truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(either_backend: str, dtype: torch.dtype) -> None:
    f_hat, embedding, weight, bias = inputs(2, 8, (8, 8), (3, 3), dtype)
    up = torch.nn.functional.interpolate(embedding, size=(8, 8), mode="bicubic")
    convolved = torch.nn.functional.conv2d(up, weight, bias, padding=1)
    torch_new = f_hat + (up * 0.5 + convolved * 0.5)
    torch_next = torch.nn.functional.interpolate(torch_new, size=(4, 4), mode="area")
    results = ops.residual_step(f_hat, embedding, weight, bias, next_size=4)
    truths = exact(f_hat, embedding, weight, bias, 4, 0.5)
    for mine, torchs, truth in zip(results, (torch_new, torch_next), truths, strict=True):
        oracle.assert_as_good_as_torch(mine, torchs, truth)


def test_f_hat_is_left_alone(either_backend: str) -> None:
    given = inputs(1, 2, (4, 4), (2, 2))
    before = given[0].clone()
    new, following = ops.residual_step(*given)
    assert torch.equal(given[0], before)
    assert torch.equal(new, following)


def test_strided_views(either_backend: str) -> None:
    f_hat, embedding = torch.randn(2, 6, 7, 4).permute(0, 3, 1, 2), torch.randn(2, 8, 3, 6)[:, ::2, :, 1:4]
    weight, bias = torch.randn(3, 3, 4, 4).permute(2, 3, 0, 1), torch.randn(8)[::2]
    results = ops.residual_step(f_hat, embedding, weight, bias, next_size=(2, 3))
    for mine, truth in zip(results, exact(f_hat, embedding, weight, bias, (2, 3), 0.5), strict=True):
        oracle.assert_equal_up_to_rounding(mine, truth)


@pytest.mark.parametrize("following", [None, (3, 2)])
def test_gradients(either_backend: str, following: Any) -> None:
    given = [t.requires_grad_() for t in inputs(1, 2, (4, 5), (2, 3), torch.float64)]
    assert torch.autograd.gradcheck(lambda *g: ops.residual_step(*g, next_size=following, ratio=0.3), given)


def test_registration() -> None:
    given = [t.requires_grad_() for t in inputs(2, 3, (4, 4), (2, 2))]
    for following in ([], [3, 3]):
        torch.library.opcheck(torch.ops.var_ext.residual_step, (*given, following, 0.5))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            dict(f_hat=torch.zeros(4, 6, 6)),
            ValueError,
            r"f_hat must have shape \(B, C, H, W\).*got \(4, 6, 6\)",
        ),
        (
            dict(embedding=torch.zeros(1, 3, 2, 2)),
            ValueError,
            r"embedding must have shape.*got \(1, 3, 2, 2\)",
        ),
        (dict(embedding=torch.zeros(1, 4, 0, 2)), ValueError, r"embedding must have a row and a column.*got"),
        (
            dict(phi_weight=torch.zeros(4, 4, 1, 1)),
            ValueError,
            r"phi_weight must have shape.*got \(4, 4, 1, 1\)",
        ),
        (dict(phi_bias=torch.zeros(3)), ValueError, r"phi_bias must have shape \(C,\) = \(4\), got \(3,\)"),
        (dict(next_size=0), ValueError, "size must be a side or .*got 0"),
        (dict(f_hat=torch.zeros(1, 4, 6, 6).int()), TypeError, "f_hat must be float32.*got int32"),
        (dict(embedding=torch.zeros(1, 4, 2, 2).half()), TypeError, "one dtype, got.*embedding float16"),
        (dict(phi_bias=torch.zeros(4, device="meta")), ValueError, "one device, got.*phi_bias on meta"),
    ],
)
def test_bad_input(
    either_backend: str, change: dict[str, object], error: type[Exception], message: str
) -> None:
    names = ("f_hat", "embedding", "phi_weight", "phi_bias")
    given = dict(zip(names, inputs(1, 4, (6, 6), (2, 2)), strict=True), next_size=3)
    with pytest.raises(error, match=f"residual_step: .*{message}"):
        ops.residual_step(**{**given, **change})  # type: ignore[arg-type]
