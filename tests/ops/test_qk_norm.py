from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops import oracle
from tests.threads import threads
from var_ext import _C, ops, reference
from var_ext.ops._native import maybe_view, view

SHAPES = [
    (1, 1, 1, 4),
    (2, 7, 3, 64),
    (1, 129, 1, 64),
    (2, 151, 3, 32),
    (0, 7, 2, 8),
    (2, 0, 2, 8),
]  # B, L, H, D


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    batch, length, heads, dim = shape
    qkv = torch.randn(batch, length, 3, heads, dim).to(dtype)
    q_bias, v_bias = torch.randn(2, heads, dim).to(dtype)
    return (
        qkv,
        q_bias,
        v_bias,
        (torch.rand(heads) * 6).to(dtype),
    )  # some above log 100, where the scale is capped


def formula(qkv: Tensor, q_bias: Tensor, v_bias: Tensor, log_scale: Tensor | None) -> list[Tensor]:
    """q, k, v in the dtype of the arguments."""
    q, k, v = qkv[:, :, 0] + q_bias, qkv[:, :, 1], qkv[:, :, 2] + v_bias
    if log_scale is not None:
        q, k = (t / t.square().sum(dim=-1, keepdim=True).sqrt().clamp_min(1e-12) for t in (q, k))
        q = q * torch.minimum(log_scale, torch.tensor(math.log(100)).to(log_scale)).exp()[:, None]
    return [q, k, v]


def exact(*given: Tensor | None) -> list[Tensor]:
    return formula(*(None if t is None else t.double() for t in given))  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", oracle.LOW)
@pytest.mark.parametrize("norm", [True, False])
def test_against_float64(either_backend: str, shape: tuple[int, ...], dtype: torch.dtype, norm: bool) -> None:
    given: tuple[Any, ...] = inputs(shape, dtype)
    given = given if norm else (*given[:3], None)
    results = ops.qk_norm(*given)
    for mine, torchs, truth in zip(results, formula(*given), exact(*given), strict=True):
        assert mine.shape == shape
        oracle.assert_as_good_as_torch(mine, torchs, truth)


def test_the_scale_is_capped_at_100(either_backend: str) -> None:
    qkv, q_bias, v_bias, _ = inputs((1, 3, 2, 8))
    q = ops.qk_norm(qkv, q_bias, v_bias, torch.tensor([math.log(100), 50.0]))[0]
    torch.testing.assert_close(q.norm(dim=-1), torch.full((1, 3, 2), 100.0))


def test_a_zero_vector_stays_finite(either_backend: str) -> None:
    heads = torch.zeros(2, 8)
    for result in ops.qk_norm(torch.zeros(1, 3, 3, 2, 8), heads, heads, torch.zeros(2)):
        assert torch.equal(result, torch.zeros(1, 3, 2, 8))


def test_strided_qkv(either_backend: str) -> None:
    qkv = torch.randn(3, 2, 5, 4, 16)[..., ::2].permute(1, 2, 0, 3, 4)[:, :, :, 1:3]  # (2, 5, 3, 2, 8)
    q_bias, v_bias = torch.randn(8, 2, 2).permute(1, 2, 0)
    given = (qkv, q_bias, v_bias, torch.rand(4)[::2])
    for mine, truth in zip(ops.qk_norm(*given), exact(*given), strict=True):
        oracle.assert_equal_up_to_rounding(mine, truth)


@pytest.mark.parametrize("norm", [True, False])
def test_gradients(either_backend: str, norm: bool) -> None:
    # well below the cap, at which the scale has a kink
    given = [t.clone().requires_grad_() for t in inputs((2, 3, 2, 4), torch.float64)]
    given[3].data.mul_(0.5)
    given = given if norm else given[:3]
    assert torch.autograd.gradcheck(ops.qk_norm, given)


# H around the heads that are taken together, D around vectors, B L around the chunks of a sum
NATIVE = [
    (1, 1, 1, 1),
    (2, 3, 3, 5),
    (1, 33, 17, 64),
    (3, 11, 16, 64),
    (1, 65, 2, 31),
    (2, 4, 9, 128),
    (1, 2, 8, 65),
]


@pytest.mark.parametrize("shape", [*NATIVE, (0, 3, 2, 8), (2, 0, 2, 8)])
@pytest.mark.parametrize("dtype", oracle.LOW)
@pytest.mark.parametrize("norm", [True, False])
def test_kernels(each_isa: str, shape: tuple[int, ...], dtype: torch.dtype, norm: bool) -> None:
    """Forward and backward of each variant, as near to float64 as torch is."""
    given = list(inputs(shape, dtype))[: 4 if norm else 3]
    rest = [] if norm else [None]
    for mine, torchs, truth in zip(
        ops.qk_norm(*given, *rest), formula(*given, *rest), exact(*given, *rest), strict=True
    ):
        oracle.assert_as_good_as_torch(mine, torchs, truth)
    grads = [torch.randn(shape).to(dtype) for _ in range(3)]

    def plain(*args: Tensor) -> list[Tensor]:
        return formula(*args, *rest)

    if shape[-1] == 1:
        return  # a norm over one channel has no gradient, and rounding alone is left
    results = oracle.gradients(ops.qk_norm, given, grads)
    torch_results = oracle.gradients(plain, given, grads)
    truths = oracle.gradients(plain, [t.double() for t in given], grads)
    if (
        norm and dtype == torch.float32
    ):  # a sum of B L D terms that cancel: the error is measured against them
        mine, truth = results.pop(), truths.pop()
        torch_results.pop()
        terms = (grads[0] * formula(*given)[0]).abs().sum(dim=(0, 1, 3))
        assert ((mine - truth).abs() <= 2 * torch.finfo(dtype).eps * terms).all()
    for mine, torchs, truth in zip(results, torch_results, truths, strict=True):
        oracle.assert_as_good_as_torch(mine, torchs, truth)


@pytest.mark.parametrize("dtype", oracle.LOW)
def test_the_scale_has_no_gradient_above_the_cap(each_isa: str, dtype: torch.dtype) -> None:
    log_scale = torch.tensor([1.0, math.log(100), 4.7, 50.0, math.nan]).to(dtype)
    given = [*inputs((2, 3, 5, 8), dtype)[:3], log_scale]
    grads = [torch.randn(2, 3, 5, 8).to(dtype) for _ in range(3)]
    mine = oracle.gradients(ops.qk_norm, given, grads)[3]
    # at the cap itself the gradient passes, as in clamp_max; bfloat16 has no log 100: it rounds to above or below
    below = log_scale.float() <= torch.tensor(math.log(100))
    assert torch.equal(mine == 0, ~below & ~log_scale.isnan())
    assert torch.equal(mine.isnan(), log_scale.isnan())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_short_and_special_heads(each_isa: str, dtype: torch.dtype) -> None:
    """Zero, shorter than 1e-12, so long that the square overflows, NaN and infinite: forward and gradients as torch."""
    qkv, q_bias, v_bias, log_scale = inputs((1, 5, 2, 24), dtype)
    q_bias.zero_()
    qkv[:, 0] = 0
    qkv[:, 1] *= 1e-14
    qkv[:, 2] *= 1e25
    qkv[:, 3, :, :, 3] = math.nan
    qkv[:, 4, :, :, 7] = math.inf
    given = [qkv, q_bias, v_bias, log_scale]
    tolerance = dict(rtol=2e-2, atol=1e-5) if dtype == torch.bfloat16 else dict(rtol=1e-5, atol=1e-6)
    for mine, torchs in zip(ops.qk_norm(*given), formula(*(t.float() for t in given)), strict=True):
        torch.testing.assert_close(mine, torchs.to(dtype), equal_nan=True, **tolerance)  # type: ignore[arg-type]
    grads = [torch.randn(1, 5, 2, 24).to(dtype) for _ in range(3)]
    mine = oracle.gradients(ops.qk_norm, given, grads)[0][:, :2]
    truth = oracle.gradients(reference.qk_norm, [t.double() for t in given], grads)[0][:, :2]
    # 1e12 is the slope of a short head
    torch.testing.assert_close(mine.double(), truth, rtol=tolerance["rtol"], atol=1e12 * tolerance["rtol"])


LAYOUTS = {
    "unaligned": oracle.unaligned,
    "heads first": lambda x: x.movedim(-2, 0).contiguous().movedim(0, -2) if x.ndim > 2 else x,
    "batch last": lambda x: x.movedim(0, -2).contiguous().movedim(-2, 0) if x.ndim > 2 else x,
    "padded": lambda x: torch.nn.functional.pad(x, (3, 2))[..., 3:-2],
    "strided channels": lambda x: torch.stack([x, x], dim=-1)[..., 0],
    "expanded": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(each_isa: str, layout: str) -> None:
    """What a layout holds decides the result, to the bit; in gradients too."""
    place = LAYOUTS[layout]
    given = [place(t) for t in inputs((2, 5, 3, 24))]
    plain = [t.contiguous() for t in given]
    wanted = ops.qk_norm(*plain)
    for mine, want in zip(ops.qk_norm(*given), wanted, strict=True):
        assert mine.is_contiguous()
        assert torch.equal(mine, want)
    grads = [place(torch.randn(2, 5, 3, 24)) for _ in range(3)]
    leaves = [t.requires_grad_() for t in given]
    results = torch.autograd.grad(ops.qk_norm(*leaves), leaves, grads)
    for mine, want in zip(results, oracle.gradients(ops.qk_norm, plain, grads), strict=True):
        assert torch.equal(mine, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_outputs_are_the_same(each_isa: str, dtype: torch.dtype) -> None:
    """Outputs that are written past the caches equal those of one sample at a time, which are not."""
    length = 560 if dtype == torch.float32 else 1120
    given = inputs((2, length, 10, 64), dtype)
    grads = [torch.randn(2, length, 10, 64).to(dtype) for _ in range(3)]
    whole = [*ops.qk_norm(*given), oracle.gradients(ops.qk_norm, given, grads)[0]]
    for i in range(2):
        one, grad = (given[0][i : i + 1], *given[1:]), [g[i : i + 1] for g in grads]
        for mine, part in zip(
            whole, [*ops.qk_norm(*one), oracle.gradients(ops.qk_norm, one, grad)[0]], strict=True
        ):
            assert torch.equal(mine[i : i + 1], part)


def test_thread_count_changes_no_bit(each_isa: str) -> None:
    given = inputs((2, 200, 5, 64))
    grads = list(torch.randn(3, 2, 200, 5, 64))
    runs = []
    for count in (1, 2, 3):
        with threads(count):
            runs.append([*ops.qk_norm(*given), *oracle.gradients(ops.qk_norm, given, grads)])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def test_the_kernel_checks_its_tensors() -> None:
    q, bias = torch.zeros(1, 3, 2, 4), torch.zeros(2, 4)
    plain = dict(
        qkv=torch.zeros(1, 3, 3, 2, 4), q_bias=bias, v_bias=bias, log_scale=None,
        q=q, k=q.clone(), v=q.clone(),
    )  # fmt: skip
    for change, message in [
        (dict(qkv=torch.zeros(1, 3, 2, 2, 4)), r"qkv must have shape \(B, L, 3, H, D\)"),
        (dict(log_scale=torch.zeros(3)), r"log_scale must have shape \(2,\), got \(3,\)"),
        (dict(q=q.double()), "q must be float32, got float64"),
        (dict(k=torch.zeros(1, 1, 2, 4).expand(-1, 3, -1, -1)), "k must not overlap itself"),
        (dict(v=torch.zeros(1, 3, 2, 8)[..., ::2]), "v must have contiguous channels, got stride 2"),
        (dict(k=torch.zeros(1, 4, 2, 4)), r"k must have shape \(1, 3, 2, 4\), got \(1, 4, 2, 4\)"),
    ]:
        with pytest.raises(ValueError, match=f"qk_norm: .*{message}"):
            _C.qk_norm(*map(maybe_view, {**plain, **change}.values()))  # type: ignore[arg-type]
    grads = [q, q, q, plain["qkv"], bias, torch.zeros(2), plain["qkv"], bias, bias]
    with pytest.raises(ValueError, match="log_scale and its gradient must be given together"):
        _C.qk_norm_backward(*map(view, grads), None, None)  # type: ignore[arg-type]


def test_registration() -> None:
    given = [t.clone().requires_grad_() for t in inputs((2, 3, 2, 4))]
    torch.library.opcheck(torch.ops.var_ext.qk_norm, tuple(given))
    torch.library.opcheck(torch.ops.var_ext.qk_norm, (*given[:3], None))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(qkv=torch.zeros(1, 3, 2, 2, 4)), ValueError, r"qkv must have shape.*got \(1, 3, 2, 2, 4\)"),
        (
            dict(qkv=torch.zeros(1, 3, 24)),
            ValueError,
            r"qkv must have shape \(B, L, 3, H, D\).*got \(1, 3, 24\)",
        ),
        (dict(q_bias=torch.zeros(8)), ValueError, r"q_bias must have shape \(H, D\) = \(2, 4\), got \(8,\)"),
        (dict(v_bias=torch.zeros(4, 2)), ValueError, r"v_bias must have shape.*got \(4, 2\)"),
        (dict(log_scale=torch.zeros(3)), ValueError, r"log_scale must have shape \(H,\) = \(2\), got \(3,\)"),
        (dict(qkv=torch.zeros(1, 3, 3, 2, 4).int()), TypeError, "qkv must be float32.*got int32"),
        (dict(v_bias=torch.zeros(2, 4).half()), TypeError, "one dtype, got.*v_bias float16"),
        (dict(q_bias=torch.zeros(2, 4, device="meta")), ValueError, "one device, got.*q_bias on meta"),
    ],
)
def test_bad_input(
    either_backend: str, change: dict[str, object], error: type[Exception], message: str
) -> None:
    given: dict[str, Any] = dict(
        qkv=torch.zeros(1, 3, 3, 2, 4),
        q_bias=torch.zeros(2, 4),
        v_bias=torch.zeros(2, 4),
        log_scale=torch.zeros(2),
    )
    with pytest.raises(error, match=f"qk_norm: .*{message}"):
        ops.qk_norm(**{**given, **change})
