"""The published sampling method on an engine: its arguments and its random stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from var_ext.engine.call import Call
from var_ext.engine.engine import Engine
from var_ext.engine.options import options_for
from var_ext.engine.precision import precision_in_force
from var_ext.models.var import VAR


def published_sample(
    engine: Engine,
    B: int,
    label_B: int | Sequence[int] | Tensor | None,
    g_seed: int | None,
    *,
    cfg: float,
    top_k: int,
    top_p: float,
    more_smooth: bool,
    seeds: Sequence[int] | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Images (B, 3, S, S) in [0, 1] and tokens (B, L); arguments as in `VAR.autoregressive_infer_cfg`.

    Args:
        seeds: (B,) integers, a random stream an image instead of one for the batch.

    Raises:
        ValueError: a label or an option is out of range, labels or seeds are not (B,) integers, or both g_seed and
            seeds are given.
    """
    var, device = engine.var, engine.device
    options = options_for(engine.schedule, cfg=cfg, top_k=top_k, top_p=top_p, more_smooth=more_smooth)
    rng = None if g_seed is None else torch.Generator(device).manual_seed(g_seed)
    if label_B is None:
        uniform = torch.full((1, var.num_classes), 1 / var.num_classes, device=device)
        label_B = uniform.multinomial(max(B, 1), replacement=True, generator=rng)[0, :B]
    elif not isinstance(label_B, Tensor | Sequence):  # one for all, of any integer type
        one = int(label_B)
        label_B = torch.full((B,), one if one >= 0 else var.num_classes, device=device)
    labels = _batch("label_B", label_B, B, device)
    labels = var.checked_labels(labels)
    if seeds is None:
        return engine.draw(Call(labels, rng, options))
    if g_seed is not None:
        raise ValueError(f"either g_seed or seeds must be given, got {g_seed} and {seeds}")
    return engine.draw(Call(labels, _batch("seeds", seeds, B, device), options))


def sample_model(var: VAR, *given: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """`published_sample` of a model with its weights as they are. On a GPU its engine is kept, with the graphs that it
    captures."""
    engine: Engine | None = var.kept_engine
    precision = precision_in_force(var.pos_start)
    if engine is None or engine.precision != precision:
        engine = Engine(var, precision, pack=False)
        var.kept_engine = engine if engine.device.type == "cuda" else None
    return published_sample(engine, *given, **options)


VAR.sample_published = staticmethod(sample_model)


def _batch(name: str, values: Sequence[int] | Tensor, size: int, device: torch.device) -> Tensor:
    tensor = torch.as_tensor(values, device=device)
    if tensor.shape != (size,) or tensor.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name} must be ({size},) int64, got {tuple(tensor.shape)} {tensor.dtype}")
    return tensor.to(torch.int64)
