"""What zero-shot editing does, on one sheet: in-painting, out-painting, another class below a kept half, and one seed
over many classes (paper, section 4.4). Takes seconds.

python python/examples/editing_sheet.py digits --out editing.png        # any model of at least seven classes
"""

from pathlib import Path

import click
import torch

import var_ext
from var_ext.grid import labelled_grid, save_picture
from var_ext.show import class_name

EDITS = 5  # of an image


@click.command(help=__doc__)
@click.argument("model", default="digits")
@click.option("--out", type=click.Path(path_type=Path), default=Path("editing.png"), show_default=True)
@click.option(
    "--label", "labels", type=int, multiple=True, help="A class a row, four.  [default: spread evenly]"
)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Of the images; edits have those after it."
)
def main(model: str, out: Path, labels: tuple[int, ...], seed: int) -> None:
    sampler = var_ext.load(model)
    classes, side = sampler.num_classes, sampler.image_size
    labels = labels or tuple(i * classes // 4 for i in range(4))
    if len(labels) != 4:
        raise click.UsageError(f"--label must be given four times, got {len(labels)}")
    lower, box = torch.zeros(side, side), torch.ones(side, side)
    lower[side // 2 :] = 1  # 1: redrawn
    box[side // 4 : -side // 4, side // 4 : -side // 4] = 0
    edits = {
        "lower half": (lower, [labels[0]] * EDITS),
        "upper half": (1 - lower, [labels[1]] * EDITS),
        "around a box": (box, [labels[2]] * EDITS),
        "other classes below": (lower, [(labels[3] + 1 + i) % classes for i in range(EDITS)]),
    }
    images = sampler(labels, [seed] * 4)  # (4, 3, S, S)
    rows, seeds = [], [seed + 1 + i for i in range(EDITS)]
    for image, (mask, wanted) in zip(images, edits.values(), strict=True):
        kept = image.where(mask < 1, 0.5)
        rows += [torch.stack((image, kept)), sampler.edit(image, mask, label=wanted, seed=seeds)]
    sweep = [i * classes // (EDITS + 2) for i in range(EDITS + 2)]
    rows.append(sampler(sweep, [seed] * len(sweep)))
    texts = [f"{class_name(sampler.class_names, i)}: {what}" for i, what in zip(labels, edits, strict=True)]
    sheet = labelled_grid(
        torch.cat(rows), [*texts, "one seed, seven classes"], ["drawn", "kept", *["edited"] * EDITS]
    )
    save_picture(sheet, out)
    click.echo(f"wrote {out}")


if __name__ == "__main__":
    main()
