"""How evenly the warps of attention's blocks share the pairs of queries and keys: warp i runs on part i % 4 of a
multiprocessor, and each part has a tensor core of its own."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

import pytest

from tests.build.tools import ROOT
from var_ext.schedule import SCALES_256, SCALES_512, ScaleSchedule

HEADS, MULTIPROCESSORS, ROWS = 512, 132, 128
SOURCE = (ROOT / "csrc/cuda/attention_tiles.cuh").read_text(encoding="utf-8")


def turn(block: int) -> int:
    """`fourth_of_warp` of warp 0; the constants are those of the source."""
    found = re.search(
        r"hash = block / 4 \* (0x\w+)u;\s+hash = \(hash \^ hash >> 15\) \* (0x\w+)u;\s+"
        r"const uint32_t turn = block % 2 \* 2 \+ block / 2 % 2 \+ \(hash >> 30\);",
        SOURCE,
    )
    assert found, "fourth_of_warp reads otherwise: follow it here"
    first, second = (int(constant, 16) for constant in found.groups())
    value = block // 4 * first % 2**32
    value = (value ^ value >> 15) * second % 2**32
    return (block % 2 * 2 + block // 2 % 2 + (value >> 30)) % 4


def borders(schedule: ScaleSchedule) -> list[int]:
    """Where tiles of queries begin: whole scales share one while they fit, one that is too large is cut."""
    begins, begin, token = [], 0, 0
    for length in schedule.lengths:
        if token + length - begin > ROWS and token > begin:
            begins.append(begin)
            begin = token
        token += length
        if length > ROWS:
            begins += range(begin, token, ROWS)
            begin = token
    return begins + ([begin] if token > begin else [])


def quarters(schedule: ScaleSchedule, begins: Sequence[int]) -> list[list[range]]:
    """The rows of each quarter of each tile."""
    ends = [*begins[1:], schedule.num_tokens]
    return [
        [range(min(at, end), min(at + 32, end)) for at in range(begin, begin + ROWS, 32)]
        for begin, end in zip(begins, ends, strict=True)
    ]


def pairs_of_queries(schedule: ScaleSchedule) -> list[list[int]]:
    """What a warp computes for a quarter: its rows by the keys that the last of them sees, 16 at a time."""
    seen = [s.stop for s in schedule.slices for _ in range(s.start, s.stop)]  # keys of each row
    work = [
        [32 * -(-seen[rows[-1]] // 16) * 16 if rows else 0 for rows in tile]
        for tile in quarters(schedule, borders(schedule))
    ]
    return work[::-1]  # the tile with most work comes first


def pairs_of_keys(schedule: ScaleSchedule, begins: Sequence[int]) -> list[list[int]]:
    """The same for dK and dV: queries come 16 at a time from the first that sees the tile's first key on; those
    that none of the quarter's keys is seen by are passed over."""
    seen_from = [s.start for s in schedule.slices for _ in range(s.start, s.stop)]
    work = []
    for tile in quarters(schedule, begins):
        begin = seen_from[tile[0][0]]
        steps = -(-(schedule.num_tokens - begin) // 16)
        passed = [(seen_from[rows[0]] - begin) // 16 if rows else steps for rows in tile]
        work.append([32 * 16 * (steps - count) for count in passed])
    return work


def share(schedule: ScaleSchedule, work: list[list[int]], fourth: Callable[[int, int], int]) -> float:
    """Wanted pairs over four times those of the busiest part of a multiprocessor, of the whole chip."""
    parts: Counter[int] = Counter()
    for block in range(HEADS * len(work)):
        for warp in range(4):
            # heads go in groups of about 64
            parts[warp] += work[block // 64 % len(work)][fourth(block, warp)]
    wanted = HEADS * sum(s.stop * (s.stop - s.start) for s in schedule.slices)
    return round(wanted / (4 * max(parts.values())), 2)


def unturned(block: int, warp: int) -> int:
    return warp


@pytest.mark.parametrize(("sides", "before", "after"), [(SCALES_256, 0.81, 0.92), (SCALES_512, 0.95, 0.99)])
def test_forward_and_dq_share_the_pairs(sides: tuple[int, ...], before: float, after: float) -> None:
    schedule = ScaleSchedule(sides)
    work = pairs_of_queries(schedule)
    assert share(schedule, work, unturned) == before
    assert share(schedule, work, lambda block, warp: (warp + turn(block)) % 4) == after


@pytest.mark.parametrize(
    ("sides", "before", "tiles", "after"), [(SCALES_256, 0.70, 0.84, 0.95), (SCALES_512, 0.83, 0.96, 1.00)]
)
def test_dkv_shares_the_pairs(sides: tuple[int, ...], before: float, tiles: float, after: float) -> None:
    """Before: tiles that begin at the borders of scales. Then tiles of one size, then their fourths change places."""
    for name, line in {
        "attention_tiles": "const int32_t first = i * size,",
        "attention_backward_dkv": "const int turn = fourth_of_warp(blockIdx.x, 0) * Shape::rows_of_warp;\n"
        "    const int32_t first = tile.first + (row ^ turn),",
    }.items():
        source = (ROOT / f"csrc/cuda/{name}.cuh").read_text(encoding="utf-8")
        assert line in source, f"{name} reads otherwise: follow it here"
    schedule = ScaleSchedule(sides)
    assert share(schedule, pairs_of_keys(schedule, borders(schedule)), unturned) == before
    work = pairs_of_keys(schedule, range(0, schedule.num_tokens, ROWS))
    assert share(schedule, work, unturned) == tiles
    assert share(schedule, work, lambda block, warp: warp ^ turn(block)) == after


def test_blocks_of_one_multiprocessor_are_turned_differently() -> None:
    """Whatever the step between them: 132 multiprocessors with two blocks each, 108, or neighbours."""
    for step in (1, 2, MULTIPROCESSORS, 2 * MULTIPROCESSORS, 108, 216):
        turns = Counter(turn(7 + step * n) for n in range(400))
        assert max(turns.values()) < 150  # 100 each, 5 standard deviations
