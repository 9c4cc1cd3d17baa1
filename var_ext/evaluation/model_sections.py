"""The sections of a model's page that are of the model alone: its facts, samples, speed and tokenizer."""

from __future__ import annotations

from dataclasses import asdict
from time import strftime
from typing import Any

import torch

from var_ext.bench import Timing, measure
from var_ext.evaluation.model_subject import Section, Subject, said, table
from var_ext.evaluation.plots import NO_PLOTS, installed
from var_ext.evaluation.tokenizer import evaluate_tokenizer
from var_ext.grid import labelled_grid, save_picture, shown_classes
from var_ext.show import class_name


def facts_section(of: Subject) -> Section:
    """The model's facts, versions, machine and date."""
    rows = {
        **of.facts,
        "sampling": said(of.sampler.defaults),
        "digest": of.digest,
        "precision": of.sampler.precision.name,
        **of.machine,
    }
    return Section(
        "facts",
        "The model and its surroundings",
        rows,
        lambda: {**rows, "date": strftime("%Y-%m-%d %H:%M %z")},
        lambda result: table(("of", "fact"), list(result.items())),
    )


def samples(of: Subject) -> Section:
    """A picture: classes by seeds. ValueError: a label or an option is out of range."""
    options, sampler, sampling = of.options, of.sampler, of.sampling
    labels = shown_classes(sampler.num_classes) if options.labels is None else list(options.labels)
    seeds = list(range(options.seed, options.seed + options.count))
    sampler.var.checked_labels(torch.tensor(labels))  # before any work
    sampler.options(**sampling)

    def compute() -> dict[str, Any]:
        pairs = [(label, seed) for label in labels for seed in seeds]
        images = sampler(*map(list, zip(*pairs, strict=True)), batch_size=options.batch_size, **sampling)
        names = [class_name(sampler.class_names, label) for label in labels]
        save_picture(
            labelled_grid(images.cpu(), names, [str(seed) for seed in seeds]), of.folder / "samples.png"
        )
        return {"sampling": sampling, "precision": sampler.precision.name}

    def show(result: dict[str, Any]) -> str:
        how = f"{said(result['sampling'])}, {result['precision']}"
        return f"Rows are classes, columns seeds; {how}.\n\n![Samples by class and seed](samples.png)"

    settings = {**of.drawing, "labels": labels, "seeds": seeds, "sampling": sampling}
    return Section("samples", "Samples by class and seed", settings, compute, show, ("samples.png",))


def speed(of: Subject) -> Section:
    """Images per second by batch size, and where the time goes."""
    options, sampler = of.options, of.sampler
    settings = {
        "model": of.digest,
        "machine": dict(of.machine),
        "device": str(sampler.device),
        "precision": sampler.precision.name,
        "sampling": sampler.defaults,
        "batches": list(options.speed_batches),
        "repeats": options.repeats,
    }

    def compute() -> dict[str, Any]:
        timings = [measure(sampler, batch, repeats=options.repeats) for batch in options.speed_batches]
        return {"timings": [asdict(timing) for timing in timings]}

    def show(result: dict[str, Any]) -> str:
        rows, parts = [], ("transformer, all scales", "drawing tokens", "residual steps", "decoder")
        for timing in (Timing(**values) for values in result["timings"]):
            spent = timing.parts()
            ends = (f"{timing.batch}", f"{timing.images_per_second:.3g}", f"{1e3 * timing.total:.4g}")
            rows.append((*ends, *(f"{1e3 * spent[part]:.4g}" for part in parts)))
        return (
            f"{settings['precision']} on {settings['device']}, from labels and seeds to pixels, "
            f"{said(sampler.defaults)}; medians of {options.repeats} runs, parts in ms.\n\n"
            + table(("batch", "images/s", "ms", *parts), rows)
        )

    return Section("speed", "Speed", settings, compute, show)


def reconstructions(of: Subject) -> Section:
    """What the tokenizer gives back of held-out images, scale by scale."""
    title, options, data = "Reconstruction by scales", of.options, of.held_out
    if data is None:
        return Section("reconstructions", title, lacking="give `--data DATA`, images to give back")
    plots = ["tokenizer/scales.png"] if installed() else []  # made once it is
    files = ("tokenizer/tokenizer.md", "tokenizer/reconstructions.png", *plots)

    def compute() -> dict[str, Any]:
        report = evaluate_tokenizer(
            of.sampler.vae,
            data,
            count=options.reconstructions,
            batch_size=options.batch_size,
            spaces=[] if of.extractor is None else [of.extractor.space()],
            perturbed_tokens=None,
            device=of.sampler.device,
            progress=of.progress,
        )
        report.write(of.folder / "tokenizer", f"The tokenizer of {of.name}")
        return {"figures": report.as_dict(), "text": report.as_markdown()}

    def show(result: dict[str, Any]) -> str:
        pictures = {
            "reconstructions.png": "Images, and their reconstructions from more and more scales",
            "scales.png": "Codes in use, perplexity and PSNR by scale",
        }
        shown = [
            f"![{caption}](tokenizer/{name})"
            for name, caption in pictures.items()
            if (of.folder / "tokenizer" / name).is_file()
        ]
        lacking = [] if len(shown) == len(pictures) else [NO_PLOTS]
        return "\n\n".join([result["text"].rstrip(), *shown, *lacking])

    settings = {
        "model": of.digest,
        "device": of.sampler.device.type,
        "data": data.fingerprint(),
        "spec": data.spec,
        "count": options.reconstructions,
        "batch_size": options.batch_size,
        "space": of.space,
    }
    return Section("reconstructions", title, settings, compute, show, files)
