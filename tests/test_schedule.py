"""ScaleSchedule: offsets and lengths in one place."""

from __future__ import annotations

import pytest

from var_ext.schedule import SCALES_256, SCALES_512, ScaleSchedule


@pytest.mark.parametrize(
    ("sides", "tokens"), [(SCALES_256, 680), (SCALES_512, 2240), ((3,), 9), ((1, 1, 2), 6)]
)
def test_spans_tile_the_sequence(sides, tokens):
    schedule = ScaleSchedule(sides)
    assert schedule.num_tokens == tokens and len(schedule) == len(sides)
    assert [i for s in schedule.slices for i in range(s.start, s.stop)] == list(range(tokens))
    assert schedule.offsets == tuple(s.start for s in schedule.slices)
    assert schedule.prefix(tokens) == schedule


def test_ratio_runs_from_zero_to_one():
    schedule = ScaleSchedule(SCALES_256)
    assert [schedule.ratio(k) for k in (0, 9)] == [0.0, 1.0]
    assert ScaleSchedule((4,)).ratio(0) == 0.0


@pytest.mark.parametrize("sides", [(), (0, 1), (2, 1), (-1,)])
def test_wrong_sides_are_named(sides):
    with pytest.raises(ValueError, match="patch_nums must be one or more sides >= 1 in ascending order, got"):
        ScaleSchedule(sides)


def test_a_prefix_ends_with_a_scale():
    with pytest.raises(ValueError, match=r"must have one of \[1, 5\] tokens, got 3"):
        ScaleSchedule((1, 2)).prefix(3)
