"""Measured quality: of samples by FID and its kin or by a judge fitted to real images, and of tokenizers by what they
give back; and a page of all that is measured of a model."""

from var_ext.evaluation.best_of_curve import BestOfCurve, best_of_curve
from var_ext.evaluation.choose import Choice, Trial, choose_sampling
from var_ext.evaluation.digits import evaluate_digits
from var_ext.evaluation.features import Extractor, Space
from var_ext.evaluation.fid import evaluate_fid
from var_ext.evaluation.fid_reference import Reference, read_reference, write_reference
from var_ext.evaluation.fid_report import FidReport
from var_ext.evaluation.frechet import frechet_distance, pixel_distances
from var_ext.evaluation.image_sources import DrawnImages, FolderImages, Images, NpzImages, open_images
from var_ext.evaluation.judge import DigitsJudge
from var_ext.evaluation.model_report import write_model_report
from var_ext.evaluation.model_subject import ReportOptions
from var_ext.evaluation.report import DigitsReport
from var_ext.evaluation.scoring import Classifier, JudgeMargin, Likelihood, named_score
from var_ext.evaluation.similarity import psnr, ssim
from var_ext.evaluation.tokenizer import evaluate_tokenizer
from var_ext.evaluation.tokenizer_report import TokenizerReport

__all__ = [
    "BestOfCurve",
    "Choice",
    "Classifier",
    "DigitsJudge",
    "DigitsReport",
    "DrawnImages",
    "Extractor",
    "FidReport",
    "FolderImages",
    "Images",
    "JudgeMargin",
    "Likelihood",
    "NpzImages",
    "Reference",
    "ReportOptions",
    "Space",
    "TokenizerReport",
    "Trial",
    "best_of_curve",
    "choose_sampling",
    "evaluate_digits",
    "evaluate_fid",
    "evaluate_tokenizer",
    "frechet_distance",
    "named_score",
    "open_images",
    "pixel_distances",
    "psnr",
    "read_reference",
    "ssim",
    "write_model_report",
    "write_reference",
]
