"""`.pth` files, as torch.save writes them: read as tensors only, unwrapped, and split into the models."""

from __future__ import annotations

import os
import pickle
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from var_ext.checkpoints.atomic import CheckpointError
from var_ext.checkpoints.tensors import Entries, load_entries, plain_name, plain_names
from var_ext.checkpoints.torch_files import Unfit, load_plain
from var_ext.paths import user_path

WRAPPINGS = ("trainer", "model", "state_dict", "ema")  # under which training code saves the entries
PARTS = ("vae_local", "var_wo_ddp")  # the published trainer's names of its two models
GO_ON = (
    "the same `var-ext train` command goes on with it and leaves a model in its folder, which load() takes"
)
MARKS = ("quantize.embedding.weight", "pos_1LC")  # an entry that a VQVAE has, one that a VAR has


def read_pth(path: str | os.PathLike[str]) -> tuple[Entries | None, Entries | None]:
    """Reads a `.pth` file as tensors only: any other Python object in it is refused, not built.

    A set of entries is recognised by its names, with any wrapper prefixes, and may be under one of
    "trainer", "model", "state_dict" and "ema"; the published trainer's checkpoint,
    {"trainer": {"vae_local": ..., "var_wo_ddp": ...}}, gives both models.

    Returns:
        (entries of the tokenizer or None, entries of the transformer or None), at least one of them.

    Raises:
        CheckpointError: missing, truncated, carrying code, or holding no model of the published kind, or
            more than one choice.
    """
    file = user_path(path)
    return split(_content(file), file)


def read_entries(path: str | os.PathLike[str], wrappings: Sequence[str] = ()) -> Entries:
    """Named tensors of any network, from a `.pth` or safetensors file, under plain names.

    Args:
        path: the file; its entries may be under one of the wrappings that `read_pth` knows, or of `wrappings`.

    Raises:
        CheckpointError: missing, truncated, carrying code, or holding something else than named tensors.
    """
    file = user_path(path)
    if file.suffix == ".safetensors":
        return load_entries(file)
    content = _unwrapped(_content(file), file, (*WRAPPINGS, *wrappings))
    if not content:
        raise CheckpointError(f"{file} must hold named tensors, got none")
    found = _named_tensors(content, file)
    assert found is not None
    return found


def _content(file: Path) -> object:
    """What a file holds, read as tensors only."""
    try:
        return load_plain(file, mmap=True)
    except OSError as error:
        raise CheckpointError(f"could not read {file}: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\w+[\w.]*\.\w+)", str(error))
        came = f"asks for the Python object {wanted[1]}" if wanted else "is cut short or of another format"
        raise CheckpointError(
            f"{file} must be a file written by torch.save that holds tensors only, but {came}: refused by "
            f"torch.load(weights_only=True), and nothing in it was run{_extraction(file) if wanted else ''}"
        ) from error
    except Unfit as error:
        raise CheckpointError(
            f"{file} must hold plain tensors as torch.save writes them, but {error}"
        ) from error
    except Exception as error:  # a damaged file makes the unpickler raise almost any type of error
        size = file.stat().st_size
        raise CheckpointError(
            f"{file} must be a complete file written by torch.save, but its {size} bytes are cut short or "
            f"damaged ({type(error).__name__}); copy or download it again"
        ) from error


def split(content: object, file: Path) -> tuple[Entries | None, Entries | None]:
    """The result of `read_pth` for a file's content."""
    content = _unwrapped(content, file)
    if isinstance(content, Mapping):
        if any(content.get(part) is not None for part in PARTS):
            vae, var = (content.get(part) for part in PARTS)
            return _named_tensors(vae, file), _named_tensors(var, file)
        names = {plain_name(name) for name in content if isinstance(name, str)}
        if MARKS[0] in names:
            return _named_tensors(content, file), None
        if MARKS[1] in names:
            return None, _named_tensors(content, file)
        if str(content.get("format")).startswith("var_ext/train/"):
            raise CheckpointError(f"{file} is the state of a training run: {GO_ON}")
    came = (
        f"the names {_first(list(content))}"
        if isinstance(content, Mapping)
        else f"a {type(content).__name__}"
    )
    raise CheckpointError(
        f"{file} must hold the entries of a VQVAE ({MARKS[0]} ...), of a VAR ({MARKS[1]} ...), either of them under "
        f"one of {', '.join(WRAPPINGS)}, or the published trainer's {{'trainer': {{'vae_local', 'var_wo_ddp'}}}}, "
        f"got {came}"
    )


def _unwrapped(content: object, file: Path, wrappings: Sequence[str] = WRAPPINGS) -> object:
    if not isinstance(content, Mapping):
        return content
    found = [key for key in wrappings if isinstance(content.get(key), Mapping)]
    if len(found) > 1:
        code = f"import torch; torch.save(torch.load({str(file)!r})[{found[-1]!r}], {f'{found[-1]}.pth'!r})"
        raise CheckpointError(
            f"{file} must hold one set of entries, got {' and '.join(found)}: take one of them out, "
            f"such as by\npython -c {shlex.quote(code)}"
        )
    return content[found[0]] if found else content


def _extraction(file: Path) -> str:
    """How to extract the entries of a file that also contains Python objects."""
    out = file.with_name(f"{file.stem}-entries.pth")
    keys = (*PARTS, *WRAPPINGS[1:])
    code = (
        f"import torch; c = torch.load({str(file)!r}, map_location='cpu', weights_only=False); "
        "c = c.get('trainer', c); "
        f"torch.save({{k: v for k, v in c.items() if k in {keys} or torch.is_tensor(v)}}, {str(out)!r})"
    )
    return (
        ". If you trust its origin, take the entries out, which runs what the file asks for, and use "
        f"{out.name} instead:\npython -c {shlex.quote(code)}"
    )


def _named_tensors(entries: object, file: Path) -> Entries | None:
    if entries is None:
        return None
    if not isinstance(entries, Mapping):
        raise CheckpointError(f"{file} must hold a model as named tensors, got {type(entries).__name__}")
    strangers = [
        f"{type(value).__name__} {name!r}"
        for name, value in entries.items()
        if not (isinstance(name, str) and isinstance(value, torch.Tensor))
    ]
    if strangers:
        raise CheckpointError(f"{file} must hold a model as named tensors, got {_first(strangers)}")
    return plain_names(entries, str(file))


def _first(names: Sequence[Any], count: int = 3) -> str:
    return ", ".join(map(str, names[:count])) + (
        f" and {len(names) - count} more" if len(names) > count else ""
    )
