from __future__ import annotations

from tests.cuda.interpolation import CudaInterpolationTests
from tests.ops import oracle


class TestAreaDownsample(CudaInterpolationTests):
    name = "area_downsample"
    mode = "area"
    matrix = staticmethod(oracle.area_matrix)
