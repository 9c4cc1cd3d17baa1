"""`write_model_report`: a page a model, with pictures, figures and plots; a stopped run goes on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from var_ext.checkpoints import atomic_write
from var_ext.checkpoints.digests import digest_of_entries
from var_ext.data import DataError, ImageDataset
from var_ext.evaluation.class_section import classes
from var_ext.evaluation.comparing_sections import guidance, neighbours
from var_ext.evaluation.dataset_images import DatasetImages
from var_ext.evaluation.features import Extractor
from var_ext.evaluation.fid_reference import Reference
from var_ext.evaluation.kept import Kept
from var_ext.evaluation.model_sections import facts_section, reconstructions, samples, speed
from var_ext.evaluation.model_subject import ReportOptions, Section, Subject
from var_ext.evaluation.similarity import LEAST
from var_ext.export import rank_and_world
from var_ext.sampling import Sampler

PAGE = "report.md"
SECTIONS = (facts_section, samples, speed, reconstructions, classes, neighbours, guidance)  # the longest last


def write_model_report(
    sampler: Sampler,
    name: str,
    folder: Path,
    *,
    options: ReportOptions | None = None,
    data: tuple[ImageDataset, ImageDataset] | None = None,
    reference: Reference | None = None,
    extractor: Extractor | None = None,
    facts: Mapping[str, str] | None = None,
    machine: Mapping[str, str] | None = None,
    cache: Path | None = None,
    progress: bool = False,
) -> Path | None:
    """Measures a model and writes a page of it, `folder`/report.md.

    Each section's result is kept beside the page as JSON with what it depends on, and each cell of the guidance grid
    too: the same call goes on after a kill, and computes only what is not there or depends on something that changed.
    The page is written anew after each section that was computed. Ranks share features.

    Args:
        sampler, name: the model.
        options: numbers; None: the defaults of `ReportOptions`.
        data: training and held-out images of the model's size, for reconstructions and nearest training images, which
            are left out without.
        reference: of the guidance grid; None: with `data` and an extractor the training images, else it is left out.
        extractor: the space of distances, see `features`.
        facts, machine: what is said of the model, and of what it runs on; timings are made anew where it changed.
        cache: of features; None: `folder`/features.

    Returns:
        the page; None on ranks other than 0.

    Raises:
        ValueError: a label or a number is out of range, data is of another size than the model's images or too small
            for SSIM, or a reference without an extractor.
        DataError: a reference of another size, or images that cannot be read.
        CheckpointError: a file cannot be written, or another rank is lost.
    """
    options = options or ReportOptions()
    _check(sampler, data, reference, extractor)
    if reference is None and data is not None and extractor is not None:
        images = DatasetImages(data[0], options.search)
        reference = Reference(f"{images.count} of {images.total} images of {images.name}", {}, images)
    train, held_out = data or (None, None)
    of = Subject(
        sampler, name, digest(sampler), options, folder, cache or folder / "features", facts or {}, machine or {},
        train, held_out, reference, extractor, progress and rank_and_world()[0] == 0,
    )  # fmt: skip
    kept, rank = Kept(folder), rank_and_world()[0]
    parts = [section(of) for section in SECTIONS]
    found = {part.name: kept.read(part.name, part.settings, part.files) for part in parts if not part.lacking}
    for part in parts:
        if part.lacking or found[part.name] is not None:
            continue
        if rank:
            part.share()
            continue
        found[part.name] = kept.write(part.name, part.settings, part.compute())
        _write(folder / PAGE, name, parts, found)
    if rank:
        return None
    return _write(folder / PAGE, name, parts, found)


def digest(sampler: Sampler) -> str:
    """Hex digest of the weights of tokenizer and transformer. RuntimeError if these were released."""
    if sampler.engine.released:
        raise RuntimeError("a page tells the digest of weights, and this sampler has released them")
    return digest_of_entries(
        {
            f"{which}.{name}": entry
            for which, model in (("vae", sampler.vae), ("var", sampler.var))
            for name, entry in model.state_dict().items()
        }
    )


def _check(
    sampler: Sampler,
    data: tuple[ImageDataset, ImageDataset] | None,
    reference: Reference | None,
    extractor: Extractor | None,
) -> None:
    side = sampler.image_size
    for split in data or ():
        if split.image_size != side:
            raise ValueError(f"data must be of the model's {side} px, got {split.image_size}")
    if data is not None and side < LEAST:
        raise ValueError(
            f"with data, images must have at least {LEAST} px, for SSIM, and this model's have {side}: leave the data "
            "out"
        )
    if reference is not None and extractor is None:
        raise ValueError(f"the reference {reference.name} must come with an extractor, got none")
    if reference is not None and reference.images is not None and reference.images.size != (side, side):
        height, width = reference.images.size
        raise DataError(
            f"the reference must have images of the model's {side} x {side}, got {width} x {height} in "
            f"{reference.name}: take one of this size, or of a folder --image-size {side}, which crops and resizes"
        )


def _write(
    page: Path, name: str, parts: list[Section], found: Mapping[str, dict[str, object] | None]
) -> Path:
    text = [f"# The model {name}"]
    for part in parts:
        result = found.get(part.name)
        if part.lacking:
            body = f"Left out: {part.lacking}."
        else:
            body = "Not done yet: the same command goes on." if result is None else part.show(result)
        text += [f"## {part.title}", body]
    with atomic_write(page) as handle:
        handle.write(("\n\n".join(text) + "\n").encode())
    return page
