"""What an evaluation found, as values, JSON and Markdown."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class FrechetTable:
    """Squared Fréchet distances to the real split in the judge's fixed feature space.

    The plain figures use all images. The estimate is biased upwards for small sets, so each
    `*_half` figure compares two sets of the size of half the real split, class by class, averaged over
    `draws` random draws; only those can be compared with `halves`, the distance between the two halves
    themselves (of which `halves_sd` is the standard deviation over the draws).
    """

    samples: float  # all samples against the real split
    train: float  # all training images against it: what a sampler of real digits would get
    reconstructions: (
        float  # tokenizer's reconstructions of the split against the split itself, the same images
    )
    half_size: int
    draws: int
    halves: float
    halves_sd: float
    samples_half: float
    train_half: float
    reconstructions_half: float  # reconstructions of one half against the other half

    @property
    def ratio(self) -> float:
        """Samples over real halves, equal set sizes: 1 is indistinguishable from real. The criterion."""
        return self.samples_half / self.halves

    @property
    def plain_ratio(self) -> float:
        """All samples against the whole split, over real halves: flattered by the larger sets."""
        return self.samples / self.halves


@dataclass(frozen=True)
class NeighbourTable:
    """Pixel L2 (grey in [0, 1], whole image) of samples and of real images to the nearest training image.

    `near` is the share of samples below `threshold`, the 1st percentile of the real distances: about 1% if
    samples differ from the training set as much as real images.
    """

    samples_median: float
    real_median: float
    threshold: float
    near: float

    def row(self, name: str) -> tuple[str, str, str, str]:
        """Two report lines in one: medians, and the share that is too near."""
        near = f"{_share(self.near)} below {self.threshold:.2f}"
        return (
            name,
            f"{self.samples_median:.2f} ({near})",
            f"{self.real_median:.2f} (1% below)",
            "",
        )


@dataclass(frozen=True)
class DigitsReport:
    """Result of `evaluate_digits`. Shares and accuracies are in [0, 1]."""

    split: str
    image_size: int
    num_train: int
    num_real: int
    num_samples: int
    seed: int
    sampling: dict[str, Any]  # cfg, top_k, top_p used
    accuracy: float  # share of samples whose predicted class is the requested one
    class_accuracy: tuple[float, ...]  # the same per class
    real_accuracy: float  # the classifier on the real split
    reconstruction_accuracy: float  # the classifier on its reconstructions
    frechet: FrechetTable
    neighbours: NeighbourTable  # among the training images
    neighbours_augmented: NeighbourTable  # and their augmented versions as well
    neighbours_coded: NeighbourTable  # among their reconstructions; the real images are reconstructed too
    samples_spread: float  # mean pixel L2 between two images of one class
    real_spread: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with both ratios."""
        found = asdict(self)
        found["class_accuracy"] = list(self.class_accuracy)
        found["frechet"] |= {
            "ratio": self.frechet.ratio,
            "plain_ratio": self.frechet.plain_ratio,
        }
        return found

    def as_markdown(self) -> str:
        """A table comparing samples with real images, and what each line means."""
        f, half = self.frechet, self.frechet.half_size
        settings = ", ".join(f"{name} {value}" for name, value in self.sampling.items())
        worst = min(range(len(self.class_accuracy)), key=lambda c: self.class_accuracy[c])
        rows = [
            ("predicted class is the asked one", _share(self.accuracy), _share(self.real_accuracy),
             _share(self.reconstruction_accuracy)),
            (f"- worst class ({worst})", _share(self.class_accuracy[worst]), "", ""),
            (f"Fréchet distance, {half} against {half} images", f"{f.samples_half:.2f}",
             f"{f.halves:.2f} ± {f.halves_sd:.2f}", f"{f.reconstructions_half:.2f}"),
            (f"- over that of two real halves (goal: at most 3; {f.draws} draws)", f"**{f.ratio:.2f}**", "1",
             f"{f.reconstructions_half / f.halves:.2f}"),
            (f"Fréchet distance, all images against all {self.num_real}", f"{f.samples:.2f}",
             f"{f.train:.2f} (training)", f"{f.reconstructions:.2f}"),
            ("- over that of two real halves (larger sets: flattering)", f"{f.plain_ratio:.2f}", "", ""),
            self.neighbours.row("nearest training image: median pixel L2 (too near)"),
            self.neighbours_augmented.row("- augmented training images among them"),
            self.neighbours_coded.row("- all seen through the tokenizer"),
            ("mean pixel L2 between two images of a class", f"{self.samples_spread:.2f}",
             f"{self.real_spread:.2f}", ""),
        ]  # fmt: skip
        samples = f"{self.num_samples} samples ({settings}, seeds from {self.seed})"
        real = f'{self.num_real} real images of the "{self.split}" split'
        head = [
            f"{samples} beside {real}; {self.num_train} training images; {self.image_size} px.",
            "",
            f'| measure | samples | real "{self.split}" | reconstructions |',
            "| --- | --- | --- | --- |",
        ]
        return "\n".join(head + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def _share(value: float) -> str:
    return f"{100 * value:.1f}%"
