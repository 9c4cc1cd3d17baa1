"""The figures of the avatars model: settings are chosen by training pictures, held-out ones are looked at once."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

import var_ext
from var_ext.checkpoints import load_tokenizer, save_model, write_json
from var_ext.data import load_dataset
from var_ext.evaluation import ReportOptions, evaluate_fid, write_model_report
from var_ext.evaluation.class_figures import LinearProbe, spread
from var_ext.evaluation.dataset_images import DatasetImages, ReconstructedImages
from var_ext.evaluation.feature_store import FeatureStore, Field
from var_ext.evaluation.features import Extractor
from var_ext.evaluation.fid_reference import Reference
from var_ext.evaluation.guidance_grid import GuidanceGrid
from var_ext.evaluation.image_sources import DrawnImages, Images
from var_ext.evaluation.kept import Kept
from var_ext.evaluation.scoring import Likelihood
from var_ext.export import Plan, evaluation_plan
from var_ext.selection import count_candidates

SHARES = (1.0, 0.5, 0.25)  # kept, best of n


@dataclass(frozen=True)
class Size:
    """How much is drawn: pictures a style, settings to choose from, and samples a style for each figure."""

    train: int = 6000
    held_out: int = 700
    cfgs: tuple[float, ...] = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)
    top_ps: tuple[float, ...] = (0.9, 0.96, 0.99)
    per_cell: int = 134
    per_probe: int = 100
    per_class: int = 667

    @property
    def options(self) -> ReportOptions:
        """Of the model's page."""
        return ReportOptions(
            grid_cfg=self.cfgs, grid_top_p=self.top_ps, per_class=self.per_cell, class_images=self.per_probe
        )


def assembled(work: Path, sampling: dict[str, Any] | None = None) -> Path:
    """The model as it ships: the transformer, the encoder and codes that it knows, the second decoder; fp16."""
    own = var_ext.load(work / "transformer")
    return save_model(
        work / "model",
        load_tokenizer(work / "decoder"),
        own.var,
        sampling=sampling or own.defaults,
        class_names=own.class_names,
        dtype=torch.float16,
    )


def chosen(work: Path, extractor: Extractor, size: Size) -> dict[str, Any]:
    """The guidance and top-p whose samples are nearest to training pictures."""
    sampler = var_ext.load(assembled(work))
    train = load_dataset(work / "data", "train", sampler.image_size)
    grid = GuidanceGrid(
        sampler, "avatars", {"top_k": 0}, size.cfgs, size.top_ps, range(sampler.num_classes), size.per_cell, 0,
        Reference("training pictures", {}, DatasetImages(train, ReportOptions.search)), extractor,
    )  # fmt: skip
    cells = grid.compute(Kept(work / "page"), work / "features", device=sampler.device, progress=True)
    best = min(cells, key=lambda cell: cell["figures"][extractor.titles[extractor.main]])
    return {"cfg": best["cfg"], "top_k": 0, "top_p": best["top_p"]}


class Held:
    """A model beside its data, in a feature space.

    Args:
        work: folder with data/ and features/.
    """

    def __init__(self, work: Path, sampler: var_ext.Sampler, extractor: Extractor) -> None:
        self.sampler, self.extractor, self.cache = sampler, extractor, work / "features"
        self.train, self.held_out = (
            load_dataset(work / "data", split, sampler.image_size) for split in ("train", "val")
        )

    def figures(self, images: Images) -> dict[str, Any]:
        """Of images against all held-out pictures: distance, kernel distance, precision, recall, and the report."""
        reference = Reference("held-out pictures", {}, DatasetImages(self.held_out))
        report = evaluate_fid(images, reference, self.extractor, cache=self.cache, progress=True)
        assert report is not None  # there is one rank
        suffix, values = self.extractor.suffix, report.figures
        kernel = next(name for name in (f"KD{suffix}", f"KID{suffix}") if name in values)
        return {
            "fd": values[self.extractor.titles[self.extractor.main]],
            "kd": values[kernel],
            "precision": values[f"precision fp32{suffix}"],
            "recall": values[f"recall fp32{suffix}"],
            "report": report.as_dict(),
        }

    def features(self, images: Images) -> tuple[Tensor, Tensor]:
        """(N, D) and the classes (N,) of images."""
        store = FeatureStore(self.cache, images, self.extractor)
        store.fill("features", progress=True)
        return Field(store, self.extractor.main)[:], torch.tensor(list(images.labels or ()))

    def compared(self, per_class: int) -> dict[str, Any]:
        """Figures of samples, of as many training pictures, and of what the tokenizer gives back of these."""
        plan = evaluation_plan(self.sampler.num_classes, per_class)
        real = DatasetImages(self.train, len(plan))
        sets: dict[str, Images] = {
            "samples": DrawnImages(self.sampler, plan, "avatars"),
            "reconstructions": ReconstructedImages(real, self.sampler.vae),
            "real": real,
        }
        return {name: self.figures(images) for name, images in sets.items()}

    def best_of(self, kept: int) -> list[dict[str, Any]]:
        """Figures of the images that the model finds likeliest, a row a share; always as many, of ever more seeds."""
        classes = self.sampler.num_classes
        probe = LinearProbe(*self.features(DatasetImages(self.train, ReportOptions.search)), classes)
        varied = spread(*self.features(DatasetImages(self.held_out, classes * kept)), classes)
        rows = []
        for share in SHARES:
            plan = evaluation_plan(classes, count_candidates(share, kept))
            best = self.sampler.best_of(
                plan.labels, plan.seeds, Likelihood(self.sampler), kept, progress=True
            )
            images = DrawnImages(self.sampler, Plan(tuple(best.labels), tuple(best.seeds)), "avatars")
            features = self.features(images)
            rows.append(
                {
                    "keep": share,
                    "kept": kept,
                    **self.figures(images),
                    "accuracy": fmean(probe.accuracy(*features)),
                    "spread": fmean(a / b for a, b in zip(spread(*features, classes), varied, strict=True)),
                }
            )
        return rows


def measure(work: Path, extractor: Extractor, size: Size) -> dict[str, Any]:
    """Chooses the settings, measures the model as it ships, and writes its page; what was found is quality.json."""
    sampling = chosen(work, extractor, size)
    held = Held(work, var_ext.load(assembled(work, sampling)), extractor)
    page, options = work / "page", size.options
    write_model_report(
        held.sampler, "avatars", page, options=options, data=(held.train, held.held_out), extractor=extractor,
        cache=held.cache, progress=True,
    )  # fmt: skip
    classes, neighbours = (
        json.loads((page / f"{name}.json").read_text())["result"] for name in ("classes", "neighbours")
    )
    found = {
        "sampling": sampling,
        "pictures": {"train": len(held.train), "held_out": len(held.held_out)},
        "figures": held.compared(size.per_class),
        "best": held.best_of(size.per_cell),
        "classes": classes["rows"],
        "probed": size.per_probe,
        "neighbours": neighbours["table"],
    }
    write_json(work / "quality.json", found)
    return found
