"""Measured quality: a judge fitted to real images, and its report on a sampler."""

from var_ext.evaluation.choose import Choice, Trial, choose_sampling
from var_ext.evaluation.digits import evaluate_digits
from var_ext.evaluation.frechet import frechet_distance, pixel_distances
from var_ext.evaluation.judge import DigitsJudge
from var_ext.evaluation.report import DigitsReport

__all__ = [
    "Choice",
    "DigitsJudge",
    "DigitsReport",
    "Trial",
    "choose_sampling",
    "evaluate_digits",
    "frechet_distance",
    "pixel_distances",
]
