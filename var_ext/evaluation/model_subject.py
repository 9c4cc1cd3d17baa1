"""What a model's page is made of: its numbers, the model and what it is compared with, and the form of a section."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from var_ext.data import ImageDataset
from var_ext.evaluation.digits import settings_of
from var_ext.evaluation.feature_store import BATCH
from var_ext.evaluation.features import Extractor
from var_ext.evaluation.fid_reference import Reference
from var_ext.sampling import Sampler

CELL = 100  # images of a cell of the grid, at least
JUDGED = 200  # samples whose classes are judged, at least


@dataclass(frozen=True)
class ReportOptions:
    """Numbers of a page; those of images are per what is said.

    Attributes:
        labels, count, seed: classes (None: all, or 8 of many), images of each, and the first seed, of the picture.
        sampling: cfg, top_k and top_p of samples; missing ones, and None, are the model's. The grid takes its top_k.
        grid_cfg, grid_top_p: the grid's values.
        grid_labels, per_class: classes of a cell (None: all), and images of each (None: as few as make `CELL`).
        speed_batches, repeats: images drawn at once, and timed runs of each.
        reconstructions: held-out images that the tokenizer gives back.
        neighbours, search: samples, and as many held-out images, whose nearest ones are searched among at most `search`
            training images, evenly spaced in the data.
        class_images: samples of each class that a probe judges (None: as few as make `JUDGED`), and held-out images
            beside them, at most.
        batch_size: images drawn, or computed, at once.
    """

    labels: Sequence[int] | None = None
    count: int = 8
    seed: int = 0
    sampling: Mapping[str, Any] = field(default_factory=dict)
    grid_cfg: Sequence[float] = (0.0, 1.0, 1.5, 3.0)
    grid_top_p: Sequence[float] = (0.9, 0.96)
    grid_labels: Sequence[int] | None = None
    per_class: int | None = None
    speed_batches: Sequence[int] = (1, 16)
    repeats: int = 3
    reconstructions: int = 64
    neighbours: int = 100
    search: int = 10_000
    class_images: int | None = None
    batch_size: int = BATCH

    def __post_init__(self) -> None:
        names = ("count", "repeats", "reconstructions", "neighbours", "search", "batch_size")
        numbers = {name: getattr(self, name) for name in names}
        optional = {name: getattr(self, name) for name in ("per_class", "class_images")}
        numbers |= {name: value for name, value in optional.items() if value is not None}
        numbers |= {f"speed_batches[{i}]": batch for i, batch in enumerate(self.speed_batches)}
        wrong = [f"{name} {value}" for name, value in numbers.items() if value < 1]
        if wrong:
            raise ValueError(f"numbers of a page must be at least 1, got {', '.join(wrong)}")
        if not (self.grid_cfg and self.grid_top_p and self.speed_batches):
            raise ValueError(
                f"there must be a cfg, a top_p and a batch size to try, got {list(self.grid_cfg)}, "
                f"{list(self.grid_top_p)} and {list(self.speed_batches)}"
            )


@dataclass(frozen=True)
class Subject:
    """What a page is of.

    Attributes:
        sampler, name, digest: the model, its name and the digest of its weights.
        facts, machine: what is said of the model, and of what it runs on, by label.
        folder, cache: of the page, and of features.
        train, held_out: splits of data of the model's size, or None.
        reference, extractor: of the grid, and the space; without an extractor neighbours are searched in pixels.
    """

    sampler: Sampler
    name: str
    digest: str
    options: ReportOptions
    folder: Path
    cache: Path
    facts: Mapping[str, str]
    machine: Mapping[str, str]
    train: ImageDataset | None = None
    held_out: ImageDataset | None = None
    reference: Reference | None = None
    extractor: Extractor | None = None
    progress: bool = False

    @property
    def sampling(self) -> dict[str, Any]:
        """cfg, top_k and top_p of samples."""
        given = {name: self.options.sampling.get(name) for name in ("cfg", "top_k", "top_p")}
        return settings_of(self.sampler, **given)

    @property
    def drawing(self) -> dict[str, Any]:
        """What images drawn from it depend on besides labels, seeds and sampling."""
        device, precision = self.sampler.device.type, self.sampler.precision.name
        return {
            "model": self.digest, "device": device, "precision": precision, "batch_size": self.options.batch_size,
        }  # fmt: skip

    @property
    def space(self) -> str:
        """The extractor's key, or "pixels"."""
        return "pixels" if self.extractor is None else self.extractor.key


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        name, title: of its files, and its heading.
        settings: JSON values that the result depends on.
        compute: makes the result, of JSON values; its pictures go to files.
        show: the result as Markdown.
        files: that `compute` makes in the page's folder.
        share: what ranks other than 0 do of `compute`.
        lacking: why it is left out, and what to give; empty where it is not.
    """

    name: str
    title: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    compute: Callable[[], dict[str, Any]] = dict
    show: Callable[[dict[str, Any]], str] = str
    files: tuple[str, ...] = ()
    share: Callable[[], object] = lambda: None
    lacking: str = ""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def said(sampling: Mapping[str, Any]) -> str:
    """Names and values, for a sentence."""
    return ", ".join(f"{name} {value}" for name, value in sampling.items())
