"""The images of an export, and the record of them that a resumed run must match."""

from __future__ import annotations

import hashlib
import json
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from var_ext import _C
from var_ext.checkpoints import CheckpointError, atomic_write, read_json
from var_ext.sampling import DEFAULTS, Sampler

FORMAT = "var_ext-images/1"
MACHINE = "machine"  # what the bytes depend on beside the plan, on a CPU


@dataclass(frozen=True)
class Plan:
    """A list of images, cut into parts.

    A part is `batch_size` consecutive images (the last part: the rest), and is always drawn as one batch, whatever was
    drawn before and by whichever rank: where logits differ by rounding between batch sizes, as on GPUs, this makes a
    resumed or shared export equal to the byte.

    Args:
        labels, seeds: one of each per image.
        options: keywords of `Sampler.stream`, such as cfg, top_k and top_p; by default the sampler's.
        batch_size: images per part.
        selection: how they were chosen among candidates, as JSON values; None: they were not.

    Raises:
        ValueError: labels and seeds differ in number, or batch_size is less than 1.
        TypeError: one of these is not of integers.
    """

    labels: tuple[int, ...]
    seeds: tuple[int, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int = 64
    selection: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        # of Python: numbers of NumPy and torch would not compare with those of plan.json
        for name in ("labels", "seeds"):
            object.__setattr__(self, name, tuple(map(operator.index, getattr(self, name))))
        object.__setattr__(self, "batch_size", operator.index(self.batch_size))
        if len(self.labels) != len(self.seeds):
            raise ValueError(f"a plan must have a seed a label, got {len(self.labels)} and {len(self.seeds)}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def parts(self) -> list[range]:
        """Places of the images of each part."""
        size = self.batch_size
        return [range(start, min(start + size, len(self))) for start in range(0, len(self), size)]

    def resolved(self, sampler: Sampler) -> dict[str, Any]:
        """All options, missing ones with the sampler's recommended value."""
        return {**sampler.defaults, **self.options}

    def record(self, sampler: Sampler) -> dict[str, Any]:
        """Everything that determines the bytes of the images, as JSON values.

        Raises:
            ValueError: a label is not one of the sampler's.
        """
        wrong = [label for label in self.labels if not 0 <= label <= sampler.num_classes]
        if wrong:
            last = sampler.num_classes
            raise ValueError(f"labels must be in 0..{last} ({last}: no class), got {wrong[:8]}")
        record = {
            "format": FORMAT,
            "labels": list(self.labels),
            "seeds": list(self.seeds),
            "batch_size": self.batch_size,
            "options": self.resolved(sampler),
            "precision": sampler.precision.name,
            "device": sampler.device.type,
            # the decoder's sums, unlike tokens, depend on them
            **({MACHINE: _machine()} if sampler.device.type == "cpu" else {}),
            "vae": sampler.vae.config,
            "var": sampler.var.config,
            "weights": fingerprint(sampler),
            **({} if self.selection is None else {"selection": dict(self.selection)}),
        }
        return json.loads(json.dumps(record, default=lambda value: value.tolist()))  # tuples become lists


def evaluation_plan(
    classes: int | Sequence[int],
    per_class: int = 50,
    seed: int = 0,
    *,
    batch_size: int = 64,
    **options: Any,
) -> Plan:
    """The plan of the published evaluation: every class equally often, one seed per image.

    Classes alternate (0, 1, 2, ... and again from 0): the ADM suite computes the Inception Score of each run of 5000
    images, and a run of few classes would score low. Image i has the seed `seed` + i.

    Args:
        classes: their number, or a list of them.
        per_class: images of each.
        seed: of the first image.
        batch_size: images drawn at once.
        options: as for `Plan`; defaults: cfg 1.5, top_k 900 and top_p 0.96.

    Raises:
        ValueError: per_class is negative, or batch_size less than 1.
    """
    if per_class < 0:
        raise ValueError(f"per_class must be 0 or more, got {per_class}")
    labels = tuple(classes if isinstance(classes, Iterable) else range(classes)) * per_class
    return Plan(labels, tuple(range(seed, seed + len(labels))), {**DEFAULTS, **options}, batch_size)


def fingerprint(sampler: Sampler) -> str:
    """Hash of up to 64 values, evenly spaced, of every entry of both models: distinguishes training runs."""
    digest = hashlib.sha256()
    for model in (sampler.vae, sampler.var):
        for name, entry in model.state_dict().items():
            flat = entry.detach().reshape(-1)
            few = flat[:: max(1, flat.numel() // 64)][:64]
            digest.update(f"{name} {tuple(entry.shape)}".encode())
            digest.update(few.to("cpu", torch.float64).numpy().tobytes())
    return digest.hexdigest()[:32]


def _machine() -> dict[str, Any]:
    return {"threads": torch.get_num_threads(), "instructions": _C.isa()}


def agree(path: Path, record: Mapping[str, Any]) -> None:
    """Writes the record to `path`, or compares it with the existing one.

    Raises:
        CheckpointError: another plan is there (says what differs), or the file cannot be read or written.
    """
    if not os.path.exists(path):
        with atomic_write(path) as handle:
            handle.write(json.dumps(record).encode())
    compare(path, read_json(path), record)  # another rank may have written it


def compare(path: Path, there: Any, record: Any) -> None:
    """Raises CheckpointError, with what differs, unless the record of `path` is this one."""
    if isinstance(there, dict) and MACHINE not in there:  # of an older version, which did not tell
        record = {name: value for name, value in record.items() if name != MACHINE}
    different = differences(there, record)
    if different and all(text.startswith(f"{MACHINE}.") for text in different):
        raise CheckpointError(
            f"{path} was begun with other sums: {'; '.join(different)}. Pixels would differ by rounding: go on "
            "with the same (--threads or OMP_NUM_THREADS, the same kind of chip), or write to another place"
        )
    if different:
        raise CheckpointError(
            f"{path} is of other images: {'; '.join(different[:4])}{'; ...' if different[4:] else ''}. "
            "Write to another place, or remove what is there"
        )


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """What differs between two JSON values, one sentence each."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = list(dict.fromkeys([*old, *new]))
        return [
            text
            for key in keys
            for text in differences(old.get(key), new.get(key), f"{name}.{key}".removeprefix("."))
        ]
    if isinstance(old, list) and isinstance(new, list) and old != new:
        if len(old) != len(new):
            return [f"{name}: {len(old)} values there, {len(new)} now"]
        first = next(i for i, (a, b) in enumerate(zip_longest(old, new)) if a != b)
        return [f"{name}: from place {first} on, {old[first]!r} there, {new[first]!r} now"]
    return [] if old == new else [f"{name}: {old!r} there, {new!r} now"]
