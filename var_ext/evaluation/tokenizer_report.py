"""What `evaluate_tokenizer` found, as values, JSON, Markdown and a page with pictures."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from var_ext.checkpoints import atomic_write
from var_ext.evaluation.plots import NO_PLOTS, curves, scale_bars
from var_ext.grid import labelled_grid, save_picture
from var_ext.training.log import read_log
from var_ext.training.usage import ENOUGH

PAGE = "tokenizer.md"


@dataclass(frozen=True)
class ScaleRow:
    """One scale; `psnr` (dB) and `ssim` are of reconstructions from this scale and the coarser ones, where decoded."""

    side: int
    tokens: int  # of all images
    codes: int  # different ones among them
    allowed: float  # so many would be different if all codes were equally likely
    perplexity: float
    psnr: float | None
    ssim: float | None

    @property
    def share(self) -> float:
        """Of the codes that the tokens allow, those that are used."""
        return self.codes / self.allowed


@dataclass(frozen=True)
class Distance:
    """Fréchet distances to the images in one feature space, such as "FID"."""

    name: str
    reconstructions: float
    perturbed: float | None = None  # of reconstructions from perturbed tokens


@dataclass(frozen=True)
class TokenizerReport:
    """Result of `evaluate_tokenizer`; images are in [0, 1] for all figures but LPIPS."""

    data: str
    reading: str  # geometry and decoding of picture files, empty for other data
    count: int
    image_size: int
    vocab_size: int
    psnr: float  # mean over images, dB, each at most 100
    ssim: float
    l1: float
    l2: float
    lpips: float | None
    lpips_name: str | None  # which one, such as lpips-vgg
    distances: tuple[Distance, ...]  # one a feature space
    perturbed_tokens: float | None
    perturbed_codes: int
    scales: tuple[ScaleRow, ...]
    # images and their reconstructions by scales, (n, 1 + K, 3, S, S); None: these were not decoded
    shown: Tensor | None = field(repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        lists = ("distances", "scales", "shown")
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in lists}
        scales = [{**asdict(row), "share": row.share} for row in self.scales]
        return {**values, "distances": [asdict(each) for each in self.distances], "scales": scales}

    def as_markdown(self) -> str:
        """Two tables: the whole, and scale by scale."""
        rows = [
            ("PSNR (dB)", f"{self.psnr:.2f}"),
            ("SSIM", f"{self.ssim:.4f}"),
            ("mean absolute error", f"{self.l1:.4f}"),
        ]
        if self.lpips is not None:
            rows.append((f"LPIPS ({self.lpips_name})", f"{self.lpips:.4f}"))
        for each in self.distances:
            rows.append((f"r{each.name}", f"{each.reconstructions:.2f}"))
            if each.perturbed is not None:
                wrong = (
                    f"{self.perturbed_tokens:.0%} of tokens replaced by one of {self.perturbed_codes} nearest"
                )
                rows.append((f"p{each.name}, with {wrong}", f"{each.perturbed:.2f}"))
        lines = [
            f"{self.count} images of {self.data}{self.reading and f', read {self.reading}'}; {self.image_size} px, "
            f"{self.vocab_size} codes.",
            "",
            "| measure | reconstructions |",
            "| --- | --- |",
            *(f"| {name} | {value} |" for name, value in rows),
            "",
            "| scale | tokens | codes in use | of those allowed | perplexity |"
            + (" PSNR up to it | SSIM up to it |" if self.shown is not None else ""),
            "| --- | --- | --- | --- | --- |" + (" --- | --- |" if self.shown is not None else ""),
        ]
        for row in self.scales:
            share = f"{row.share:.0%} of {row.allowed:.0f}" + (" (few)" if row.share < ENOUGH else "")
            quality = "" if row.psnr is None else f" {row.psnr:.2f} | {row.ssim:.4f} |"
            lines.append(
                f"| {row.side} x {row.side} | {row.tokens} | {row.codes} | {share} | {row.perplexity:.1f} |{quality}"
            )
        lines += [
            "",
            "A scale's tokens allow as many codes as they would have on average if all codes were equally likely. PSNR "
            "is the mean over images, each at most 100 dB, that of an equal image.",
        ]
        if self.distances:
            lines.append(
                "Fréchet distances are to the same crops, of reconstructions truncated to bytes. They grow as images "
                "get fewer: compare them at equal counts."
            )
        return "\n".join(lines) + "\n"

    def write(self, folder: Path, title: str, log: Path | None = None) -> Path:
        """A page with the tables, the pictures that sharpen scale by scale, and plots where matplotlib is installed.

        Args:
            folder: created if missing.
            title: of the page.
            log: log.jsonl of the training, whose course is plotted too; None, or a file that is not there: no course.

        Returns:
            the page, `folder`/tokenizer.md.

        Raises:
            CheckpointError: a file cannot be written.
        """
        text = [f"# {title}", "", self.as_markdown()]
        caption = "Codes in use and perplexity by scale"
        if self.shown is not None:
            caption = "Codes in use, perplexity and PSNR by scale"
            columns = ["image", *(f"1 .. {row.side}" if row.side > 1 else "1" for row in self.scales)]
            names = [str(i) for i in range(len(self.shown))]
            picture = labelled_grid(self.shown.flatten(0, 1), names, columns)
            save_picture(picture, folder / "reconstructions.png")
            text += [
                "## From the coarsest scale to all", "",
                "![Images, and their reconstructions from more and more scales](reconstructions.png)", "",
            ]  # fmt: skip
        text += ["## Plots", ""]
        try:
            figures = {"scales.png": (scale_bars(self.scales), caption)}
            if log is not None and log.exists():
                figures["course.png"] = (curves(read_log(log)), "The course of the training")
        except ImportError:
            text.append(NO_PLOTS)
        else:
            for name, (plot, caption) in figures.items():
                with atomic_write(folder / name) as handle:
                    handle.write(plot)
                text += [f"![{caption}]({name})", ""]
        page = folder / PAGE
        with atomic_write(page) as handle:
            handle.write(("\n".join(text).rstrip() + "\n").encode())
        return page
