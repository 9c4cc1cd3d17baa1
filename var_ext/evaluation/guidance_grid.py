"""Figures of a model over guidance and top-p: the trade-off of quality and variety, cell by cell."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from var_ext.evaluation.feature_store import BATCH
from var_ext.evaluation.features import Extractor
from var_ext.evaluation.fid import evaluate_fid
from var_ext.evaluation.fid_reference import Reference
from var_ext.evaluation.image_sources import DrawnImages
from var_ext.evaluation.kept import Kept
from var_ext.export import evaluation_plan
from var_ext.sampling import Sampler


@dataclass(frozen=True)
class GuidanceGrid:
    """A grid of cells, each of which draws the same (class, seed) pairs with its own guidance and top-p.

    Args:
        sampler: draws them.
        name: of the model, in reports.
        options: keywords of `Sampler.stream` besides cfg and top_p.
        cfgs, top_ps: the values, at least one each.
        labels, per_class, seed: classes, images of each, and the seed of the first.
        reference, extractor: what they are compared with, in which space.
        batch_size: images drawn, and features computed, at once.
    """

    sampler: Sampler
    name: str
    options: Mapping[str, Any]
    cfgs: Sequence[float]
    top_ps: Sequence[float]
    labels: Sequence[int]
    per_class: int
    seed: int
    reference: Reference
    extractor: Extractor
    batch_size: int = BATCH

    def __len__(self) -> int:
        return len(self._pairs)

    @property
    def _pairs(self) -> list[tuple[float, float]]:
        pairs = product(dict.fromkeys(self.top_ps), dict.fromkeys(self.cfgs))
        return [(cfg, top_p) for top_p, cfg in pairs]

    def settings(self) -> dict[str, Any]:
        """What all cells depend on, as JSON values. ValueError: a label or an option is out of range."""
        return {"cells": [self._settings(self._images(*pair)) for pair in self._pairs]}

    def compute(
        self, kept: Kept, cache: Path, *, device: torch.device, progress: bool = False
    ) -> list[dict[str, Any]]:
        """The report of each cell, with its cfg and top_p, by rows of top_p; finished cells are kept.

        Args:
            kept: results of cells.
            cache: of features, which ranks share: a cell that was stopped goes on.

        Returns:
            Those of the cells; on ranks other than 0, which help with features alone, none but finished ones.

        Raises:
            As `evaluate_fid`.
        """
        found = []
        for cfg, top_p in tqdm(self._pairs, desc="guidance x top-p", unit="cell", disable=not progress):
            images = self._images(cfg, top_p)
            name, settings = f"guidance/cfg-{cfg:g}-top-p-{top_p:g}", self._settings(images)
            cell = kept.read(name, settings)
            if cell is None:
                report = evaluate_fid(
                    images,
                    self.reference,
                    self.extractor,
                    cache=cache,
                    batch_size=self.batch_size,
                    device=device,
                    progress=progress,
                )
                if report is None:  # another rank has it
                    continue
                cell = kept.write(name, settings, {"cfg": cfg, "top_p": top_p, **report.as_dict()})
            found.append(cell)
        return found

    def _settings(self, images: DrawnImages) -> dict[str, Any]:
        return {
            "images": images.key,
            "reference": reference_key(self.reference),
            "space": self.extractor.key,
            "batch_size": self.batch_size,
        }

    def _images(self, cfg: float, top_p: float) -> DrawnImages:
        options = {**self.sampler.defaults, **self.options, "cfg": cfg, "top_p": top_p}
        self.sampler.options(**options)  # refuses what is out of range
        plan = evaluation_plan(self.labels, self.per_class, self.seed, batch_size=self.batch_size, **options)
        return DrawnImages(self.sampler, plan, self.name)


def reference_key(reference: Reference) -> str:
    """Digest of what figures depend on of a reference."""
    digest = hashlib.blake2b(digest_size=16)
    for field, gaussian in sorted(reference.statistics.items()):
        digest.update(field.encode())
        for tensor in gaussian:
            digest.update(tensor.contiguous().numpy().tobytes())
    digest.update(b"" if reference.images is None else reference.images.key.encode())
    return digest.hexdigest()
