"""The commands `var-ext scaling fit` and `var-ext scaling plan`."""

from __future__ import annotations

import math
from pathlib import Path

import click

from var_ext.checkpoints import check_writable
from var_ext.cli_options import SEED, Command, UserPath


def _pairs(_: click.Context, __: click.Parameter, given: tuple[str, ...]) -> dict[str, str]:
    pairs = dict[str, str]()
    for text in given:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise click.BadParameter(f"must be NAME=VALUE, got {text!r}")
        if name in pairs:
            raise click.BadParameter(f"{name} was given twice: {pairs[name]} and {value}")
        pairs[name] = value
    return pairs


def _irreducible(
    context: click.Context, parameter: click.Parameter, given: tuple[str, ...]
) -> dict[str, float]:
    """A number alone is of the average loss."""
    pairs = _pairs(context, parameter, tuple(text if "=" in text else f"loss_avg={text}" for text in given))
    try:
        found = {name: float(value) for name, value in pairs.items()}
    except ValueError:
        found = {"": math.nan}
    if not all(map(math.isfinite, found.values())):
        raise click.BadParameter(f"must be a number or NAME=NUMBER, got {' '.join(given)!r}")
    return found


def _shared(command: Command) -> Command:
    for option in reversed(
        (
            click.argument("runs", type=UserPath(exists=True, dir_okay=False)),
            click.option(
                "--column",
                "columns",
                multiple=True,
                callback=_pairs,
                metavar="NAME=HEADER[:UNIT]",
                help="What a column is: size, flops, tokens, images, step, seed, run, loss_avg, loss_last, loss_s1 "
                "..., err_avg ..., loss_avg_se ....  [default: by its name]",
            ),
            click.option(
                "--before-anneal",
                type=click.FloatRange(0, 1, min_open=True),
                help="Of curves, only points in this first share of a run's FLOP.  [default: all]",
            ),
            click.option(
                "--draws",
                type=click.IntRange(min=100),
                default=1000,
                show_default=True,
                help="Of the bootstrap.",
            ),
            click.option("--seed", type=SEED, default=0, show_default=True, help="Of the draws."),
        )
    ):
        command = option(command)
    return command


@click.group("scaling")
def scaling() -> None:
    """Scaling laws of a table of runs.

    \b
    Example: var-ext scaling fit runs.csv
    """


@scaling.command()
@_shared
@click.option(
    "--irreducible",
    multiple=True,
    callback=_irreducible,
    metavar="[NAME=]E",
    help="Also fit with this E, as the paper does; a number alone is of loss_avg.",
)
@click.option(
    "--out", type=UserPath(file_okay=False), help="Folder of scaling.md, its plots and scaling.json."
)
def fit(
    runs: Path,
    columns: dict[str, str],
    before_anneal: float | None,
    draws: int,
    seed: int,
    irreducible: dict[str, float],
    out: Path | None,
) -> None:
    """Fit L = E + (beta X)^-alpha to every loss of RUNS, against parameters and compute, and say whether it holds.

    \b
    Example: var-ext scaling fit runs.csv --out page
    Example: var-ext scaling fit runs.csv --irreducible 5.0 --irreducible loss_last=4.5
    Example: var-ext scaling fit theirs.csv --column "size=width x depth [M]" --column loss_avg=nll
    RUNS is a CSV with a row a run, or a row a point of a run's curve; units stand in its header, "params [M]",
    "flops_P", "err [%]". Rows that differ in their seed alone tell the noise. Probes of other settings belong into
    another file.
    """
    from var_ext.scaling import as_markdown, fit_runs, read_runs, write_page
    from var_ext.scaling.page import PAGE

    if out is not None:
        check_writable(out / PAGE)
    study = fit_runs(
        read_runs(runs, columns), irreducible=irreducible, before_anneal=before_anneal, draws=draws, seed=seed
    )
    click.echo(as_markdown(study))
    if out is not None:
        click.echo(f"page: {write_page(study, out).resolve()}")


@scaling.command()
@_shared
@click.option("--flops", type=float, required=True, help="The budget of a whole training, such as 1e18.")
@click.option("--loss", default="loss_avg", show_default=True, help="The loss that is to be low.")
def plan(
    runs: Path,
    columns: dict[str, str],
    before_anneal: float | None,
    draws: int,
    seed: int,
    flops: float,
    loss: str,
) -> None:
    """Say which size to train, on how many tokens or images, for a budget of FLOP, by the curves in RUNS.

    \b
    Example: var-ext scaling plan --flops 1e18 runs.csv
    By isoFLOP curves where they show a best size, else by the sizes on the frontier; with an interval, and a warning
    outside of the budgets that were run.
    """
    from var_ext.scaling import fit_runs, plan_budget, read_runs

    table = read_runs(runs, columns)
    study = fit_runs(table, before_anneal=before_anneal, draws=draws, seed=seed)
    click.echo(plan_budget(table, study, flops, loss, draws=draws, seed=seed).as_text())
