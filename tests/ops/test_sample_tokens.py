from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops import oracle
from tests.threads import threads
from var_ext import _C, backend, ops
from var_ext.ops._native import view
from var_ext.reference.sample_tokens import philox4x32

# Known answers of Random123 1.09 (kat_vectors): counter, key, result of philox4x32-10.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
# Upper 1e-6 quantile of chi-square for 1 to 15 degrees of freedom: a right sampler fails one seed in 10^6.
# The seeds below are fixed, so the outcome is the same in every run.
CHI_SQUARE = [
    23.93,
    27.63,
    30.66,
    33.38,
    35.89,
    38.26,
    40.52,
    42.70,
    44.81,
    46.86,
    48.87,
    50.83,
    52.75,
    54.64,
    56.49,
]


def words(text: str) -> tuple[int, ...]:
    return tuple(int(word, 16) for word in text.split())


def chi_square(tokens: Tensor, probabilities: Tensor) -> None:
    """The frequencies of the tokens fit the probabilities; what has none is never drawn."""
    counts = torch.bincount(tokens.flatten(), minlength=len(probabilities)).double()
    possible = probabilities > 0
    assert not counts[~possible].any()
    expected = probabilities[possible].double() * tokens.numel()
    assert expected.min() >= 5  # below that the statistic is not chi-square
    statistic = ((counts[possible] - expected).square() / expected).sum().item()
    limit = CHI_SQUARE[int(possible.sum()) - 2]
    assert statistic < limit, f"chi-square {statistic:.1f}, at most {limit} at level 1e-6"


def kept(logits: list[float], top_k: int, top_p: float) -> list[float]:
    """Probabilities after the published filters, one token at a time in Python floats; no ties."""
    order = sorted(range(len(logits)), key=lambda i: logits[i])
    order = order[len(order) - top_k :] if top_k else order
    weights = {i: math.exp(logits[i]) for i in order}
    total, below = sum(weights.values()), 0.0
    survivors = []
    for i in order:
        below += weights[i] / total
        if not top_p or below > 1 - top_p or i == order[-1]:
            survivors.append(i)
    total = sum(weights[i] for i in survivors)
    return [weights[i] / total if i in survivors else 0.0 for i in range(len(logits))]


def exactly_kept(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """The filters on (N, V) float64, ties included; -inf where a token is dropped."""
    if 0 < top_k < logits.shape[1]:
        logits = logits.masked_fill(logits < logits.sort(dim=1).values[:, -top_k, None], -torch.inf)
    if top_p > 0:
        probabilities = logits.softmax(dim=1)
        above = torch.stack([(p * (p > p[:, None])).sum(dim=1) for p in probabilities])  # (N, V)
        logits = logits.masked_fill(above >= top_p, -torch.inf)
    return logits


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_known_answers(counter: str, key: str, answer: str) -> None:
    got = philox4x32(words(counter), words(key))  # type: ignore[arg-type]
    assert tuple(int(word) for word in got) == words(answer)
    assert oracle.philox4x32(words(counter), words(key)) == words(answer)  # the oracle below is right as well


@pytest.mark.parametrize("seed", [0, 1, 2**40 + 3, -1, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("scale_index", [0, 9])
def test_each_draw_inverts_the_distribution(either_backend: str, seed: int, scale_index: int) -> None:
    # key = seed, counter = (position, scale): a contract between all kernels, so it is spelt out here
    logits = torch.randn(1, 151, 17)
    tokens = ops.sample_tokens(logits, torch.tensor([seed]), scale_index=scale_index)
    key = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    cumulative = logits.double().softmax(dim=-1).cumsum(dim=-1)[0]  # (L, V)
    for position in range(151):
        u = (oracle.philox4x32((position, scale_index, 0, 0), key)[0] + 0.5) / 2**32
        assert tokens[0, position] == int((cumulative[position] <= u).sum()), position


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 0.0), (5, 0.0), (0, 0.8), (12, 0.9), (3, 0.999), (1, 0.0), (16, 1.0)]
)
@pytest.mark.parametrize("cfg", [None, 1.5])
def test_frequencies(either_backend: str, top_k: int, top_p: float, cfg: float | None) -> None:
    logits = torch.randn(2, 1, 16) * 0.4  # mild, so that each code has its share of the draws
    mixed = logits[0, 0] if cfg is None else 2.5 * logits[0, 0] - 1.5 * logits[1, 0]
    given = (logits[:1] if cfg is None else logits).expand(-1, 40_000, -1)
    tokens = ops.sample_tokens(
        given, torch.tensor([7]), scale_index=3, cfg=cfg, top_k=top_k, top_p=top_p
    )  # (1, 40000)
    probabilities = torch.tensor(kept(mixed.tolist(), top_k, top_p))
    if (probabilities > 0).sum() == 1:
        assert (tokens == probabilities.argmax()).all()
        return
    chi_square(tokens, probabilities)


def test_frequencies_over_seeds(either_backend: str) -> None:
    logits = torch.randn(1, 2, 8)
    tokens = ops.sample_tokens(logits.expand(20_000, -1, -1), torch.arange(20_000), scale_index=0)
    for position in range(2):
        chi_square(tokens[:, position], logits[0, position].softmax(dim=-1))


def test_positions_scales_and_seeds_are_independent(either_backend: str) -> None:
    # the pair (draw of one stream, draw of its neighbour) is uniform over 4 x 4 cells
    flat = torch.zeros(2, 20_000, 4)
    first, second = ops.sample_tokens(flat, torch.tensor([5, 6]), scale_index=1)
    other = ops.sample_tokens(flat[:1], torch.tensor([5]), scale_index=2)[0]
    for a, b in ((first, second), (first, other), (first[:-1], first[1:])):
        chi_square(4 * a + b, torch.full((16,), 1 / 16))


def test_ties_with_the_kth_value_are_kept(either_backend: str) -> None:
    logits = torch.tensor([3.0, 2.0, 2.0, 1.0, 0.0]).expand(1, 5_000, 5)
    tokens = ops.sample_tokens(logits, torch.tensor([0]), scale_index=0, top_k=2)
    chi_square(tokens, torch.tensor([1.0, math.exp(-1), math.exp(-1), 0.0, 0.0]) / (1 + 2 * math.exp(-1)))


@pytest.mark.parametrize(("top_p", "equals_stay"), [(0.9, True), (0.84, True), (0.83, False)])
def test_equal_values_at_the_border_of_top_p(either_backend: str, top_p: float, equals_stay: bool) -> None:
    # each of the four has 0.0415 of the mass: one by one, 0.9 would drop two of them and 0.84 three
    logits = torch.tensor([1.0, 4.0, 1.0, 1.0, 1.0])
    tokens = ops.sample_tokens(logits.expand(1, 5_000, 5), torch.tensor([0]), scale_index=0, top_p=top_p)
    if equals_stay:
        chi_square(tokens, logits.softmax(dim=-1))
    else:
        assert (tokens == 1).all()


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.0), (200, 0.0), (0, 0.9), (200, 0.9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # bfloat16: many ties
def test_frequencies_over_a_long_row(each_isa: str, top_k: int, top_p: float, dtype: torch.dtype) -> None:
    row = torch.randn(1000).to(dtype)
    tokens = ops.sample_tokens(
        row.expand(1, 10_000, 1000), torch.tensor([5]), scale_index=0, top_k=top_k, top_p=top_p
    )
    probabilities = exactly_kept(row[None].double(), top_k, top_p)[0].softmax(dim=-1)
    assert probabilities[tokens].all()
    cells = torch.arange(1000) % 16
    chi_square(cells[tokens], torch.zeros(16, dtype=torch.float64).index_add(0, cells, probabilities))


def test_all_equal(either_backend: str) -> None:
    tokens = ops.sample_tokens(torch.zeros(1, 5_000, 8), torch.tensor([0]), scale_index=0, top_k=3)
    chi_square(tokens, torch.full((8,), 1 / 8))  # all are ties with the third


def test_all_mass_on_one_token(either_backend: str) -> None:
    logits = torch.zeros(1, 1_000, 33)
    logits[..., 20] = 200.0
    for filters in (dict(), dict(top_k=5), dict(top_p=0.5), dict(top_k=5, top_p=0.96)):
        assert (ops.sample_tokens(logits, torch.tensor([3]), scale_index=0, **filters) == 20).all()


@pytest.mark.parametrize("cfg", [None, 0.0, 4.0])
def test_top_1_is_the_argmax(either_backend: str, cfg: float | None) -> None:
    logits = torch.randn(4, 129, 151)
    seeds = torch.arange(4 if cfg is None else 2)
    tokens = ops.sample_tokens(logits, seeds, scale_index=1, cfg=cfg, top_k=1)
    mixed = logits if cfg is None else (1 + cfg) * logits[:2] - cfg * logits[2:]
    assert torch.equal(tokens, mixed.argmax(dim=-1))


def test_a_tiny_top_p_keeps_the_largest(either_backend: str) -> None:
    logits = torch.randn(1, 100, 17)
    tokens = ops.sample_tokens(logits, torch.tensor([1]), scale_index=0, top_p=1e-6)
    assert torch.equal(tokens, logits.argmax(dim=-1))


def test_minus_infinity_is_never_drawn(either_backend: str) -> None:
    row = torch.tensor([-torch.inf, 1.0, -torch.inf, 0.0, 0.5, -torch.inf])
    for filters in (dict(), dict(top_k=5), dict(top_p=0.999)):
        tokens = ops.sample_tokens(row.expand(1, 5_000, 6), torch.tensor([2]), scale_index=0, **filters)
        chi_square(tokens, row.softmax(dim=-1))


def test_a_masked_code_is_never_drawn_under_guidance(either_backend: str) -> None:
    logits = torch.zeros(2 * 8, 50, 6)
    logits[:, :, 2] = -torch.inf  # in both halves, where guidance alone gives NaN
    logits[:8, :, 4] = -torch.inf  # in the conditional half alone
    drawn = ops.sample_tokens(logits, torch.arange(8), scale_index=0, cfg=1.5)
    assert set(drawn.unique().tolist()) == {0, 1, 3, 5}


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_is_no_distribution(either_backend: str, bad: float) -> None:
    logits = torch.zeros(2, 3, 5)
    logits[1, 2, 4] = bad
    with pytest.raises(
        ValueError, match="sample_tokens: each row of logits needs a finite maximum and no NaN"
    ):
        ops.sample_tokens(logits, torch.tensor([0, 1]), scale_index=0)


def test_a_row_of_nothing(either_backend: str) -> None:
    logits = torch.zeros(1, 3, 5)
    logits[0, 1] = -torch.inf
    with pytest.raises(ValueError, match="sample_tokens: each row of logits needs a finite maximum"):
        ops.sample_tokens(logits, torch.tensor([0]), scale_index=0, top_k=2, top_p=0.9)


@pytest.mark.parametrize("cfg", [None, 1.5])
def test_an_image_does_not_depend_on_its_batch(either_backend: str, cfg: float | None) -> None:
    cond, uncond = torch.randn(2, 7, 25, 33)
    seeds = torch.tensor([5, 3, 99, 0, 7, 7, -4])
    filters: dict[str, Any] = dict(scale_index=4, cfg=cfg, top_k=20, top_p=0.96)

    def draw(chosen: list[int]) -> Tensor:
        logits = cond[chosen] if cfg is None else torch.cat([cond[chosen], uncond[chosen]])
        return ops.sample_tokens(logits, seeds[chosen], **filters)

    together = draw(list(range(7)))
    for i in range(7):
        assert torch.equal(draw([i])[0], together[i])
    order = [4, 6, 0, 2, 1, 5, 3]
    assert torch.equal(draw(order), together[order])


def test_same_seed_same_draws_other_seed_others(either_backend: str) -> None:
    logits = torch.randn(1, 151, 64).expand(3, -1, -1)
    same, again, other = ops.sample_tokens(logits, torch.tensor([8, 8, 9]), scale_index=0)
    assert torch.equal(same, again)
    assert not torch.equal(same, other)


def test_thread_count_changes_nothing(either_backend: str) -> None:
    logits = torch.randn(4, 100, 1000)
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(ops.sample_tokens(logits, torch.arange(4), scale_index=0, top_k=900, top_p=0.96))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


SIZES = [1, 2, 15, 16, 17, 33, 151, 256, 511, 512, 1000, 4096, 5001, 16384]  # around blocks of every vector
FILTERS = [(0, 0.0), (1, 0.0), (3, 0.5), (100, 0.96), (900, 0.96), (0, 0.3), (4000, 1.0), (700, 1e-9)]


def rows(kind: str, vocabulary: int) -> Tensor:
    """(4, 3, V): two images with guidance, four without."""
    logits = torch.randn(4, 3, vocabulary) * 3
    match kind:
        case "masked":
            logits[torch.rand(2, 3, vocabulary).repeat(2, 1, 1) < 0.7] = -torch.inf
            logits[..., vocabulary // 2] = 1
        case "few values":
            logits = logits.round().clamp(-1, 1)
        case "signed zeros":
            logits = torch.where(logits > 0, 0.0, -0.0)
        case "large where a sample looks":  # a bound guessed from it is too high
            logits[..., :: max(vocabulary // 32, 1)] += 100
        case "small where a sample looks":
            logits[..., :: max(vocabulary // 32, 1)] -= 100
        case "far apart":
            logits *= 1e30
        case "denormal":
            logits *= 1e-40
        case "sorted":
            logits = logits.sort(dim=-1).values
    return logits


KINDS = [
    "Gaussian", "masked", "few values", "signed zeros", "large where a sample looks",
    "small where a sample looks", "far apart", "denormal", "sorted",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_variant_draws_the_tokens_of_the_reference(each_isa: str, kind: str) -> None:
    # A draw within rounding of a border between two tokens may differ from the reference's: none of these
    # does, and of 10^5 rows of 4096 Gaussian logits, top_k 900, top_p 0.96, none did.
    for i, vocabulary in enumerate(SIZES):
        logits, seeds = rows(kind, vocabulary), torch.arange(4)
        for top_k, top_p in FILTERS[i % 4 :: 4]:
            filters: dict[str, Any] = dict(scale_index=i, top_k=top_k, top_p=top_p)
            for cfg, chosen in ((None, seeds), (1.5, seeds[:2])):
                if cfg is not None and kind == "far apart":
                    continue
                tokens = ops.sample_tokens(logits, chosen, cfg=cfg, **filters)
                with backend.force("reference"):
                    expected = ops.sample_tokens(logits, chosen, cfg=cfg, **filters)
                assert torch.equal(tokens, expected), (vocabulary, filters, cfg)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_variants_agree_in_every_bit(each_isa: str, dtype: torch.dtype) -> None:
    """Also on draws within rounding of a border: no variant rounds in its own way."""
    logits = (torch.randn(8, 300, 600) * 3).to(dtype)
    for cfg, seeds in ((None, torch.arange(8)), (3.0, torch.arange(4))):
        draw = functools.partial(
            ops.sample_tokens, logits, seeds, scale_index=1, cfg=cfg, top_k=200, top_p=0.9
        )
        tokens = draw()
        _C.set_isa("portable")
        assert torch.equal(tokens, draw())
        _C.set_isa(each_isa)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cfg", [None, 1.5])
def test_memory_of_any_kind(each_isa: str, dtype: torch.dtype, cfg: float | None) -> None:
    plain = torch.randn(4, 5, 700).to(dtype)
    seeds = torch.arange(4 if cfg is None else 2)
    filters: dict[str, Any] = dict(scale_index=2, cfg=cfg, top_k=200, top_p=0.9)
    expected = ops.sample_tokens(plain, seeds, **filters)
    padded = torch.full((4, 5, 703), torch.nan, dtype=dtype)
    padded[..., 1:-2] = plain
    views = [
        padded[..., 1:-2],  # unaligned, between NaNs
        plain.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        torch.stack([plain, plain * torch.nan], dim=-1)[..., 0],
        plain.flip(0).contiguous().flip(0),
    ]
    for logits in views:
        assert torch.equal(ops.sample_tokens(logits, seeds, **filters), expected)
    out = torch.full((len(seeds), 10), -1)
    given = (view(plain), view(seeds), view(out[:, ::2]), 2, cfg, 200, 0.9)
    _C.sample_tokens(*given)
    assert torch.equal(out[:, ::2], expected)
    assert (out[:, 1::2] == -1).all()


def test_rows_that_are_no_distribution_anywhere(each_isa: str) -> None:
    for vocabulary in (1, 17, 600):
        for at in {0, vocabulary // 2, vocabulary - 1}:
            for bad in (torch.nan, torch.inf):
                logits = torch.zeros(2, 3, vocabulary)
                logits[1, 2, at] = bad
                with pytest.raises(ValueError, match="sample_tokens: each row of logits needs"):
                    ops.sample_tokens(logits, torch.arange(2), scale_index=0, top_k=100)
        nothing = torch.full((2, 3, vocabulary), -torch.inf)
        with pytest.raises(ValueError, match="sample_tokens: each row of logits needs"):
            ops.sample_tokens(nothing, torch.arange(2), scale_index=0, top_k=100)
    beyond = torch.full((2, 1, 5), 3e38)  # (1 + cfg) cond overflows
    with pytest.raises(ValueError, match="sample_tokens: each row of logits needs"):
        ops.sample_tokens(beyond, torch.zeros(1, dtype=torch.int64), scale_index=0, cfg=1.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_dtype_is_computed_in_float32(either_backend: str, dtype: torch.dtype) -> None:
    logits = torch.randn(4, 7, 33).to(dtype)
    filters: dict[str, Any] = dict(scale_index=2, cfg=1.5, top_k=20, top_p=0.9)
    result = ops.sample_tokens(logits, torch.tensor([1, 2]), **filters)
    assert torch.equal(result, ops.sample_tokens(logits.float(), torch.tensor([1, 2]), **filters))


def test_strided_logits(either_backend: str) -> None:
    logits = torch.randn(33, 7, 8)[..., ::2].permute(2, 1, 0)  # (4, 7, 33)
    seeds = torch.arange(8)[::2]
    filters: dict[str, Any] = dict(scale_index=2, top_k=20, top_p=0.9)
    assert torch.equal(
        ops.sample_tokens(logits, seeds, **filters),
        ops.sample_tokens(logits.contiguous(), seeds.clone(), **filters),
    )


@pytest.mark.parametrize(("batch", "length"), [(0, 4), (2, 0)])
def test_nothing_in_nothing_out(either_backend: str, batch: int, length: int) -> None:
    tokens = ops.sample_tokens(
        torch.zeros(batch, length, 5),
        torch.zeros(batch, dtype=torch.int64),
        scale_index=0,
        top_k=2,
        top_p=0.9,
    )
    assert tokens.shape == (batch, length)
    assert tokens.dtype == torch.int64


def test_one_code(either_backend: str) -> None:
    assert not ops.sample_tokens(
        torch.randn(1, 9, 1), torch.tensor([4]), scale_index=0, top_k=5, top_p=0.5
    ).any()


@pytest.mark.parametrize("guided", [False, True])
def test_values_of_each_image(either_backend: str, guided: bool) -> None:
    """cfg, top_k and top_p in tensors: the tokens of a call an image with numbers."""
    logits, seeds = torch.randn(8 if guided else 4, 9, 600) * 2, torch.arange(4)
    cfg = torch.tensor([0.0, 1.5, 4.0, -0.3], dtype=torch.float64) if guided else None
    top_k, top_p = torch.tensor([0, 20, 600, 300]), torch.tensor([0.96, 0.0, 0.5, 1.0], dtype=torch.float64)
    tokens = ops.sample_tokens(logits, seeds, scale_index=1, cfg=cfg, top_k=top_k, top_p=top_p)
    for i in range(4):
        own: dict[str, Any] = dict(
            cfg=None if cfg is None else cfg[i].item(), top_k=int(top_k[i]), top_p=top_p[i].item()
        )
        assert torch.equal(
            tokens[i], ops.sample_tokens(logits[i::4], seeds[i : i + 1], scale_index=1, **own)[0]
        )
    one = ops.sample_tokens(logits, seeds, scale_index=1, cfg=cfg, top_k=top_k[1], top_p=top_p[2].float())
    assert torch.equal(one, ops.sample_tokens(logits, seeds, scale_index=1, cfg=cfg, top_k=20, top_p=0.5))


@pytest.mark.parametrize(
    "bad", [dict(top_k=torch.tensor([3, -1])), dict(top_p=torch.tensor([0.5, math.nan]))]
)
def test_values_of_an_image_out_of_range(either_backend: str, bad: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match=r"sample_tokens: each top_k must be 0 or more and each top_p in \[0, 1\]"
    ):
        ops.sample_tokens(torch.zeros(2, 3, 5), torch.arange(2), scale_index=0, **bad)


def test_registration_with_values_of_each_image() -> None:
    values = torch.rand(2, dtype=torch.float64), torch.tensor([3, 9]), torch.rand(2, dtype=torch.float64)
    given = (torch.randn(4, 7, 33), torch.arange(2), 2, 0.0, 0, 0.0, *values)
    torch.library.opcheck(torch.ops.var_ext.sample_tokens, given)


@pytest.mark.parametrize("cfg", [None, 1.5])
def test_registration(cfg: float | None) -> None:
    seeds = torch.arange(4 if cfg is None else 2)
    torch.library.opcheck(torch.ops.var_ext.sample_tokens, (torch.randn(4, 7, 33), seeds, 2, cfg, 20, 0.9))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(logits=torch.zeros(2, 5)), ValueError, r"logits must have shape \(B, L, V\).*got \(2, 5\)"),
        (
            dict(logits=torch.zeros(3, 4, 5)),
            ValueError,
            r"logits must have shape.*\(2, \*, \*\), got \(3, 4, 5\)",
        ),
        (dict(cfg=1.5), ValueError, r"logits must have shape \(2B, L, V\) = \(4, \*, \*\), got \(2, 4, 5\)"),
        (dict(logits=torch.zeros(2, 4, 0)), ValueError, r"V of at least 1, got \(2, 4, 0\)"),
        (
            dict(seeds=torch.zeros(2, 1, dtype=torch.int64)),
            ValueError,
            r"seeds must have shape \(B,\).*got \(2, 1\)",
        ),
        (dict(seeds=torch.zeros(2)), TypeError, "seeds must be int64, got float32"),
        (dict(logits=torch.zeros(2, 4, 5).long()), TypeError, "logits must be float32.*got int64"),
        (dict(seeds=[1, 2]), TypeError, "seeds must be a tensor.*got list"),
        (dict(top_k=-1), ValueError, "top_k must be 0 or more, got -1"),
        (dict(top_p=1.5), ValueError, r"top_p must be in \[0, 1\], got 1.5"),
        (dict(top_p=-0.1), ValueError, r"top_p must be in \[0, 1\], got -0.1"),
        (dict(top_p=math.nan), ValueError, r"top_p must be in \[0, 1\], got nan"),
        (dict(scale_index=-1), ValueError, "scale_index must be 0 or more, got -1"),
        (dict(top_k=torch.tensor([1, 2, 3])), ValueError, r"top_k must be a number or .*\(2,\), got \(3,\)"),
        (dict(top_k=torch.tensor([1.0, 2.0])), TypeError, "top_k must be int64, got float32"),
        (dict(top_p=torch.tensor(1)), TypeError, "top_p must be float32.*got int64"),
        (
            dict(top_p=torch.zeros(2, device="meta")),
            ValueError,
            "one device, got seeds on cpu, top_p on meta",
        ),
        (
            dict(seeds=torch.zeros(2, dtype=torch.int64, device="meta")),
            ValueError,
            "one device, got.*seeds on meta",
        ),
    ],
)
def test_bad_input(either_backend: str, change: dict[str, Any], error: type[Exception], message: str) -> None:
    given: dict[str, Any] = dict(logits=torch.zeros(2, 4, 5), seeds=torch.tensor([0, 1]), scale_index=0)
    with pytest.raises(error, match=f"sample_tokens: .*{message}"):
        ops.sample_tokens(**{**given, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(logits=torch.zeros(2, 5)), r"logits must have shape \(2, L, V\), got \(2, 5\)"),
        (dict(cfg=1.5), r"logits must have shape \(4, L, V\), got \(2, 4, 5\)"),
        (dict(logits=torch.zeros(2, 4, 0)), r"logits must have V from 1 to .*, got shape \(2, 4, 0\)"),
        (dict(logits=torch.zeros(2, 4, 5).double()), "logits must be one of float32.*got float64"),
        (dict(seeds=torch.zeros(2)), "seeds must be int64, got float32"),
        (dict(out=torch.zeros(2, 3, dtype=torch.int64)), r"out must have shape \(2, 4\), got \(2, 3\)"),
        (dict(out=torch.zeros(1, 1, dtype=torch.int64).expand(2, 4)), "out must not overlap itself"),
        (dict(scale_index=-1), r"scale_index must be in \[0, 2\^32\), got -1"),
        (dict(top_k=-1), "top_k must be 0 or more, got -1"),
        (dict(top_k=view(torch.zeros(3, dtype=torch.int64))), r"top_k must have shape \(2,\), got \(3,\)"),
        (dict(top_p=view(torch.zeros(2))), "top_p must be float64, got float32"),
        (dict(top_p=math.nan), r"top_p must be in \[0, 1\], got nan"),
    ],
)
def test_the_kernel_refuses(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = dict(
        logits=torch.zeros(2, 4, 5),
        seeds=torch.zeros(2, dtype=torch.int64),
        out=torch.zeros(2, 4, dtype=torch.int64),
        scale_index=0,
        cfg=None,
        top_k=0,
        top_p=0.0,
    )
    given.update(change)
    tensors: dict[str, Any] = {name: view(given.pop(name)) for name in ("logits", "seeds", "out")}
    with pytest.raises(ValueError, match=f"^sample_tokens: {message}"):
        _C.sample_tokens(**tensors, **given)
