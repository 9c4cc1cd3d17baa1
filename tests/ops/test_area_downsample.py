from __future__ import annotations

import pytest

from tests.ops import oracle
from tests.ops.interpolation import InterpolationTests, Size
from var_ext.schedule import SCALES_256, SCALES_512

# From the finest grid to all others at 256 and 512 px; then rectangles, primes, no change, and growing.
PAIRS = [
    *(((16, 16), (p, p)) for p in SCALES_256[:-1]),
    *(((32, 32), (p, p)) for p in SCALES_512[4:-1]),
    ((7, 5), (3, 2)),
    ((1, 9), (1, 4)),
    ((6, 6), (6, 6)),
    ((4, 3), (9, 5)),
]


@pytest.fixture(params=PAIRS, ids=str)
def pair(request: pytest.FixtureRequest) -> tuple[Size, Size]:
    return request.param


class TestAreaDownsample(InterpolationTests):
    name = "area_downsample"
    mode = "area"
    matrix = staticmethod(oracle.area_matrix)
    few = (((16, 16), (13, 13)), ((16, 16), (1, 1)), ((7, 5), (3, 2)))
