"""Reference of `nearest_code`."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def nearest_code(x: Tensor, codebook: Tensor, *, cosine: bool = False) -> Tensor:
    """Index of the code nearest to each vector, in squared L2 or cosine: (..., C), (V, C) -> (...)."""
    vectors = x.reshape(-1, x.shape[-1])  # (N, C)
    if cosine:
        similarity = F.normalize(vectors, dim=-1) @ F.normalize(codebook, dim=-1).T  # (N, V)
        return similarity.argmax(dim=-1).view(x.shape[:-1])
    # |x - e|^2 without |x|^2, which is the same for all codes
    distance = codebook.square().sum(dim=-1).addmm(vectors, codebook.T, alpha=-2)  # (N, V)
    return distance.argmin(dim=-1).view(x.shape[:-1])
