"""Visual AutoRegressive modeling (VAR, arXiv 2404.02905) with hand-written CPU and CUDA kernels.

import var_ext
sampler = var_ext.load("digits")
images = sampler(labels=[0, 1, 2], seeds=[7, 8, 9])  # (3, 3, H, W) in [0, 1]
"""

from importlib.metadata import version as _version

import torch as _torch  # noqa: F401  first: the compiled part shares the thread pool that torch brings

from var_ext.accelerate import accelerate
from var_ext.checkpoints import save_model
from var_ext.loading import load
from var_ext.sampling import Sampler
from var_ext.schedule import ScaleSchedule

__version__ = _version("var_ext")
__all__ = ["Sampler", "ScaleSchedule", "__version__", "accelerate", "load", "save_model"]
