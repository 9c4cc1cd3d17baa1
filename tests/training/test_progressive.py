from __future__ import annotations

from collections.abc import Iterator

import pytest

from var_ext.training.progressive import factor, stage


def counted(total: int, scales: int, share: float, first: int, warmup: float) -> Iterator[tuple[int, float]]:
    """The published rule, with a counter of the steps of a stage: what `stage` computes from the step alone."""
    last, steps, stages = -1, 0, 0
    for step in range(total):
        begin, end = warmup * total, share * total
        if step <= begin:
            now = first
        elif step >= end:
            now = scales - 1
        else:
            now = first + round((step - begin) / (end - begin) * (scales - 1 - first))
        if now != last:
            last, steps, stages = now, 0, stages + 1
        steps += 1
        plain = stages == 1 or now == scales - 1
        yield now, 1.0 if plain else max(min(steps / (total / 300), 1), 0.01)


@pytest.mark.parametrize("total", [1, 15, 301, 2500])
@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
@pytest.mark.parametrize(("scales", "first"), [(10, 4), (10, 0), (6, 1), (2, 0)])
def test_stages_are_those_of_the_published_counter(total: int, share: float, scales: int, first: int) -> None:
    expected = counted(total, scales, share, first, 1 / 50)
    for step, (last, weight) in enumerate(expected):
        found = stage(step, total, scales=scales, share=share, first=first, warmup=1 / 50)
        assert found == (last, pytest.approx(weight, abs=1e-12)), step


def test_stages_begin_where_the_published_ones_do() -> None:
    """Ten scales from the fifth on, by half of the steps: five stages, each after its rounded share."""
    total = 100_000
    lasts = [stage(s, total, scales=10, share=0.5, first=4, warmup=1 / 50)[0] for s in range(0, total, 100)]
    begins = [lasts.index(k) * 100 / total for k in range(5, 10)]
    assert begins == pytest.approx(
        [0.068, 0.164, 0.260, 0.356, 0.452], abs=0.0011
    )  # the rule, on a grid of 0.001


@pytest.mark.parametrize(("share", "first"), [(0.0, 4), (0.5, 9), (0.5, 12)])
def test_without_progress_all_scales_are_trained(share: float, first: int) -> None:
    assert stage(0, 100, scales=10, share=share, first=first, warmup=0.02) == (9, 1.0)


def test_factor_falls_slowly_then_to_the_end() -> None:
    values = [factor(passed, share=0.5, end=0.001) for passed in (0, 0.1, 0.25, 0.5, 0.75, 1)]
    assert values == pytest.approx([1, 0.95005, 0.875125, 0.75025, 0.375625, 0.001])
    assert factor(1.0, share=1.0, end=0.1) == pytest.approx(0.55)
