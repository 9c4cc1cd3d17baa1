from __future__ import annotations

import pytest
import torch
from torch import Tensor

import var_ext
from tests.threads import threads
from var_ext import backend, ops

SIZES = [
    (1, 1, 1),
    (7, 33, 5),
    (129, 151, 32),
    (64, 4096, 32),
    (3, 17, 129),
    (151, 2, 8),
]  # vectors, codes, channels


def distances(x: Tensor, codebook: Tensor, cosine: bool) -> Tensor:
    """(N, V) float64: squared L2, or minus the cosine."""
    x, codebook = x.double(), codebook.double()
    if cosine:
        return -(x @ codebook.T) / (x.norm(dim=-1, keepdim=True) * codebook.norm(dim=-1)).clamp_min(1e-12)
    return (x[:, None] - codebook[None]).square().sum(dim=-1)


def assert_nearest(result: Tensor, x: Tensor, codebook: Tensor, cosine: bool = False) -> None:
    """No code is nearer than the one returned by more than fp32 rounding; mostly it is the very nearest."""
    exact = distances(x, codebook, cosine)
    nearest = exact.min(dim=-1)
    chosen = exact.gather(-1, result[:, None])[:, 0]
    # |x|^2 and |e|^2 cancel in fp32: the error is relative to them, not to the distance
    scale = 1.0 if cosine else x.double().square().sum(-1).amax() + codebook.double().square().sum(-1).amax()
    assert (chosen - nearest.values <= 4e-7 * scale).all()
    assert (result == nearest.indices).double().mean() > 0.99


@pytest.mark.parametrize(("vectors", "codes", "channels"), SIZES)
@pytest.mark.parametrize("cosine", [False, True])
def test_against_float64(either_backend: str, vectors: int, codes: int, channels: int, cosine: bool) -> None:
    x, codebook = torch.randn(vectors, channels), torch.randn(codes, channels)
    result = ops.nearest_code(x, codebook, cosine=cosine)
    assert result.dtype == torch.int64
    assert_nearest(result, x, codebook, cosine)


@pytest.mark.parametrize("cosine", [False, True])
def test_a_code_finds_itself(either_backend: str, cosine: bool) -> None:
    codebook = torch.randn(151, 32)
    assert torch.equal(ops.nearest_code(codebook, codebook, cosine=cosine), torch.arange(151))


@pytest.mark.parametrize("cosine", [False, True])
def test_ties_go_to_the_lowest_index(either_backend: str, cosine: bool) -> None:
    codebook = torch.randn(8, 16).repeat(9, 1)  # each code nine times, far enough apart for any vector width
    assert torch.equal(ops.nearest_code(codebook, codebook, cosine=cosine), torch.arange(8).repeat(9))


def test_all_equally_near(either_backend: str) -> None:
    codebook = torch.eye(40)
    assert ops.nearest_code(torch.zeros(3, 40), codebook).tolist() == [0, 0, 0]
    assert ops.nearest_code(torch.zeros(3, 40), codebook, cosine=True).tolist() == [0, 0, 0]


def test_cosine_ignores_length(either_backend: str) -> None:
    codebook = torch.tensor([[10.0, 0.0], [0.0, 0.1]])
    x = torch.tensor([[1e-3, 2e-3], [50.0, 49.0]])
    assert ops.nearest_code(x, codebook, cosine=True).tolist() == [1, 0]


def test_any_leading_shape(either_backend: str) -> None:
    x, codebook = torch.randn(2, 3, 4, 8), torch.randn(33, 8)
    flat = ops.nearest_code(x.view(-1, 8), codebook)
    assert torch.equal(ops.nearest_code(x, codebook), flat.view(2, 3, 4))
    assert ops.nearest_code(x[0, 0, 0], codebook) == flat[0]
    assert ops.nearest_code(x[:0], codebook).shape == (0, 3, 4)


def test_strided_views(either_backend: str) -> None:
    x = torch.randn(2, 8, 5, 6).permute(0, 2, 3, 1)  # channels first in memory
    codebook = torch.randn(16, 33).T[:, ::2]  # (33, 8)
    assert_nearest(ops.nearest_code(x, codebook).flatten(), x.reshape(-1, 8), codebook)
    rows = torch.randn(14, 8)[::2]
    assert_nearest(ops.nearest_code(rows, codebook), rows, codebook)


def test_thread_count_changes_nothing() -> None:
    x, codebook = torch.randn(301, 32), torch.randn(4096, 32)
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(ops.nearest_code(x, codebook))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def vectors_of(kind: str, vectors: int, codes: int, channels: int) -> tuple[Tensor, Tensor]:
    """x and codebooks that are easy, hard or hopeless for a search that first looks in low precision."""
    x, codebook = torch.randn(vectors, channels), torch.randn(codes, channels)
    pick = torch.randint(codes, (vectors,))
    match kind:
        case "clustered":
            codebook = torch.randn(9, channels)[torch.randint(9, (codes,))] + 0.01 * codebook
        case "duplicates":
            codebook = codebook[torch.randint(codes // 3, (codes,))]
            x = codebook[pick] + 0.1 * x
        case "equal in bf16":
            codebook = 1 + 1e-4 * codebook
            x = codebook[pick]
        case "half way":
            x = (codebook[pick] + codebook[pick.roll(1)]) / 2
        case "tiny":
            x, codebook = x * 1e-20, codebook * 1e-20
        case "all underflows":
            x, codebook = x * 1e-25, codebook * 1e-25
        case "huge":
            x, codebook = x * 1e16, codebook * 1e17
        case "beyond bf16":
            x, codebook = x.sign() * 3.4e38, codebook * 1e-10
        case "all lengths":
            x, codebook = x * torch.logspace(-8, 8, vectors)[:, None], codebook * torch.rand(codes, 1) * 10
        case "one long code":
            codebook[codes // 2] *= 1e4
        case "some rows are hopeless":
            x[::29] = 0
            codebook = torch.nn.functional.normalize(codebook, dim=-1)
        case "NaN and infinity":
            x[3, 0], x[40, 1], codebook[17, 2] = torch.nan, torch.inf, torch.nan if vectors % 2 else 0
    return x, codebook


KINDS = [
    "Gaussian", "clustered", "duplicates", "equal in bf16", "half way", "tiny", "all underflows", "huge",
    "beyond bf16", "all lengths", "one long code", "some rows are hopeless", "NaN and infinity",
]  # fmt: skip


@pytest.mark.skipif("avx512_bf16" not in var_ext._C.cpu_info()["isa"], reason="needs AVX-512-bf16")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cosine", [False, True])
def test_the_filter_in_bf16_changes_no_token(kind: str, cosine: bool) -> None:
    before = var_ext._C.isa()
    for sizes in ((301, 1000, 32), (48, 256, 8), (100, 4096, 33), (61, 333, 129)):
        x, codebook = vectors_of(kind, *sizes)
        tokens = []
        for isa in ("avx512", "avx512_bf16"):
            var_ext._C.set_isa(isa)
            tokens.append(ops.nearest_code(x, codebook, cosine=cosine))
        var_ext._C.set_isa(before)
        assert torch.equal(*tokens), sizes


def test_there_is_no_gradient(either_backend: str) -> None:
    assert not ops.nearest_code(torch.randn(2, 4, requires_grad=True), torch.randn(3, 4)).requires_grad


def test_the_kernel_runs_when_the_backend_is_native(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    kernel = var_ext._C.nearest_code
    monkeypatch.setattr(var_ext._C, "nearest_code", lambda *given: (calls.append(1), kernel(*given)))
    for choice in backend.CHOICES:
        with backend.force(choice):
            ops.nearest_code(torch.randn(2, 4), torch.randn(3, 4))
        assert len(calls) == 1, choice


@pytest.mark.parametrize("cosine", [False, True])
def test_registration(cosine: bool) -> None:
    torch.library.opcheck(torch.ops.var_ext.nearest_code, (torch.randn(7, 4), torch.randn(9, 4), cosine))


@pytest.mark.parametrize(
    ("x", "codebook", "error", "message"),
    [
        (torch.zeros(2, 4), torch.zeros(4), ValueError, r"codebook must have shape \(V, C\).*got \(4,\)"),
        (
            torch.zeros(2, 4),
            torch.zeros(3, 5),
            ValueError,
            r"x must have shape \(..., C\) = \(..., 5\), got \(2, 4\)",
        ),
        (torch.zeros(()), torch.zeros(3, 5), ValueError, r"x must have shape.*got \(\)"),
        (torch.zeros(2, 4), torch.zeros(0, 4), ValueError, r"codebook must hold a code, got \(0, 4\)"),
        (torch.zeros(2, 4).double(), torch.zeros(3, 4), TypeError, "x must be float32, got float64"),
        (torch.zeros(2, 4), torch.zeros(3, 4).half(), TypeError, "one dtype, got.*codebook float16"),
        (
            torch.zeros(2, 4),
            torch.zeros(3, 4, device="meta"),
            ValueError,
            "one device, got.*codebook on meta",
        ),
        (torch.zeros(2, 4), [[0.0] * 4], TypeError, "codebook must be a tensor.*got list"),
        ([0.0] * 4, torch.zeros(3, 4), TypeError, "x must be a tensor.*got list"),
    ],
)
def test_bad_input(
    either_backend: str, x: Tensor, codebook: Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"nearest_code: .*{message}"):
        ops.nearest_code(x, codebook)
