"""Files of torch.save from strangers: plain values and tensors alone, which take no more memory than the file holds."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

DEPTH = 32  # of containers in containers; those of this project have 8
SHARED = 4  # times that a file's bytes may be used: entries may share their memory

_TYPES = (Tensor, torch.nn.Parameter)


class Unfit(ValueError):
    """What a file holds would cost more than the file, or is no plain tensor; the message says which."""


def load_plain(file: Path, *, mmap: bool) -> object:
    """torch.load of tensors and plain values alone. Nothing in the file is run, and no tensor is expanded yet.

    Args:
        mmap: leave tensors in the file until they are used, where its format allows: torch's zip files, not the older
            kind.

    Raises:
        Unfit: a tensor is sparse, quantized, lazily negated or of another device; the tensors, written out, have many
            times the bytes of the file, as an expanded one has; records are compressed; or containers are too deep.
        Exception: any other that torch raises for broken and foreign files.
    """
    zipped = zipfile.is_zipfile(file)
    if zipped:
        with zipfile.ZipFile(file) as archive:
            if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
                raise Unfit("its records are compressed, which those of torch.save are not")
    content = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap and zipped)
    size, total = file.stat().st_size, 0
    for tensor in _tensors(content):
        if (
            type(tensor) not in _TYPES
            or (tensor.layout, tensor.device.type) != (torch.strided, "cpu")
            or tensor.is_quantized
            or tensor.is_neg()
            or tensor.is_conj()
        ):
            kind = f"{str(tensor.layout).removeprefix('torch.')} {tensor.dtype} on {tensor.device.type}"
            raise Unfit(
                f"it holds a tensor that is not dense and plain ({kind}, shape {tuple(tensor.shape)})"
            )
        total += tensor.numel() * tensor.element_size()
        if total > SHARED * size:
            raise Unfit(
                f"its tensors, such as one of shape {tuple(tensor.shape)}, ask for over {total} bytes, and it has "
                f"{size}: save them with .clone()"
            )
    return content


def _tensors(content: object) -> Iterator[Tensor]:
    """All tensors in containers, which may hold themselves."""
    seen: set[int] = set()
    left = [(content, 0)]
    while left:
        value, depth = left.pop()
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping | list | tuple | set | frozenset) and id(value) not in seen:
            if depth == DEPTH:
                raise Unfit(f"it holds containers in containers, more than {DEPTH} deep")
            seen.add(id(value))
            parts = [*value, *value.values()] if isinstance(value, Mapping) else value
            left += ((part, depth + 1) for part in parts)
