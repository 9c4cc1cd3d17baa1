"""Visual AutoRegressive modeling (VAR, arXiv 2404.02905) with hand-written CPU and CUDA kernels.

import var_ext

sampler = var_ext.load("digits")
images = sampler(labels=[0, 1, 2], seeds=[7, 8, 9])  # (3, 3, H, W) in [0, 1]
"""

from importlib.metadata import version as _version

from var_ext import _torch  # noqa: F401  brings torch first: the compiled part shares its thread pool
from var_ext.accelerate import accelerate
from var_ext.checkpoints import save_model
from var_ext.grid import to_pil
from var_ext.loading import load
from var_ext.pipeline import VARPipeline
from var_ext.sampling import Sampler
from var_ext.schedule import ScaleSchedule
from var_ext.show import Grid, show

__version__ = _version("var_ext")
__all__ = [
    "Grid",
    "Sampler",
    "ScaleSchedule",
    "VARPipeline",
    "__version__",
    "accelerate",
    "load",
    "save_model",
    "show",
    "to_pil",
]
