"""Digests of weights, by which it is told whether they are the ones that were meant."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def digest_of_entries(entries: Mapping[str, Tensor]) -> str:
    """Hex digest of named tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(entries.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
