"""Packages that only some trainings need."""

from __future__ import annotations

import logging
from importlib import import_module
from typing import Any

# torchao, which peft imports too where it is there, tells at length of kernels and types that are not used here.
_TALKATIVE = ("torchao", "torch.utils._pytree")


def need(module: str, extra: str, option: str) -> Any:
    """A module of a package that the extra brings.

    Raises:
        ValueError: it is missing; names the option that needs it, and the command that installs it.
    """
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ValueError(f"{option} needs {package}: pip install 'var_ext[{extra}]' ({error})") from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
