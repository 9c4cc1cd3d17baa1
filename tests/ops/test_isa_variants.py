"""The compiled kernels below the ops: every variant that this processor runs, on awkward memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.threads import threads
from var_ext import _C, reference
from var_ext.ops._native import view

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
RESAMPLE = ["area_downsample", "bicubic_upsample"]
MODES: dict[str, dict[str, Any]] = {
    "area_downsample": {"mode": "area"},
    "bicubic_upsample": {"mode": "bicubic", "align_corners": False},
}
# (H, W) -> (h, w): scale pairs of the model, odd sizes, up and down, rows longer than a strip
SIZES = [((16, 16), (5, 5)), ((3, 3), (16, 16)), ((1, 1), (13, 16)), ((16, 13), (1, 7)), ((9, 9), (9, 9)),
         ((9, 9), (9, 4)), ((37, 61), (20, 70)), ((3, 700), (5, 300))]  # fmt: skip
# planes fewer than, as many as and not a multiple of the lanes of a vector
BATCHES = [(1, 1), (2, 3), (3, 16), (1, 37)]


@pytest.fixture(params=_C.cpu_info()["isa"], autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


def nearest(x: Tensor, codebook: Tensor, *, cosine: bool = False) -> Tensor:
    out = torch.full((x.shape[0],), -1)
    _C.nearest_code(view(x), view(codebook), view(out), cosine, None)
    return out


def resampled(name: str, x: Tensor, out: Tensor) -> Tensor:
    out.fill_(float("nan"))  # every element must be written
    getattr(_C, name)(view(x), view(out))
    return out


def exact(name: str, x: Tensor, size: tuple[int, ...]) -> Tensor:
    return F.interpolate(x.double(), size=size, **MODES[name])


def exact_backward(name: str, grad: Tensor, size: tuple[int, ...]) -> Tensor:
    x = torch.zeros(*grad.shape[:2], *size, dtype=torch.float64, requires_grad=True)
    return torch.autograd.grad(exact(name, x, grad.shape[2:]), x, grad.double())[0]


def assert_close(result: Tensor, expected: Tensor) -> None:
    # Half a unit of rounding for the result; sums add a few more, and positions in fp32 (as torch has them)
    # are off by up to W * eps pixels, which a kernel of slope below 2 passes on to the value.
    eps = torch.finfo(result.dtype).eps
    width = max(max(result.shape), 16)
    bound = {torch.float32: 4 * width, torch.float64: 4 * width}.get(result.dtype, 1) * eps
    largest = expected.abs().amax().clamp_min(1)
    assert ((result.double() - expected).abs().amax() / largest) <= bound


def unaligned(x: Tensor) -> Tensor:
    """The same values one element off every vector's alignment."""
    storage = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)
    return storage.copy_(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "unaligned": unaligned,
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "cropped": lambda x: F.pad(x, (3, 2, 1, 1))[:, :, 1:-1, 3:-2],
    "half of the channels": lambda x: torch.stack([x, x], dim=2).flatten(1, 2)[:, ::2],
    "channels last, some": lambda x: torch.cat([x, x[:, :1]], 1).permute(0, 2, 3, 1).contiguous()[..., :-1].permute(0, 3, 1, 2),  # noqa: E501
}  # fmt: skip


@pytest.mark.parametrize("name", RESAMPLE)
@pytest.mark.parametrize(("source", "target"), SIZES)
def test_resample_sizes(name: str, source: tuple[int, int], target: tuple[int, int]) -> None:
    for batch in BATCHES:
        x, grad = torch.randn(*batch, *source), torch.randn(*batch, *target)
        assert_close(resampled(name, x, torch.empty_like(grad)), exact(name, x, target))
        back = resampled(f"{name}_backward", grad, torch.empty_like(x))
        assert_close(back, exact_backward(name, grad, source))


@pytest.mark.parametrize("name", RESAMPLE)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_resample_layouts(name: str, dtype: torch.dtype, layout: str) -> None:
    """Inputs and outputs of any strides; forward and backward."""
    place = LAYOUTS[layout]
    x, grad = place(torch.randn(2, 33, 9, 7).to(dtype)), place(torch.randn(2, 33, 6, 11).to(dtype))
    assert_close(resampled(name, x, place(torch.empty_like(grad))), exact(name, x, (6, 11)))
    back = resampled(f"{name}_backward", grad, place(torch.empty_like(x)))
    assert_close(back, exact_backward(name, grad, (9, 7)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torchs_rounding(isa: str, dtype: torch.dtype) -> None:
    """Bit for bit what torch gives at the sizes of the model, wherever both sides multiply and add in one step."""
    fused = isa != "portable" and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    equal = []
    for shape in ((2, 32), (1, 5), (3, 1)):
        for size, target in [*((size, 16) for size in range(1, 17)), (24, 32)]:
            for layout in ("contiguous", "channels last"):
                x = LAYOUTS[layout](torch.randn(*shape, size, size, dtype=dtype))
                wide = resampled("bicubic_upsample", x, LAYOUTS[layout](x.new_empty(*shape, target, target)))
                equal.append(torch.equal(wide, F.interpolate(x, (target, target), mode="bicubic")))
        x = torch.randn(*shape, 16, 16, dtype=dtype)
        for size in range(2, 14):
            small = resampled("area_downsample", x, x.new_empty(*shape, size, size))
            assert torch.equal(small, F.interpolate(x, (size, size), mode="area")), size
    assert all(equal) or not fused


@pytest.mark.parametrize("name", RESAMPLE)
@pytest.mark.parametrize("dtype", FLOATS)
def test_same_size_is_a_copy(name: str, dtype: torch.dtype) -> None:
    x = torch.randn(2, 5, 6, 7).to(dtype)[:, :, ::2]
    for op in (name, f"{name}_backward"):
        assert torch.equal(resampled(op, x, torch.empty(2, 5, 3, 7, dtype=dtype)), x)


@pytest.mark.parametrize("name", RESAMPLE)
def test_resample_writes_only_its_view(name: str) -> None:
    whole = torch.full((2, 40, 9, 12), 7.0)
    out = whole[:, 2:39, 1:8, 3:11]
    resampled(name, torch.randn(2, 37, 4, 4), out)
    assert not out.isnan().any()
    out.fill_(7)
    assert (whole == 7).all()


@pytest.mark.parametrize("name", RESAMPLE)
def test_nan_stays_where_it_is_used(name: str) -> None:
    x = torch.randn(1, 20, 16, 16)
    x[0, 3, 2, 2] = float("nan")
    out = resampled(name, x, torch.empty(1, 20, 8, 8))
    assert torch.equal(out.isnan(), exact(name, x, (8, 8)).isnan())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_to_16_bits(dtype: torch.dtype) -> None:
    """Means of pairs: halfway cases, subnormals, overflow and special values round as torch rounds them."""
    bits = torch.randint(-(2**15), 2**15, (1, 4, 64, 128), generator=torch.Generator().manual_seed(0))
    x = bits.to(torch.int16).view(dtype)
    out = resampled("area_downsample", x, torch.empty(1, 4, 64, 64, dtype=dtype))
    expected = (x.float()[..., ::2] + x.float()[..., 1::2]) / 2
    # equal_nan: the payload of a NaN is free
    torch.testing.assert_close(out, expected.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize(("n", "v", "c"), [(1, 1, 1), (5, 7, 3), (13, 33, 31), (25, 64, 32), (3, 257, 70)])
def test_nearest_code_sizes(n: int, v: int, c: int, cosine: bool) -> None:
    """Rows and codes around multiples of every block size, channels around the vectors' widths."""
    codebook, x = torch.randn(v, c), torch.randn(n, c)
    layouts = [
        (x, codebook),
        (x.T.contiguous().T, codebook.T.contiguous().T),
        (unaligned(x), unaligned(codebook)),
        (torch.stack([x, x], 2).flatten(1)[:, ::2], torch.stack([codebook, codebook * 0], 1)[:, 0]),
    ]
    results = [nearest(*pair, cosine=cosine) for pair in layouts]
    for result in results[1:]:
        assert torch.equal(result, results[0])
    e, r = codebook.double(), x.double()
    score = -F.normalize(r, dim=1) @ F.normalize(e, dim=1).T if cosine else e.square().sum(1) - 2 * r @ e.T
    chosen = score.gather(1, results[0][:, None])[:, 0]
    # fp32 sums of c products err by at most c * eps relative to |x| |e|, here about c each
    assert (chosen - score.amin(1) <= (2 if cosine else 4 * c) * c * torch.finfo(torch.float32).eps).all()


@pytest.mark.parametrize("cosine", [False, True])
def test_nearest_code_ties(cosine: bool) -> None:
    codebook = torch.randn(4, 32).repeat(60, 1)
    assert torch.equal(nearest(codebook, codebook, cosine=cosine), torch.arange(240) % 4)


@pytest.mark.parametrize("cosine", [False, True])
def test_nearest_code_special_values(cosine: bool) -> None:
    """The first score that is NaN wins, as in torch; so it is with infinities and the ends of the range."""
    x, codebook = torch.randn(8, 5), torch.randn(50, 5)
    x[0, 1], x[1, 1], x[2], x[3] = float("nan"), float("inf"), 1e30, 1e-30
    x[4] = 0

    def check(x: Tensor, codebook: Tensor) -> None:
        if cosine:
            expected = (F.normalize(x, dim=1) @ F.normalize(codebook, dim=1).T).argmax(1)
        else:
            expected = (codebook.square().sum(1) - 2 * x @ codebook.T).argmin(1)
        assert torch.equal(nearest(x, codebook, cosine=cosine), expected)

    check(x, codebook)
    codebook[17, 2], codebook[30, 0] = float("nan"), float("nan")
    check(x, codebook)
    codebook[9, 4] = float("inf")
    check(x[5:], codebook)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantize_rows_sizes(dtype: torch.dtype) -> None:
    """Channels around the vectors' widths and their steps of four; not a byte beside its own is written."""
    for channels in (*range(1, 70), 127, 128, 129, 200, 256):
        x = unaligned(torch.randn(3, channels).to(dtype))
        memory, scale = torch.full((3 * channels + 2,), 7, dtype=torch.uint8), torch.full((5,), 7.0)
        _C.quantize_rows(view(x), view(memory[1:-1].view(3, channels)), view(scale[1:-1]))
        q, expected = reference.quantize_rows(x)
        assert torch.equal(memory[1:-1].view(3, channels), q)
        assert torch.equal(scale[1:-1, None], expected)
        assert memory[0] == memory[-1] == scale[0] == scale[-1] == 7


def test_nothing_in_nothing_out() -> None:
    assert nearest(torch.empty(0, 4), torch.randn(3, 4)).shape == (0,)
    for name in RESAMPLE:
        for shape in ((0, 3), (2, 0)):
            resampled(name, torch.empty(*shape, 4, 4), torch.empty(*shape, 2, 2))
            resampled(f"{name}_backward", torch.empty(*shape, 2, 2), torch.empty(*shape, 4, 4))


def test_thread_count_changes_no_bit() -> None:
    """Sizes beyond the grain, so that two threads really share the work."""
    codebook, rows, x = torch.randn(512, 32), torch.randn(601, 32), torch.randn(5, 33, 37, 41)

    def run() -> list[Tensor]:
        results = [nearest(rows, codebook), nearest(rows, codebook, cosine=True)]
        for name in RESAMPLE:
            results.append(resampled(name, x, torch.empty(5, 33, 23, 64)))
            results.append(resampled(f"{name}_backward", x, torch.empty(5, 33, 64, 23)))
        return results

    runs = []
    for count in (1, 2, 3):
        with threads(count):
            runs.append(run())
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("x", "codebook", "message"),
    [
        (zeros(2, 32), zeros(4096, 31), r"codebook must have shape \(V, 32\), got \(4096, 31\)"),
        (zeros(2, 3, 4), zeros(3, 4), r"x must have shape \(N, C\), got \(2, 3, 4\)"),
        (zeros(2, 0), zeros(3, 0), r"x must have at least one channel, got shape \(2, 0\)"),
        (zeros(2, 4), zeros(0, 4), r"codebook must have 1 to .* entries, got shape \(0, 4\)"),
        (zeros(2, 4).half(), zeros(3, 4), "x must be float32, got float16"),
        (zeros(2, 4), zeros(3, 4).double(), "codebook must be float32, got float64"),
        (zeros(3, 4), zeros(3, 4), r"out must have shape \(3,\), got \(2,\)"),
    ],
)
def test_nearest_code_refuses(x: Tensor, codebook: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"^nearest_code: {message}"):
        _C.nearest_code(view(x), view(codebook), view(zeros(2, dtype=torch.int64)), False, None)


def test_nearest_code_refuses_its_output() -> None:
    x, one = zeros(2, 4), zeros(1, dtype=torch.int64)
    with pytest.raises(
        ValueError, match=r"out must not overlap itself, got shape \(2,\) with strides \(0,\)"
    ):
        _C.nearest_code(view(x), view(x), view(one.expand(2)), False, None)
    with pytest.raises(ValueError, match="out must be int64, got float32"):
        _C.nearest_code(view(x), view(x), view(zeros(2)), False, None)


@pytest.mark.parametrize("name", RESAMPLE)
@pytest.mark.parametrize(
    ("x", "out", "message"),
    [
        (zeros(3, 4, 4), zeros(3, 2, 2), r"x must have shape \(B, C, H, W\), got \(3, 4, 4\)"),
        (zeros(1, 2, 4, 4), zeros(1, 3, 8, 8), r"out must have shape \(1, 2, h, w\), got \(1, 3, 8, 8\)"),
        (zeros(1, 2, 0, 4), zeros(1, 2, 8, 8), r"x must have at least one pixel, got shape \(1, 2, 0, 4\)"),
        (zeros(1, 2, 4, 4), zeros(1, 2, 2, 2).double(), "out must be float32, got float64"),
        (zeros(1, 2, 4, 4).long(), zeros(1, 2, 2, 2), "x must be one of float32, .*, got int64"),
        (
            zeros(1, 2, 4, 4),
            zeros(1).expand(1, 2, 2, 2),
            r"out must not overlap itself, got shape \(1, 2, 2, 2\)",
        ),
    ],
)
def test_resample_refuses(name: str, x: Tensor, out: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: {message}"):
        getattr(_C, name)(view(x), view(out))
    backward = message.replace("out must", "grad_in must").replace("x must", "grad_out must")
    with pytest.raises(ValueError, match=f"^{name}_backward: {backward}"):
        getattr(_C, f"{name}_backward")(view(x), view(out))


@pytest.mark.parametrize(
    ("address", "shape", "strides", "message"),
    [
        (64, [2, 3], [1], r"one entry for each of the 2 dimensions of shape \(2, 3\), got \(1,\)"),
        (64, [2, -3], [3, 1], r"sizes must not be negative, got \(2, -3\)"),
        (0, [2], [1], r"address must not be 0 for a tensor of shape \(2,\)"),
        (66, [2], [1], "address must be a multiple of the float32 size, 4, got 66"),
    ],
)
def test_views_are_checked(address: int, shape: list[int], strides: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=f"TensorView: .*{message}"):
        _C.TensorView(address, shape, strides, _C.DType.float32)


def test_dtypes_without_a_kernel() -> None:
    with pytest.raises(TypeError, match=r"native kernels take tensors of dtype float32.*got torch\.int32"):
        view(zeros(2, dtype=torch.int32))
