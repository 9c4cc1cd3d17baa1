"""The command `var-ext tokens`."""

from __future__ import annotations

from pathlib import Path

import click

from var_ext.cli_options import SEED, UserPath, machine_options, say
from var_ext.data.framing import DECODES, GEOMETRIES


@click.command("tokens")
@click.argument("data")
@click.option("--tokenizer", required=True, help="Folder or name of the tokenizer.")
@click.option("--out", required=True, type=UserPath(file_okay=False), help="Folder of the tokens.")
@click.option(
    "--augment",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Of training images; of pictures any value above 0 means a random crop.",
)
@click.option(
    "--copies",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Augmented versions of each training image.",
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the augmentation.")
@click.option(
    "--geometry", type=click.Choice(GEOMETRIES), default="published", show_default=True, help="As of train."
)
@click.option("--decode", type=click.Choice(DECODES), default="exact", show_default=True, help="As of train.")
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Images encoded at once.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Processes that read images.",
)
@click.option("--quiet", is_flag=True, help="No progress bar.")
@machine_options
def tokens(
    data: str,
    tokenizer: str,
    out: Path,
    augment: float,
    copies: int,
    seed: int,
    geometry: str,
    decode: str,
    batch_size: int,
    workers: int,
    quiet: bool,
    device: str,
) -> None:
    """Write the tokens of the images of DATA once, for many trainings without the images.

    \b
    Example: var-ext tokens photos/ --tokenizer var-d16 --out tokens/
    Afterwards: var-ext train var tokens:tokens/ --tokenizer var-d16 --out runs/var --tokens cached
    The tokens are of one tokenizer, and the training must be told the same.
    """
    from var_ext.training import store_tokens

    store_tokens(
        data, tokenizer, out,
        copies=copies, augment=augment, seed=seed, geometry=geometry, decode=decode,
        batch_size=batch_size, workers=workers, device=device, progress=not quiet,
    )  # fmt: skip
    made = {"augment": f"{augment:g}", "copies": copies, "geometry": geometry, "decode": decode}
    usual = {"copies": 1, "geometry": "published", "decode": "exact"}
    options = "".join(f" --{name} {value}" for name, value in made.items() if usual.get(name) != value)
    say(
        f"tokens: {out}\ntrain on them: var-ext train var tokens:{out} --tokenizer {tokenizer} --tokens cached{options}"
    )
