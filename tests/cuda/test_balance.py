"""How evenly the warps of attention's blocks share the pairs of queries and keys: warp i runs on part i % 4 of a
multiprocessor, and each part has a tensor core of its own."""

from __future__ import annotations

import re
from collections import Counter

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


def tiles(schedule: ScaleSchedule) -> list[list[int]]:
    """Pairs that each quarter of a tile's 128 rows computes: whole scales share a tile while they fit."""
    begins, begin, token = [], 0, 0
    for length in schedule.lengths:
        if token + length - begin > ROWS and token > begin:
            begins.append(begin)
            begin = token
        token += length
        if length > ROWS:
            begins += range(begin, token, ROWS)
            begin = token
    begins += [begin] if token > begin else []
    seen = [s.stop for s in schedule.slices for _ in range(s.start, s.stop)]  # keys of each row
    found = []
    for first, end in zip(begins, [*begins[1:], token], strict=True):
        quarters = [range(first + 32 * w, min(first + 32 * (w + 1), end)) for w in range(4)]
        found.append([32 * -(-seen[rows[-1]] // 16) * 16 if len(rows) else 0 for rows in quarters])
    return found


@pytest.mark.parametrize(("sides", "before", "goal"), [(SCALES_256, 0.82, 0.92), (SCALES_512, 0.96, 0.98)])
def test_parts_of_a_multiprocessor_share_the_pairs(
    sides: tuple[int, ...], before: float, goal: float
) -> None:
    """Wanted pairs over four times those of the busiest part, forward and dQ, of the whole chip."""
    schedule = ScaleSchedule(sides)
    work = tiles(schedule)[::-1]  # the tile with most work comes first
    wanted = HEADS * sum(s.stop * (s.stop - s.start) for s in schedule.slices)
    shares = []
    for turned in (False, True):
        parts: Counter[int] = Counter()
        for block in range(HEADS * len(work)):
            quarters = work[block // 64 % len(work)]  # heads go in groups of about that many
            for warp in range(4):
                parts[warp] += quarters[(warp + turned * turn(block)) % 4]
        shares.append(wanted / (4 * max(parts.values())))
    assert shares[0] <= before < goal <= round(shares[1], 2) or shares[0] <= before == goal == round(
        shares[1], 2
    )


def test_blocks_of_one_multiprocessor_are_turned_differently() -> None:
    """Whatever the step between them: 132 multiprocessors with two blocks each, 108, or neighbours."""
    for step in (1, 2, MULTIPROCESSORS, 2 * MULTIPROCESSORS, 108, 216):
        turns = Counter(turn(7 + step * n) for n in range(400))
        assert max(turns.values()) < 150  # 100 each, 5 standard deviations
