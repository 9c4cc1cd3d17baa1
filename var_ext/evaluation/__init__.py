"""Measured quality: of samples by a judge fitted to real images, and of tokenizers by what they give back."""

from var_ext.evaluation.choose import Choice, Trial, choose_sampling
from var_ext.evaluation.digits import evaluate_digits
from var_ext.evaluation.features import Space
from var_ext.evaluation.frechet import frechet_distance, pixel_distances
from var_ext.evaluation.judge import DigitsJudge
from var_ext.evaluation.report import DigitsReport
from var_ext.evaluation.similarity import psnr, ssim
from var_ext.evaluation.tokenizer import evaluate_tokenizer
from var_ext.evaluation.tokenizer_report import TokenizerReport

__all__ = [
    "Choice",
    "DigitsJudge",
    "DigitsReport",
    "Space",
    "TokenizerReport",
    "Trial",
    "choose_sampling",
    "evaluate_digits",
    "evaluate_tokenizer",
    "frechet_distance",
    "pixel_distances",
    "psnr",
    "ssim",
]
