from __future__ import annotations

from tests.cuda.interpolation import CudaInterpolationTests
from tests.ops import oracle


class TestBicubicUpsample(CudaInterpolationTests):
    name = "bicubic_upsample"
    mode = "bicubic"
    matrix = staticmethod(oracle.bicubic_matrix)
