"""Named tensors in safetensors files, and entry names without the prefixes of training wrappers."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from var_ext.checkpoints.atomic import CheckpointError, atomic_write
from var_ext.paths import user_path

Entries = dict[str, torch.Tensor]

# Parts of names added by wrappers around a module: DataParallel and DistributedDataParallel, torch.compile,
# FSDP, activation checkpointing. torch's AveragedModel adds a counter beside its "module.".
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
COUNTER = "n_averaged"
DIGEST = "digest"  # of the entries, in the metadata of a model folder's files

# Largest element first keeps every tensor aligned to its own size, as in the safetensors library.
_DTYPES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.bool: "BOOL",
}


def save_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes named tensors as one safetensors file, atomically and without a second copy of them in memory.

    The safetensors library writes either to a path of its own choice or to a byte string as large as the
    model; the format is a header and the raw data, so it is written here through `atomic_write` instead.

    Args:
        path: the file to write.
        tensors: name -> tensor of any shape, device and strides.
        metadata: text to keep in the header.

    Raises:
        CheckpointError: the file could not be written.
        TypeError: the format does not support a tensor's dtype.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
            raise TypeError(f"{name} must have one of the dtypes {known} to be saved, got {tensor.dtype}")
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        start, end = end, end + tensors[name].numel() * tensors[name].element_size()
        header[name] = {
            "dtype": _DTYPES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # the data starts aligned
    with atomic_write(path) as handle:
        handle.write(len(encoded).to_bytes(8, "little"))
        handle.write(encoded)
        for name in order:
            # numpy has no bfloat16, so every dtype goes through its bytes
            flat = tensors[name].detach().to("cpu").contiguous().reshape(-1)
            if flat.numel():
                handle.write(flat.view(torch.uint8).numpy().data)


def load_tensors(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Reads a safetensors file into CPU tensors.

    Raises:
        CheckpointError: the file is missing, cut short, or of another format; says which file and what it
            holds.
    """
    return _read(path)[0]


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata."""
    file = user_path(path)
    try:
        with _utf8_name(file) as name, safe_open(name, framework="pt") as reader:
            tensors = {entry: reader.get_tensor(entry) for entry in reader.keys()}  # noqa: SIM118  it is no mapping
            return tensors, reader.metadata() or {}
    except OSError as error:
        raise CheckpointError(f"could not read {file}: {error.strerror or error}") from error
    except SafetensorError as error:
        size = file.stat().st_size
        raise CheckpointError(
            f"{file} must be a complete safetensors file, but its {size} bytes are cut short or of "
            f"another format ({error}); copy or download it again"
        ) from error


@contextmanager
def _utf8_name(file: Path) -> Iterator[str]:
    """A UTF-8 name of the file: safetensors accepts no other."""
    try:
        os.fsencode(file).decode()
    except UnicodeDecodeError:
        with open(file, "rb") as handle:
            yield f"/dev/fd/{handle.fileno()}"
    else:
        yield str(file)


def plain_names(entries: Mapping[str, torch.Tensor], source: str) -> Entries:
    """The entries under the names that the bare model gives them: "module._orig_mod.head.bias" -> "head.bias".

    Raises:
        CheckpointError: two entries get the same name; the message names them and `source`.
    """
    plain: Entries = {}
    came: dict[str, str] = {}
    for name, tensor in entries.items():
        short = plain_name(name)
        if short in plain:
            raise CheckpointError(f"{source} must have each entry once, got both {came[short]} and {name}")
        if short != COUNTER:
            plain[short], came[short] = tensor, name
    return plain


def plain_name(name: str) -> str:
    """A name without its wrappers."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def load_entries(path: str | os.PathLike[str], digest: object = None) -> Entries:
    """The entries of a model in a safetensors file, under plain names.

    Args:
        digest: what the config beside it says of it; a file that says something else of itself (`DIGEST`) is of another
            model, one that says nothing is taken.

    Raises:
        CheckpointError: see `load_tensors`; or it is of another model.
    """
    tensors, metadata = _read(path)
    if metadata.get(DIGEST, digest) != digest:
        raise CheckpointError(
            f"{path} is of another model than config.json beside it: a writer was stopped between them, or one was "
            "replaced. Write the folder again (save_model, convert, or the training that was stopped)"
        )
    return plain_names(tensors, str(path))
