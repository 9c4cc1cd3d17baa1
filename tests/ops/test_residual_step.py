from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import var_ext
from tests.ops import oracle
from tests.threads import threads
from var_ext import _C, backend, ops, reference
from var_ext.ops._native import view

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


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("batch", "channels", "size", "codes"), [
    (2, 1, (1, 1), (1, 1)),
    (3, 16, (8, 8), (3, 3)),
    (2, 20, (5, 9), (2, 4)),
    (1, 33, (7, 3), (7, 3)),
    (1, 64, (6, 13), (5, 5)),
    (5, 32, (16, 16), (13, 13)),
])  # fmt: skip
def test_each_variant(
    each_isa: str, batch: int, channels: int, size: tuple[int, int], codes: tuple[int, int]
) -> None:
    """Channels below, at and beyond a vector and a group of vectors, widths of no round number; and gradients."""
    for layout in (torch.Tensor.contiguous, channels_last):
        given = inputs(batch, channels, size, codes)
        given[1], given[2] = layout(given[1]), given[2] * (9 * channels) ** -0.5
        given = [t.requires_grad_() for t in given]
        results = ops.residual_step(*given, next_size=(2, 1), ratio=0.3)
        truths = exact(*given, (2, 1), 0.3)
        for mine, truth in zip(results, truths, strict=True):
            oracle.assert_equal_up_to_rounding(mine, truth)
        pushes = [layout(torch.randn(r.shape)) for r in results]
        grads = torch.autograd.grad(results, given, pushes)
        wide = [t.detach().double().requires_grad_() for t in given]
        exact_grads = torch.autograd.grad(exact(*wide, (2, 1), 0.3), wide, [p.double() for p in pushes])
        for grad, truth in zip(grads, exact_grads, strict=True):
            # sums over up to 5 * 256 places of terms of order one
            torch.testing.assert_close(grad.double(), truth, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("channels", [16, 32])
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, channels_last])
def test_torchs_rounding(channels: int, layout: Any) -> None:
    """Bit for bit what torch gives where it runs oneDNN's AVX-512 kernels: `more_smooth` shows the last bits."""
    for size, codes in ((16, 16), (16, 13), (16, 1), (8, 3), (32, 24)):
        given = inputs(2, channels, (size, size), (codes, codes))
        given[1] = layout(given[1])
        mine = ops.residual_step(*given, next_size=size // 2 + 1)
        torchs = reference.residual_step(*given, next_size=size // 2 + 1)
        fused = _C.isa().startswith("avx512") and torch.backends.cpu.get_cpu_capability() == "AVX512"
        for one, other in zip(mine, torchs, strict=True):
            torch.testing.assert_close(one, other, rtol=0 if fused else 1e-5, atol=0 if fused else 1e-5)


@pytest.mark.parametrize("channels", [16, 32])
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, channels_last])
def test_a_batch_of_one_is_an_image_of_a_batch(each_isa: str, channels: int, layout: Any) -> None:
    """The stride of the batch may be anything then: torch leaves 1, the true one or what a larger batch had."""
    for size, codes in ((16, 16), (16, 13), (16, 1), (8, 3)):
        given = inputs(2, channels, (size, size), (codes, codes))
        given[1] = layout(given[1])
        both = ops.residual_step(*given, next_size=4)
        for stride in (1, channels * codes * codes, 10**6):
            code = given[1][:1]
            code = code.as_strided(code.shape, (stride, *code.stride()[1:]))
            alone = ops.residual_step(given[0][:1], code, *given[2:], next_size=4)
            assert all(torch.equal(one, many[:1]) for one, many in zip(alone, both, strict=True))


def test_only_the_gradients_that_are_wanted(either_backend: str) -> None:
    full = [t.requires_grad_() for t in inputs(2, 3, (5, 4), (2, 2))]
    push = torch.randn(2, 3, 5, 4)
    all_four = torch.autograd.grad(ops.residual_step(*full)[0], full, push)
    for i in range(4):
        some = [t.detach().requires_grad_(i == j) for j, t in enumerate(full)]
        (grad,) = torch.autograd.grad(ops.residual_step(*some)[0], some[i], push)
        torch.testing.assert_close(grad, all_four[i], rtol=1e-5, atol=1e-5)


def test_thread_count_changes_nothing() -> None:
    for batch, size in ((1, (16, 16)), (3, (16, 16)), (1, (65, 40))):
        given = [t.requires_grad_() for t in inputs(batch, 32, size, (5, 5))]
        results = []
        for count in (1, 2, 3):
            with threads(count):
                new, pooled = ops.residual_step(*given, next_size=3)
                grads = torch.autograd.grad(new.square().sum() + pooled.sum(), given)
                results.append([new, pooled, *grads])
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_unaligned_views() -> None:
    given = inputs(2, 16, (5, 5), (3, 3))
    shifted = [torch.empty(t.numel() + 1)[1:].view(t.shape).copy_(t) for t in given]
    for mine, same in zip(
        ops.residual_step(*shifted, next_size=2), ops.residual_step(*given, next_size=2), strict=True
    ):
        assert torch.equal(mine, same)


def test_nan_stays_where_it_is_used(each_isa: str) -> None:
    f_hat, embedding, weight, bias = inputs(1, 20, (9, 9), (9, 9))
    embedding[0, 3, 4, 4] = float("nan")
    f_hat[0, 5, 0, 8] = float("inf")
    new, _ = ops.residual_step(f_hat, embedding, weight, bias)
    expected = reference.residual_step(f_hat, embedding, weight, bias)[0]
    assert torch.equal(new.isnan(), expected.isnan())
    assert torch.equal(new.isinf(), expected.isinf())


def test_the_kernel_runs_when_the_backend_is_native(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    for name in ("residual_step", "residual_step_backward"):
        kernel = getattr(var_ext._C, name)
        monkeypatch.setattr(var_ext._C, name, lambda *a, n=name, k=kernel: (calls.append(n), k(*a)))
    given = [t.requires_grad_() for t in inputs(1, 2, (4, 4), (2, 2))]
    with backend.force("native"):
        ops.residual_step(*given)[0].sum().backward()
    assert calls == ["residual_step", "residual_step_backward"]


def test_the_kernel_checks_what_it_is_given() -> None:
    f_hat, embedding, weight, bias = inputs(1, 4, (6, 6), (2, 2))
    call = dict(f_hat=f_hat, embedding=embedding, phi_weight=weight, phi_bias=bias, out=f_hat.clone())
    for change, message in (
        (dict(f_hat=f_hat.double()), "f_hat must be float32, got float64"),
        (dict(f_hat=f_hat[0]), r"f_hat must have shape \(B, C, H, W\), got \(4, 6, 6\)"),
        (dict(embedding=embedding[:, :3]), r"embedding must have shape \(1, 4, H, W\), got \(1, 3, 2, 2\)"),
        (dict(embedding=embedding[:, :, :0]), "embedding must have at least one pixel"),
        (dict(phi_weight=weight.mT), "phi_weight must be contiguous"),
        (dict(phi_bias=bias[:3]), r"phi_bias must have shape \(4,\), got \(3,\)"),
        (dict(out=f_hat[:, :, :5]), r"out must have shape \(1, 4, 6, 6\), got \(1, 4, 5, 6\)"),
        (dict(out=f_hat[:, :1].expand(1, 4, 6, 6)), "out must not overlap itself"),
    ):
        views = {name: view(t) for name, t in {**call, **change}.items()}
        with pytest.raises(ValueError, match=f"residual_step: {message}"):
            _C.residual_step(**views, ratio=0.5, next=None)
    views = {name: view(call[name]) for name in ("embedding", "phi_weight")}
    nothing = dict(grad_embedding=None, grad_weight=None, grad_bias=None, scratch=None)
    for name, tensor, message in (
        ("grad_embedding", f_hat, r"grad_embedding must have shape \(1, 4, 2, 2\)"),
        ("grad_weight", weight.mT, "grad_weight must be contiguous"),
        ("grad_bias", bias.double(), "grad_bias must be float32"),
    ):
        with pytest.raises(ValueError, match=f"residual_step_backward: {message}"):
            _C.residual_step_backward(grad=view(f_hat), **views, ratio=0.5, **{**nothing, name: view(tensor)})


def test_registration_of_backward() -> None:
    f_hat, embedding, weight, _ = inputs(2, 3, (4, 4), (2, 2))
    for wanted in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(
            torch.ops.var_ext.residual_step_backward, (f_hat, embedding, weight, 0.5, *wanted)
        )


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
