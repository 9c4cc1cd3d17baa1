"""nearest_code over the published codebook: the tokens of one image's last scale, and eight of them.

On CUDA four launches: the codebook is packed, and the vectors; blocks search tiles of 128 codes for 64 vectors, or for
128 behind a filter in bf16 on the tensor cores; the lowest over the parts. Counted for an H100 (60 TFLOP/s in fp32
outside the tensor cores, 800 in bf16, 3.0 TB/s): 256 vectors are 67 MFLOP and 0.56 MB, 1.1 us of arithmetic; 2048 are
537 MFLOP and 0.8 MB, 9.0 us, or 0.7 us in bf16 and 11 codes a vector once more in fp32. Estimated, not measured: loads
and maxima make the filter three or four times that, and the panels that are searched again wait some 3 us for each
other, so that 34000 vectors need 45 us where the plain search needs 149 us. Packing and the parts move another 2.2 MB
through the L2 cache, and the distance matrix of 34 MB is never written.
"""

from __future__ import annotations

from functools import partial

import torch
from harness.case import Case, compiled, nbytes
from torch import Tensor

from var_ext import _C, ops, reference

SHAPES = {
    "256 x 4096 x 32": dict(vectors=256, codes=4096, channels=32, cosine=False),
    "2048 x 4096 x 32": dict(vectors=2048, codes=4096, channels=32, cosine=False),
    "2048 x 4096 x 32, cosine": dict(vectors=2048, codes=4096, channels=32, cosine=True),
}
GPU_SHAPES = {
    f"{vectors} x 4096 x 32{', cosine' if cosine else ''}, fp32": dict(
        vectors=vectors, codes=4096, channels=32, cosine=cosine
    )
    for vectors, cosine in (
        (8, False),
        (2048, False),
        (2048, True),
        (5440, False),
        (12800, False),
        (34000, False),
    )
}  # the first, the last and all scales of 8 and of 50 images
SMOKE = dict(vectors=7, codes=33, channels=5, cosine=False)


def by_cdist(x: Tensor, codebook: Tensor, cosine: bool) -> Tensor:
    if cosine:
        x, codebook = (
            torch.nn.functional.normalize(x, dim=-1),
            torch.nn.functional.normalize(codebook, dim=-1),
        )
    return torch.cdist(x, codebook).argmin(dim=-1)


def equally_near(x: Tensor, codebook: Tensor, cosine: bool, index: Tensor, expected: Tensor) -> None:
    """Two answers may differ where two codes are equally near up to fp32 rounding."""
    if cosine:
        x, codebook = (
            torch.nn.functional.normalize(x, dim=-1),
            torch.nn.functional.normalize(codebook, dim=-1),
        )
    near, nearest = ((x - codebook[i]).double().square().sum(-1) for i in (index, expected))
    torch.testing.assert_close(near, nearest, rtol=1e-5, atol=1e-5)


def case(vectors: int, codes: int, channels: int, cosine: bool) -> Case:
    x, codebook = torch.randn(vectors, channels), torch.randn(codes, channels)
    sizes = vectors, codes, channels
    filtered = _C.nearest_code_scratch(*sizes) != _C.nearest_code_scratch(*sizes, filter=False)
    return Case(
        {
            "var_ext": lambda: ops.nearest_code(x, codebook, cosine=cosine),
            "reference": lambda: reference.nearest_code(x, codebook, cosine=cosine),
            "cdist": lambda: by_cdist(x, codebook, cosine),
            "torch.compile": compiled(reference.nearest_code, x, codebook, cosine=cosine),
        },
        bytes=nbytes(x, codebook) + vectors * 8,
        flops=2 * vectors * codes * channels,
        tensor_flops=2 * vectors * (codes - 11) * channels if filtered else 0,
        launches=4,
        check=partial(equally_near, x, codebook, cosine),
    )
