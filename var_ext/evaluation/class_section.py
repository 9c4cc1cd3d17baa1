"""The section of a model's page on its classes: do samples show what was asked for, as variedly as real images?"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from var_ext.evaluation.class_figures import LinearProbe, spread
from var_ext.evaluation.dataset_images import DatasetImages
from var_ext.evaluation.feature_store import FeatureStore, Field
from var_ext.evaluation.image_sources import DrawnImages, Images
from var_ext.evaluation.model_subject import JUDGED, Section, Subject, said, table
from var_ext.export import evaluation_plan
from var_ext.show import class_name

MOST = 50  # classes that have a row of their own


def classes(of: Subject) -> Section:
    """Share of samples that a linear probe gives the class that was asked for, and the spread within a class."""
    title, options, sampler = "Classes", of.options, of.sampler
    name, total = "classes", sampler.num_classes
    if of.train is None or of.held_out is None or of.extractor is None:
        return Section(name, title, lacking="give `--data` with the weights of a space, such as `--lite0`")
    if of.train.num_classes != total:
        return Section(
            name, title, lacking=f"the data has {of.train.num_classes} classes and the model {total}"
        )
    extractor, train = of.extractor, DatasetImages(of.train, options.search)
    if len(set(train.labels or ())) < total:
        return Section(
            name,
            title,
            lacking=f"{train.count} of {train.total} training images are searched, not some of each of the {total} "
            "classes: give a larger `--search`",
        )
    per_class = options.class_images or -(-JUDGED // total)
    plan = evaluation_plan(
        range(total), per_class, options.seed, batch_size=options.batch_size, **of.sampling
    )
    sets: dict[str, Images] = {
        "train": train,
        "held_out": DatasetImages(of.held_out, total * per_class),
        "samples": DrawnImages(sampler, plan, of.name),
    }
    stores = {
        key: FeatureStore(of.cache, images, extractor, batch_size=options.batch_size)
        for key, images in sets.items()
    }

    def share() -> None:
        for key, store in stores.items():
            store.fill(f"features of {key.replace('_', '-')} images", progress=of.progress)

    def compute() -> dict[str, Any]:
        share()
        found: dict[str, tuple[Tensor, Tensor]] = {
            key: (Field(store, extractor.main)[:], torch.tensor(list(sets[key].labels or ())))
            for key, store in stores.items()
        }
        probe = LinearProbe(*found["train"], total)
        figures = {
            key: (probe.accuracy(*found[key]), spread(*found[key], total)) for key in ("held_out", "samples")
        }
        rows = []
        for label in range(total):
            (accuracy, mine), (real, theirs) = (
                (shares[label], spreads[label])
                for shares, spreads in (figures["samples"], figures["held_out"])
            )
            known = theirs > 0 and not math.isnan(mine)
            rows.append(
                {
                    "class": class_name(sampler.class_names, label),
                    "samples": accuracy,
                    "held_out": None if math.isnan(real) else real,  # held-out images may lack a class
                    "spread": mine / theirs if known else None,
                }
            )
        counts = {key: images.count for key, images in sets.items()}
        return {"rows": rows, "counts": counts, "sampling": of.sampling}

    def show(result: dict[str, Any]) -> str:
        rows, counts = result["rows"], result["counts"]
        keys = ("samples", "held_out", "spread")
        lines = [("all", *(_mean([row[key] for row in rows], key) for key in keys))]
        lines += [(row["class"], *(_mean([row[key]], key) for key in keys)) for row in rows[:MOST]]
        left = f" Rows of the first {MOST} classes are shown." if len(rows) > MOST else ""
        return (
            f"A linear probe in the space of {extractor.titles[extractor.main]}, fitted to {counts['train']} "
            f"training images, judges {counts['samples']} samples ({said(result['sampling'])}) and "
            f"{counts['held_out']} held-out images. Spread: mean squared distance of two images of a class, over that "
            f"of held-out images; well below 1 is a class that lacks variety.{left}\n\n"
            + table(("class", "samples it takes for it", "held-out images", "spread"), lines)
        )

    settings = {
        **of.drawing,
        "sampling": of.sampling,
        "class_images": per_class,
        "seed": options.seed,
        "train": train.key,
        "held_out": sets["held_out"].key,
        "space": of.space,
    }
    return Section(name, title, settings, compute, show, share=share)


def _mean(values: list[float | None], key: str) -> str:
    """The mean of what is known, as text."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean = sum(known) / len(known)
    return f"{mean:.2f}" if key == "spread" else f"{mean:.1%}"
