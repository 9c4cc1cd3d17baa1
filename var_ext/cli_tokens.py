"""The command `var-ext tokens`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from var_ext.cli_options import UserPath, machine_options, recipe_options, say

MADE = ("augment", "copies", "geometry", "decode")  # what a training must say too


@click.command("tokens")
@click.argument("data")
@click.option("--tokenizer", required=True, help="Folder or name of the tokenizer.")
@click.option("--out", required=True, type=UserPath(file_okay=False), help="Folder of the tokens.")
@recipe_options("VARRecipe", only=(*MADE, "seed", "workers", "micro_batch", "rank_timeout"))
@click.option("--quiet", is_flag=True, help="No progress bar.")
@machine_options
def tokens(data: str, tokenizer: str, out: Path, quiet: bool, device: str, **options: Any) -> None:
    """Write the tokens of the images of DATA once, for many trainings without the images.

    \b
    Example: var-ext tokens photos/ --tokenizer var-d16 --out tokens/
    Afterwards: var-ext train var tokens:tokens/ --tokenizer var-d16 --out runs/var --tokens cached --augment 0
    The tokens are of one tokenizer, and the training must be told the same.
    """
    from var_ext.training import VARRecipe, store_tokens

    given = {name: value for name, value in options.items() if value is not None}
    recipe = VARRecipe().with_options(**given)
    store_tokens(data, tokenizer, out, recipe, device=device, progress=not quiet)
    made = "".join(
        f" --{name} {getattr(recipe, name)}"
        for name in MADE
        if name == "augment" or getattr(recipe, name) != getattr(VARRecipe, name)
    )
    say(
        f"tokens: {out}\ntrain on them: var-ext train var tokens:{out} --tokenizer {tokenizer} --tokens cached{made}"
    )
