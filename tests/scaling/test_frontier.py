"""Loss against compute on a surface whose best sizes are known: frontier, isoFLOP parabolas, plans, and refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.scaling.tables import SIZES, best_size, chinchilla, curves, ladder, write
from var_ext.scaling import Noise, Runs, Study, fit_runs, isoflops, plan_budget, read_curves, read_runs

HEADER = ["run", "size", "seed", "step", "tokens", "flops", "loss_avg"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Long enough that every size but the outer ones is best somewhere."""
    return read_runs(write(tmp_path_factory.mktemp("curves") / "runs.csv", HEADER, curves(2e10)))


@pytest.fixture(scope="module")
def study(runs: Runs) -> Study:
    return fit_runs(runs, draws=300)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Results alone, all of as many tokens."""
    header = ["size", "seed", "loss_avg", "tokens", "flops"]
    return read_runs(write(tmp_path_factory.mktemp("results") / "runs.csv", header, ladder()))


def test_curves_are_read_between_their_points(runs: Runs) -> None:
    found = read_curves(runs, "loss_avg")
    assert len(found.budgets) == pytest.approx(8 * np.log10(found.budgets[-1] / found.budgets[0]), abs=2)
    for row, size in zip(found.loss, found.sizes, strict=True):
        there = ~np.isnan(row)
        wanted = chinchilla(size, found.budgets[there] / (6 * size))
        # 4 points a decade of tokens, lines in logarithms, and an offset of its own of 3 standard deviations
        np.testing.assert_allclose(row[there], wanted, rtol=4e-3)
    assert found.seeds.tolist() == [2, 2, 1, 1, 1, 1, 1]


def test_the_frontier_is_the_lowest_loss(runs: Runs) -> None:
    found = read_curves(runs, "loss_avg")
    front = found.frontier(Noise(1e-6, 2, False))
    assert (np.diff(front.x) > 0).all() and (np.diff(front.loss) < 0).all()
    for x, loss, rung in zip(front.x, front.loss, front.group, strict=True):
        at = found.loss[:, found.budgets == x][:, 0]
        assert loss == np.nanmin(at) == at[rung]
    # where the smallest or the largest is best, one outside of the ladder may be better
    assert SIZES[0] not in found.sizes[front.group] and SIZES[-1] not in found.sizes[front.group]


def test_the_law_of_the_frontier(study: Study) -> None:
    """Of losses E + A/N^a + B/D^b the best fall with C^-(ab/(a+b)): .1615, and E is 1."""
    (fit,) = (fit for fit in study.fits if fit.axis == "flops")
    assert fit.verdict == "holds"
    low, high = fit.intervals()["alpha"]
    assert low <= 0.35 * 0.3 / 0.65 <= high
    low, high = fit.intervals()["irreducible"]
    assert low <= 1 <= high


def test_isoflops_find_the_best_size(study: Study) -> None:
    """Within 5% (sizes are 20% to 70% apart), and N ~ C^(b/(a+b)), .4615."""
    found = study.best_sizes["loss_avg"]
    assert not found.refused and len(found.budgets) >= 15
    np.testing.assert_allclose(found.sizes, [best_size(budget) for budget in found.budgets], rtol=0.05)
    assert found.exponent() == pytest.approx(0.3 / 0.65, abs=0.02)


@pytest.mark.parametrize("budget", [1e16, 1e18])
def test_a_plan(runs: Runs, study: Study, budget: float) -> None:
    """At 1e18, 4 times outside, within 10%: what an exponent off by .02 comes to."""
    plan = plan_budget(runs, study, budget, "loss_avg", draws=300)
    assert plan.size[0] == pytest.approx(best_size(budget), rel=0.1)
    assert plan.size[1][0] < plan.size[0] < plan.size[1][1]
    assert 6 * plan.size[0] * plan.length["tokens"][0] == pytest.approx(budget, rel=1e-3)
    assert plan.loss[1][0] < chinchilla(best_size(budget), budget / 6 / best_size(budget)) < plan.loss[1][1]
    text = plan.as_text()
    assert ("warning: 4.43 times above the budgets" in text) == (budget == 1e18)
    assert "isoFLOP curves" in text and "90%: " in text


def test_a_plan_from_the_frontier_alone(tmp_path: Path) -> None:
    """Three sizes at every budget are none for a parabola; a size is known to a step of the ladder."""
    rows = curves(2e10, SIZES[[0, 1, 3, 6]])
    half = [row for row in rows if row[0] in ("d1", "d2") or (float(str(row[5])) < 2e15) == (row[0] == "d0")]
    table = read_runs(write(tmp_path / "runs.csv", HEADER, half))
    study = fit_runs(table, draws=300)
    assert "fewer than 4 sizes reach them" in study.best_sizes["loss_avg"].refused
    plan = plan_budget(table, study, 1e16, "loss_avg", draws=300)
    assert "the sizes on the frontier" in plan.as_text()
    low, high = plan.size[1]
    assert low < best_size(1e16) < high and high > 1.3 * low


def test_isoflops_are_refused_with_the_reason(results: Runs, runs: Runs) -> None:
    assert "at 7 fewer than 4 sizes reach them" in isoflops(read_curves(results, "loss_avg")).refused
    large = [run for run in runs.runs if run.size > 1e6]
    refused = isoflops(read_curves(Runs("", tuple(large), ("loss_avg",)), "loss_avg", 0.1)).refused
    assert "the smallest of the sizes that reach them is best" in refused


def test_no_plan_from_trainings_that_are_all_too_short(tmp_path: Path) -> None:
    """As many tokens for every size: the frontier says which was trained so far, and would be wrong a hundredfold."""
    table = read_runs(write(tmp_path / "runs.csv", HEADER, curves(1.3e8)))
    study = fit_runs(table, draws=100)
    assert any("so a smaller one trained longer" in note for note in study.notes)
    with pytest.raises(ValueError, match="train the small ones longer"):
        plan_budget(table, study, 1e18, "loss_avg")


def test_plans_are_refused_with_the_reason(results: Runs, runs: Runs, study: Study) -> None:
    with pytest.raises(
        ValueError, match=r"every budget was reached by one size alone.*add points of the curves"
    ):
        plan_budget(results, fit_runs(results, draws=100), 1e18, "loss_avg")
    with pytest.raises(ValueError, match="must be a positive number of FLOP, got -1"):
        plan_budget(runs, study, -1, "loss_avg")
    with pytest.raises(ValueError, match="no loss loss_last: there are loss_avg"):
        plan_budget(runs, study, 1e16, "loss_last")


def test_what_lacks_for_a_plan(tmp_path: Path) -> None:
    def table(*left_out: int) -> Runs:
        keep = [i for i in range(len(HEADER)) if i not in left_out]
        rows = [[row[i] for i in keep] for row in curves(2e10)]
        return read_runs(write(tmp_path / "runs.csv", [HEADER[i] for i in keep], rows))

    without_flops = table(5)
    with pytest.raises(ValueError, match=r"no law against compute: .*--column flops=HEADER"):
        plan_budget(without_flops, fit_runs(without_flops, draws=100), 1e16, "loss_avg")
    without_tokens = table(4)
    with pytest.raises(ValueError, match="name a column tokens or images"):
        plan_budget(without_tokens, fit_runs(without_tokens, draws=100), 1e16, "loss_avg")


def test_only_points_before_the_anneal(runs: Runs) -> None:
    all_of, early = read_curves(runs, "loss_avg"), read_curves(runs, "loss_avg", 0.5)
    assert early.budgets[-1] <= 0.5 * all_of.budgets[-1]
    assert any("first 0.5 of each" in note for note in fit_runs(runs, before_anneal=0.5, draws=100).notes)


def test_results_alone_are_a_law_too(results: Runs) -> None:
    """C is 6 N D with one D: the law against C is that against N."""
    size, flops = fit_runs(results, draws=100).fits
    assert (size.axis, flops.axis) == ("size", "flops")
    assert float(flops.law.alpha) == pytest.approx(float(size.law.alpha), rel=1e-3)
    assert flops.verdict == size.verdict == "holds"
