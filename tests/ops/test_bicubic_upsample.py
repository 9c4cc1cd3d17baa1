from __future__ import annotations

import pytest

from tests.ops import oracle
from tests.ops.interpolation import InterpolationTests, Size
from var_ext.schedule import SCALES_256, SCALES_512

# To the finest grid from all others at 256 and 512 px; then rectangles, primes, no change, and shrinking.
PAIRS = [
    *(((p, p), (16, 16)) for p in SCALES_256[:-1]),
    *(((p, p), (32, 32)) for p in SCALES_512[4:-1]),
    ((3, 2), (7, 5)),
    ((1, 4), (1, 9)),
    ((6, 6), (6, 6)),
    ((9, 5), (4, 3)),
]


@pytest.fixture(params=PAIRS, ids=str)
def pair(request: pytest.FixtureRequest) -> tuple[Size, Size]:
    return request.param


class TestBicubicUpsample(InterpolationTests):
    name = "bicubic_upsample"
    mode = "bicubic"
    matrix = staticmethod(oracle.bicubic_matrix)
    few = (((13, 13), (16, 16)), ((1, 1), (16, 16)), ((3, 2), (7, 5)))
