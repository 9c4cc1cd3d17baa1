"""The published sampling method on an engine: its arguments and its random stream."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from var_ext.engine.call import Call, Integers, as_int64
from var_ext.engine.engine import Engine
from var_ext.engine.options import options_for
from var_ext.engine.precision import precision_in_force
from var_ext.models.var import VAR


def published_sample(
    engine: Engine,
    B: int,
    label_B: Integers | None,
    g_seed: int | None,
    *,
    cfg: float,
    top_k: int,
    top_p: float,
    more_smooth: bool,
    seeds: Integers | None = None,
) -> tuple[Tensor, Tensor]:
    """Images (B, 3, S, S) in [0, 1] and tokens (B, L); arguments as in `VAR.autoregressive_infer_cfg`.

    Args:
        seeds: (B,) integers, one random stream per image instead of one for the batch.

    Raises:
        ValueError: a label, a seed or an option is out of range, labels or seeds are not (B,), or both g_seed and
            seeds are given.
        TypeError: labels or a seed are not integers.
    """
    var, device = engine.var, engine.device
    options = options_for(engine.schedule, cfg=cfg, top_k=top_k, top_p=top_p, more_smooth=more_smooth)
    rng = None if g_seed is None else torch.Generator(device).manual_seed(_seed(g_seed))
    if label_B is None:
        labels = var.uniform_prob.multinomial(max(B, 1), replacement=True, generator=rng)[0, :B]
    else:
        labels = as_int64("label_B", label_B).to(device)
        if labels.ndim == 0:  # one for all
            labels = torch.where(labels < 0, var.num_classes, labels).expand(B)
    labels = var.checked_labels(_of_batch("label_B", labels, B))
    if seeds is None:
        return engine.draw(Call(labels, rng, options))
    if g_seed is not None:
        raise ValueError(f"either g_seed or seeds must be given, got {g_seed} and {seeds}")
    seeds = _of_batch("seeds", as_int64("seeds", seeds, bits=True).to(device), B)
    return engine.draw(Call(labels, seeds, options))


def sample_model(var: VAR, *given: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """`published_sample` in the precision of the model's weights. On a GPU its engine and captured graphs are kept."""
    engine: Engine | None = var.kept_engine
    precision = precision_in_force(var.pos_start)
    if engine is None or engine.precision != precision:
        engine = Engine(var, precision, pack=False)
        var.kept_engine = engine if engine.device.type == "cuda" else None
    return published_sample(engine, *given, **options)


VAR.sample_published = staticmethod(sample_model)


def _of_batch(name: str, values: Tensor, size: int) -> Tensor:
    if values.shape != (size,):
        raise ValueError(f"{name} must be ({size},) int64, got {tuple(values.shape)} {values.dtype}")
    return values


def _seed(g_seed: Any) -> int:
    """A seed as generators take it: a Python integer of 64 bits, signed or unsigned."""
    as_int64("g_seed", g_seed, bits=True)
    return operator.index(g_seed)
