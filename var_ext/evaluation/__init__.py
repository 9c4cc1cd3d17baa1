"""Measured quality: of samples by a judge fitted to real images, and of tokenizers by what they give back."""

from var_ext.evaluation.best_of_curve import BestOfCurve, best_of_curve
from var_ext.evaluation.choose import Choice, Trial, choose_sampling
from var_ext.evaluation.digits import evaluate_digits
from var_ext.evaluation.frechet import frechet_distance, pixel_distances
from var_ext.evaluation.judge import DigitsJudge
from var_ext.evaluation.report import DigitsReport
from var_ext.evaluation.scoring import Classifier, JudgeMargin, Likelihood, named_score
from var_ext.evaluation.similarity import psnr, ssim
from var_ext.evaluation.tokenizer import Space, evaluate_tokenizer
from var_ext.evaluation.tokenizer_report import TokenizerReport

__all__ = [
    "BestOfCurve",
    "Choice",
    "Classifier",
    "DigitsJudge",
    "DigitsReport",
    "JudgeMargin",
    "Likelihood",
    "Space",
    "TokenizerReport",
    "Trial",
    "best_of_curve",
    "choose_sampling",
    "evaluate_digits",
    "evaluate_tokenizer",
    "frechet_distance",
    "named_score",
    "pixel_distances",
    "psnr",
    "ssim",
]
