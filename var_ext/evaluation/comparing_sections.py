"""The sections of a model's page that compare samples with real images: nearest ones, and distances over guidance."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from var_ext.checkpoints import atomic_write
from var_ext.evaluation.dataset_images import DatasetImages
from var_ext.evaluation.digits import compare_neighbours
from var_ext.evaluation.guidance_grid import GuidanceGrid
from var_ext.evaluation.image_sources import DrawnImages
from var_ext.evaluation.kept import Kept
from var_ext.evaluation.model_subject import CELL, Section, Subject, said, table
from var_ext.evaluation.neighbours import Searched, nearest
from var_ext.evaluation.plots import NO_PLOTS, trade_off
from var_ext.evaluation.report import NeighbourTable
from var_ext.evaluation.tokenizer import evenly
from var_ext.export import Plan
from var_ext.grid import labelled_grid, save_picture
from var_ext.show import class_name

NEAREST, SHOWN = 3, 6  # training images beside a sample in the picture, and samples in it


def guidance(of: Subject) -> Section:
    """Distances and their kin over guidance and top-p."""
    title, options = "Guidance x top-p", of.options
    if of.reference is None or of.extractor is None:
        return Section(
            "guidance",
            title,
            lacking="give `--reference REF`, as `var-ext eval fid` takes it: ADM's .npz, or a folder of pictures; or "
            "`--data` with the weights of a space (`--weights`, `--lite0`, `--vit` or `--clip`), whose training images "
            "then serve",
        )
    labels = range(of.sampler.num_classes) if options.grid_labels is None else options.grid_labels
    grid = GuidanceGrid(
        of.sampler,
        of.name,
        {name: value for name, value in of.sampling.items() if name == "top_k"},
        options.grid_cfg,
        options.grid_top_p,
        labels,
        options.per_class or -(-CELL // len(labels)),
        options.seed,
        of.reference,
        of.extractor,
        options.batch_size,
    )
    distance = of.extractor.titles[of.extractor.main]

    def compute() -> dict[str, Any]:
        return {
            "cells": grid.compute(Kept(of.folder), of.cache, device=of.sampler.device, progress=of.progress)
        }

    def show(result: dict[str, Any]) -> str:
        cells = result["cells"]
        best = min(cell["figures"][distance] for cell in cells)
        names = [n for n in cells[0]["figures"] if not any(x in n for x in ("fp32", "deviation", "shuffled"))]
        rows = []
        for cell in cells:
            values = [f"{cell['figures'][name]:.4g}" for name in names]
            if cell["figures"][distance] == best:
                values[names.index(distance)] = f"**{values[names.index(distance)]}**"
            rows.append((f"{cell['cfg']:g}", _top_p(cell["top_p"]), *values))
        lines = [table(("cfg", "top-p", *names), rows), ""]
        try:
            picture = trade_off(cells, distance)
            with atomic_write(of.folder / "trade-off.png") as handle:
                handle.write(picture)
            lines += ["![The trade-off of quality and variety](trade-off.png)", ""]
        except ImportError:
            lines += [NO_PLOTS, ""]
        how = f"All cells draw the same classes with the same seeds; top_k {of.sampling['top_k']}. "
        lines += [f"{how}How figures are made, those of the first cell:", ""]
        lines.append(table(("of", "convention"), list(cells[0]["conventions"].items())))
        warnings = dict.fromkeys(text for cell in cells for text in cell["warnings"])
        return "\n".join([*lines, "", *(f"- Beware: {text}." for text in warnings)]).rstrip()

    return Section("guidance", title, grid.settings(), compute, show, share=compute)


def _top_p(value: float) -> str:
    return f"{value:g}" if 0 < value < 1 else f"{value:g} (all)"


def neighbours(of: Subject) -> Section:
    """The training images that are nearest to samples, and distances beside those of held-out images."""
    title, options, sampler = "Nearest training images", of.options, of.sampler
    if of.train is None or of.held_out is None:
        return Section(
            "neighbours", title, lacking="give `--data DATA`, the images that the model learned from"
        )
    some = evenly(min(options.neighbours, sampler.num_classes), sampler.num_classes).tolist()
    labels = [some[i % len(some)] for i in range(options.neighbours)]
    seeds = range(options.seed, options.seed + len(labels))
    plan = Plan(tuple(labels), tuple(seeds), of.sampling, options.batch_size)
    drawn, train = DrawnImages(sampler, plan, of.name), DatasetImages(of.train, options.search)
    real = DatasetImages(of.held_out, options.neighbours)
    searched = Searched(train, of.extractor, of.cache, batch_size=options.batch_size)

    def share() -> None:
        searched.fill(progress=of.progress)

    def compute() -> dict[str, Any]:
        share()
        pixels = np.concatenate([drawn.load(block) for block in drawn.blocks])
        others = np.concatenate([real.load(block) for block in real.blocks])
        queries = searched.features(np.concatenate([pixels, others]))
        found, places = nearest(queries, searched.rows(), NEAREST)
        mine, theirs = found[: len(pixels), 0], found[len(pixels) :, 0]
        order = mine.argsort(stable=True)[:SHOWN].tolist()
        row = np.concatenate([_beside(train, pixels[i], places[i].tolist()) for i in order])
        names = [f"{class_name(sampler.class_names, labels[i])}, seed {seeds[i]}" for i in order]
        columns = ["sample", *(f"{k + 1}." for k in range(found.shape[1]))]
        images = torch.from_numpy(row).permute(0, 3, 1, 2).float() / 255
        save_picture(labelled_grid(images, names, columns), of.folder / "neighbours.png")
        return {
            "table": asdict(compare_neighbours(mine, theirs)),
            "nearest": [{"name": name, "distances": found[i].tolist()} for name, i in zip(names, order, strict=True)],
            "samples": drawn.count,
            "held_out": real.count,
            "held_out_of": real.name,
            "searched": train.count,
            "training_images": train.total,
            "data": train.name,
            "classes": train.data.num_classes,
            "sampling": of.sampling,
        }  # fmt: skip

    def show(result: dict[str, Any]) -> str:
        found = NeighbourTable(**result["table"])
        where = (
            "pixels in [0, 1]"
            if of.extractor is None
            else f"the space of {of.extractor.titles[of.extractor.main]}"
        )
        among = f"{result['searched']} of {result['training_images']} training images ({result['data']})"
        lines = [
            f"L2 in {where} to the nearest of {among}: of {result['samples']} samples ({said(result['sampling'])}), "
            f"and of {result['held_out']} images that the model has not seen ({result['held_out_of']}). Samples that "
            "were copies would be much nearer than these.",
            "",
            table(
                ("distance", "samples", "held-out images"),
                [
                    ("median", f"{found.samples_median:.4g}", f"{found.real_median:.4g}"),
                    (f"below {found.threshold:.4g}, their 1st percentile", f"{found.near:.1%}", "1%"),
                ],
            ),
            "",
        ]
        if result["classes"] != sampler.num_classes:
            lines += [
                f"The data has {result['classes']} classes and the model {sampler.num_classes}: these may not be the "
                "images that it learned from.",
                "",
            ]
        lines += [
            "The nearest samples of all, and their neighbours:",
            "",
            "![Samples beside their nearest training images](neighbours.png)",
            "",
            table(
                ("sample", "distances"),
                [
                    (each["name"], ", ".join(f"{x:.4g}" for x in each["distances"]))
                    for each in result["nearest"]
                ],
            ),
        ]
        return "\n".join(lines)

    settings = {
        **of.drawing,
        "labels": labels,
        "seeds": list(seeds),
        "sampling": of.sampling,
        "train": train.key,
        "held_out": real.key,
        "space": of.space,
    }
    return Section("neighbours", title, settings, compute, show, ("neighbours.png",), share)


def _beside(train: DatasetImages, image: np.ndarray, places: list[int]) -> np.ndarray:
    """(1 + len(places), H, W, 3): an image, then training images."""
    return np.concatenate([image[None], *(train.load(range(place, place + 1)) for place in places)])
