from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from tests.cuda.conftest import Gpu
from tests.emulator import emulation
from tests.ops.test_nearest_code import KINDS, SIZES, assert_nearest, vectors_of
from var_ext import _C, ops
from var_ext.ops._native import kernels, maybe_view, view

# vectors, codes, channels: the published codebook's size, one code, few, many; tiles and blocks that end early
CASES = [
    *SIZES,
    (70, 1, 8),
    (65, 5, 24),
    (130, 129, 40),
    (33, 4096, 8),
    (17, 4096, 40),
    (9, 16384, 24),
    (64, 256, 32),
    (1, 16384, 32),
]


@pytest.fixture(params=["plain", "filter"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Has each of the two searches taken, whatever the sizes."""
    chosen = partial(_C.nearest_code_scratch, filter=request.param == "filter")
    monkeypatch.setattr(_C, "nearest_code_scratch", chosen)
    return str(request.param)


def on_cpu(x: Tensor, codebook: Tensor, cosine: bool = False) -> Tensor:
    """What the CPU kernel finds."""
    flat = x.reshape(-1, x.shape[-1])
    out = torch.empty(flat.shape[0], dtype=torch.int64)
    _C.nearest_code(view(flat), view(codebook), view(out), cosine, None)
    return out.view(x.shape[:-1])


def same_as_on_the_cpu() -> bool:
    """The portable variant multiplies and adds in two roundings, where processors with FMA, as GPUs, have one."""
    return _C.isa() != "portable"


@pytest.mark.parametrize(("vectors", "codes", "channels"), CASES)
@pytest.mark.parametrize("cosine", [False, True])
def test_the_tokens_of_the_cpu(
    gpu: Gpu, path: str, vectors: int, codes: int, channels: int, cosine: bool
) -> None:
    channels = min(channels, 64) if path == "filter" else channels
    x, codebook = torch.randn(vectors, channels), torch.randn(codes, channels)
    result = ops.nearest_code(gpu(x), gpu(codebook), cosine=cosine).cpu()
    assert result.dtype == torch.int64
    assert_nearest(result, x, codebook, cosine)
    if same_as_on_the_cpu():
        assert torch.equal(result, on_cpu(x, codebook, cosine))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cosine", [False, True])
def test_hard_vectors(gpu: Gpu, path: str, kind: str, cosine: bool) -> None:
    """Near-ties that rounding decides, underflow, overflow, NaN: the same tokens still."""
    for sizes in ((301, 400, 32), (61, 333, 129 if path == "plain" else 64)):
        x, codebook = vectors_of(kind, *sizes)
        result = ops.nearest_code(gpu(x), gpu(codebook), cosine=cosine).cpu()
        if same_as_on_the_cpu():
            assert torch.equal(result, on_cpu(x, codebook, cosine)), sizes


@pytest.mark.parametrize("rounded", ["codes", "vectors"])
def test_roundings_that_add_up(gpu: Gpu, path: str, rounded: str) -> None:
    """In bfloat16 each channel of the nearest code loses half a unit and of another gains it: nearly the bound."""
    below, above, unit = 1 + 2**-8 - 2**-16, 1 + 2**-8 + 2**-16, 2**-7
    x, codebook = torch.full((40, 32), 4.0), torch.zeros(128, 32)
    if rounded == "codes":
        codebook[70], codebook[100] = below, above
        codebook[100, 0] = 1  # less than the others have more: the rounded code is nearer still
    else:
        x[:, :16], x[:, 16:], x[:, 0] = below, above, 1 + unit
        codebook[:] = -1  # far away
        codebook[70, :16] = codebook[100, 16:] = 1
    exact, rough = (
        x[0].to(t).double() @ codebook.to(t).double().T - codebook.double().square().sum(1) / 2
        for t in (torch.float64, torch.bfloat16)
    )
    assert (exact.argmax(), rough.argmax()) == (70, 100)
    assert (ops.nearest_code(gpu(x), gpu(codebook)) == 70).all()


@pytest.mark.parametrize("cosine", [False, True])
def test_nan_in_vectors_and_codes(gpu: Gpu, path: str, cosine: bool) -> None:
    """The first code whose score is NaN, as torch.argmin has it."""
    x, codebook = torch.randn(70, 8), torch.randn(300, 8)
    x[3, 5] = torch.nan
    x[69, 0] = torch.inf
    expected = on_cpu(x, codebook, cosine)
    assert expected[3] == 0
    assert torch.equal(ops.nearest_code(gpu(x), gpu(codebook), cosine=cosine).cpu(), expected)
    codebook[211, 1] = torch.nan
    codebook[250, 1] = torch.nan
    expected = on_cpu(x, codebook, cosine)
    assert expected[0] == 211
    assert torch.equal(ops.nearest_code(gpu(x), gpu(codebook), cosine=cosine).cpu(), expected)


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("codes", [8, 40])
def test_ties_go_to_the_lowest_index(gpu: Gpu, path: str, cosine: bool, codes: int) -> None:
    """Equal codes in one thread, in lanes, in warps, in tiles and in splits of the codebook."""
    codebook = torch.randn(codes, 16).repeat(600 // codes, 1)
    x = codebook[:50]
    assert torch.equal(ops.nearest_code(gpu(x), gpu(codebook), cosine=cosine).cpu(), torch.arange(50) % codes)
    assert ops.nearest_code(gpu(torch.zeros(3, 16)), gpu(torch.eye(16)), cosine=cosine).tolist() == [0, 0, 0]


def test_strided_views(gpu: Gpu, path: str) -> None:
    x = torch.randn(2, 8, 5, 6).permute(0, 2, 3, 1)  # channels first in memory
    codebook = torch.randn(16, 33).T[:, ::2]  # (33, 8)
    result = ops.nearest_code(gpu(x), gpu(codebook)).cpu()
    assert torch.equal(result, ops.nearest_code(gpu(x.contiguous()), gpu(codebook.contiguous())).cpu())
    assert_nearest(result.flatten(), x.reshape(-1, 8), codebook)
    rows, out = torch.randn(14, 9)[::2, 1:], torch.zeros(7, 2, dtype=torch.int64)
    memory = gpu(torch.empty(_C.nearest_code_scratch(7, 33, 8)))
    placed = gpu(out)
    kernels(placed).nearest_code(
        view(gpu(rows)), view(gpu(codebook)), view(placed[:, 1]), False, view(memory)
    )
    assert torch.equal(placed[:, 1].cpu(), ops.nearest_code(gpu(rows.contiguous()), gpu(codebook)).cpu())
    assert not placed[:, 0].any()


def test_nothing_to_find(gpu: Gpu, path: str) -> None:
    assert ops.nearest_code(gpu(torch.zeros(0, 3, 8)), gpu(torch.zeros(5, 8))).shape == (0, 3)


def test_the_order_of_threads_changes_nothing(gpu: Gpu, path: str) -> None:
    x, codebook = vectors_of("duplicates", 70, 700, 32)
    results = []
    for seed in range(3):
        if gpu.level == "emulated":
            emulation.emulator().seed(seed)
        results.append(ops.nearest_code(gpu(x), gpu(codebook)))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("channels", [8, 32, 40, 41])
def test_no_bank_conflicts(traced: Gpu, path: str, channels: int) -> None:
    ops.nearest_code(traced(torch.randn(70, channels)), traced(torch.randn(300, channels)))
    assert traced.conflicts() == []


@pytest.mark.parametrize(
    ("vectors", "codes", "channels", "filters"),
    [
        (2048, 4096, 32, True),
        (2047, 4096, 32, False),
        (512, 16384, 64, True),
        (511, 16385, 64, False),
        (20000, 512, 17, True),
        (20000, 511, 17, False),
        (4096, 4096, 16, False),
        (4096, 4096, 65, False),
    ],
)
def test_the_search_that_sizes_choose(vectors: int, codes: int, channels: int, filters: bool) -> None:
    sizes = vectors, codes, channels
    assert (_C.nearest_code_scratch(*sizes) > _C.nearest_code_scratch(*sizes, filter=False)) == filters


def test_a_filter_for_too_many_channels() -> None:
    with pytest.raises(ValueError, match=r"a filter takes at most 2\^26 codes of 64 channels, got 8 of 65"):
        _C.nearest_code_scratch(7, 8, 65, filter=True)


def test_the_kernel_refuses(gpu: Gpu) -> None:
    x, codebook, out = gpu(torch.zeros(2, 8)), gpu(torch.zeros(3, 8)), gpu(torch.zeros(2, dtype=torch.int64))
    size = _C.nearest_code_scratch(2, 3, 8)
    for memory, message in (
        (None, rf"scratch must have shape \({size},\) on CUDA, got none"),
        (gpu(torch.zeros(size - 1)), rf"scratch must have shape \({size},\), got \({size - 1},\)"),
        (gpu(torch.zeros(size).double()), "scratch must be float32, got float64"),
    ):
        with pytest.raises(ValueError, match=f"nearest_code: {message}"):
            kernels(x).nearest_code(view(x), view(codebook), view(out), False, maybe_view(memory))
    many = _C.TensorView(x.data_ptr(), (2**31, 1), (0, 1), _C.DType.float32)
    found = _C.TensorView(out.data_ptr(), (2**31,), (1,), _C.DType.int64)
    one = _C.TensorView(codebook.data_ptr(), (1, 1), (1, 1), _C.DType.float32)
    with pytest.raises(
        ValueError, match=r"nearest_code: N and C must be below 2\^31 on CUDA, got 2147483648"
    ):
        kernels(x).nearest_code(many, one, found, False, None)
