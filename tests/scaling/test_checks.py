"""The verdict: true laws hold, curved and broken ones do not however well they correlate, and too little is no pass."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from tests.scaling.tables import SEEDS, SIZES, TRUE, points
from var_ext.scaling import Check, spread
from var_ext.scaling.checks import correlation, curvature, extent, prediction, residuals, verdict
from var_ext.scaling.intervals import Points
from var_ext.scaling.laws import Array

DRAWS = {"draws": 300, "seed": 0}


def judged(ladder: Points, given: float | None = None) -> dict[str, Check]:
    law = ladder.fit(given)
    around = spread(ladder, law, given, **DRAWS)
    last = float(ladder.x[-1]), float(ladder.loss[-1])
    checks = [
        *extent(len(ladder.x), ladder.x),
        correlation(ladder, law),
        curvature(ladder, law, given, around),
        residuals(ladder, law, around),
        prediction(ladder.without_last(), *last, given, **DRAWS),
    ]
    return {check.name: check for check in checks}


def said(ladder: Points, given: float | None = None) -> str:
    return verdict(list(judged(ladder, given).values()))[0]


# The trial: depths 1 to 4, 10 million tokens.
TRIAL = {
    "loss_avg": [2.6155, 2.3160, 2.1340, 1.9757],
    "loss_last": [3.0519, 2.6478, 2.3932, 2.1614],
    "err_avg": [67.01, 62.24, 59.24, 56.51],
    "err_last": [73.33, 67.56, 63.47, 59.59],
}


@pytest.mark.parametrize("name", TRIAL)
def test_the_trial_is_no_law_though_r_is_996(name: str) -> None:
    ladder = points(73728.0 * np.arange(1, 5) ** 3, np.array(TRIAL[name]))
    checks = judged(ladder)
    assert checks["correlation"].passed and checks["correlation"].value is not None
    assert checks["correlation"].value < -0.99
    assert checks["range"].passed and checks["sizes"].passed is None
    assert checks["prediction"].passed is False
    outcome, why = verdict(list(checks.values()))
    assert outcome == "does not hold" and "prediction: " in why and "(within 1%)" in why


def test_the_correlation_of_the_trial() -> None:
    ladder = points(73728.0 * np.arange(1, 5) ** 3, np.array(TRIAL["loss_avg"]))
    assert correlation(ladder, ladder.fit(None)).value == pytest.approx(-0.996, abs=5e-4)


def two_slopes(first: float, second: float, e: float, height: float) -> Array:
    """A law that is another from 1.2M parameters on."""
    return e + height * (SIZES / 1.2e6) ** -np.where(SIZES < 1.2e6, first, second)


def parabola(bend: float) -> Array:
    x = np.log10(SIZES / 1e5)
    return np.exp(1 - 0.05 * x - bend * x**2)


NO_LAWS = {
    "curved": parabola(0.03),
    "steeper": two_slopes(0.08, 0.25, 0, 2.5),
    "steeper above an E": two_slopes(0.1, 0.3, 1, 2),
    "a little steeper": two_slopes(0.15, 0.2, 0, 2),  # r = -.997
    "flatter": two_slopes(0.3, 0.1, 1, 2),  # r = -.996, with the E that is fitted
    "flatter above zero": two_slopes(0.2, 0.08, 0, 2),
}


@pytest.mark.parametrize("sd", [0.002, 0.005])
@pytest.mark.parametrize("name", NO_LAWS)
def test_what_is_no_law_never_holds(name: str, sd: float) -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        losses = NO_LAWS[name] + sd * rng.standard_normal(7) / np.sqrt(SEEDS)
        assert said(points(SIZES, losses, SEEDS, sd, 4)) == "does not hold"
        assert said(points(SIZES, losses)) == "does not hold"


def test_a_curve_is_called_by_its_name() -> None:
    checks = judged(points(SIZES, NO_LAWS["curved"], SEEDS, 0.002, 4))
    assert checks["curvature"].passed is False and checks["curvature"].value is not None
    assert checks["curvature"].value < -2  # bent downwards


def test_true_laws_hold() -> None:
    """A test at two sigma fails 4.5% of true laws: of 40 more than 6 would, with a chance of .3%."""
    rng = np.random.default_rng(0)
    found = Counter(
        said(
            points(SIZES, TRUE.loss(SIZES) + 0.003 * rng.standard_normal(7) / np.sqrt(SEEDS), SEEDS, 0.003, 4)
        )
        for _ in range(40)
    )
    assert found["holds"] >= 34


def test_sigma_is_that_of_the_noise() -> None:
    """A curvature beyond two sigma comes by chance in 4.5% of draws of a law: of 150 in 7, with a deviation of 2.5."""
    rng = np.random.default_rng(3)
    beyond = 0
    for _ in range(150):
        ladder = points(
            SIZES, TRUE.loss(SIZES) + 0.003 * rng.standard_normal(7) / np.sqrt(SEEDS), SEEDS, 0.003, 400
        )
        law = ladder.fit(1.5)
        around = spread(ladder, law, 1.5, draws=200, seed=0)
        beyond += curvature(ladder, law, 1.5, around).passed is False
    assert 1 <= beyond <= 15


def test_too_little_is_no_pass() -> None:
    few = points(SIZES[::2], TRUE.loss(SIZES[::2]), SEEDS[::2], 0.002, 4)
    assert said(few) == "too little data" and judged(few)["sizes"].passed is None
    near = points(SIZES[:5], TRUE.loss(SIZES[:5]), SEEDS[:5], 0.002, 4)
    assert said(near) == "too little data"
    assert judged(near)["range"].figure == "1.43 decades (at least 1.5)"
    three = points(SIZES[:3], TRUE.loss(SIZES[:3]))  # as many points as parameters: nothing is left to test
    assert said(three) == "too little data" and judged(three)["prediction"].passed is None


def test_a_miss_that_noise_explains_is_undecided() -> None:
    losses = TRUE.loss(SIZES)
    losses[-1] += 0.08  # 4% of L
    assert judged(points(SIZES, losses, SEEDS, 0.002, 4))["prediction"].passed is False
    noisy = judged(points(SIZES, losses, SEEDS, 0.1, 4))["prediction"]
    assert noisy.passed is None and noisy.figure.endswith("too large to say")


def test_an_e_above_a_loss_has_no_correlation() -> None:
    ladder = points(SIZES, TRUE.loss(SIZES))
    law = ladder.fit(1.95)
    assert correlation(ladder, law).passed is False
    assert "1.95 is above a loss" in correlation(ladder, law).figure


def test_rising_losses_do_not_hold() -> None:
    assert said(points(SIZES, np.linspace(1, 2, 7))) == "does not hold"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("given", [None, 0.1])
def test_losses_without_any_order_are_judged_too(given: float | None) -> None:
    """Residuals of a million times the noise: some drawn losses are below zero."""
    losses = 0.1 + 3 * np.random.default_rng(0).random(7)
    ladder = points(SIZES, losses, SEEDS, 1e-6, 4)
    around = spread(ladder, ladder.fit(given), given, **DRAWS)
    assert around is not None and (around.laws.irreducible >= 0).all() and (around.losses < 0).any()
    assert said(ladder, given) == "does not hold"
