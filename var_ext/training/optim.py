"""Optimizer groups, learning-rate schedules and the moving average of weights: pure functions of the step.

A new schedule is a function (step, total, ...) -> factor; nothing here keeps a counter that a
resumed run would have to restore.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from var_ext.training.parallel import as_like, build_optimizer, collected, local, owners
from var_ext.training.progressive import factor as progressive_factor
from var_ext.training.ranks import ALONE, Ranks

# Parts of published parameter names that are never decayed, besides biases and 1-d parameters.
NO_DECAY = ("pos_1LC", "pos_start", "lvl_embed", "ada_gss", "scale_mul", "embedding")
BETAS = (0.9, 0.95)  # of AdamW, published
MUON = re.compile(r"blocks\.\d+\.(attn|ffn)\..*")  # names of what Muon takes, if they are matrices
WARMUP_START = 0.005
FULL_SHARE = 0.05


def param_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two optimizer groups of the trainable parameters: with and without "decay", which `set_rates` reads."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            exempt = parameter.ndim == 1 or name.endswith("bias") or any(part in name for part in NO_DECAY)
            groups[not exempt].append(parameter)
    return [{"params": params, "decay": decay} for decay, params in groups.items() if params]


def of_muon(model: nn.Module) -> list[nn.Parameter]:
    """The trainable matrices of attention and MLP."""
    return [p for name, p in _trainable(model) if p.ndim == 2 and MUON.fullmatch(name)]


def build_optimizers(
    kind: str, model: nn.Module, ranks: Ranks, shard: str, lr: float
) -> list[torch.optim.Optimizer]:
    """AdamW of the trainable parameters, in the groups of `param_groups`; with `kind` "muon" Muon before it.

    Muon (arXiv 2502.16982) takes the matrices of attention and MLP, with momentum 0.95, and steps as long as AdamW's
    by root mean square, so that learning rate and weight decay are the same. AdamW keeps embeddings, head and AdaLN,
    whose inputs are rows of few vectors, biases and scales.

    Raises:
        ValueError: no matrix for Muon is trained.
    """
    groups, adamw = param_groups(model), {"lr": lr, "betas": BETAS, "fused": True}
    if kind == "adamw":
        return [build_optimizer(torch.optim.AdamW, groups, ranks, shard, **adamw)]
    matrices = set(of_muon(model))
    if not matrices:
        raise ValueError(
            "optimizer = muon trains matrices of attention and MLP, got none: freeze fewer, or take adamw"
        )
    found = []
    for optimizer, options, taken in (
        (torch.optim.Muon, {"lr": lr, "momentum": 0.95, "adjust_lr_fn": "match_rms_adamw"}, True),
        (torch.optim.AdamW, adamw, False),
    ):
        mine = [{**g, "params": [p for p in g["params"] if (p in matrices) == taken]} for g in groups]
        if any(group["params"] for group in mine):
            found.append(
                build_optimizer(optimizer, [g for g in mine if g["params"]], ranks, shard, **options)
            )
    return found


def warmup_factor(step: int, total: int, warmup: float) -> float | None:
    """Factor on the learning rate while it rises from `WARMUP_START`, None afterwards."""
    steps = round(warmup * total)
    return WARMUP_START + (1 - WARMUP_START) * step / steps if step < steps else None


def linear_factor(step: int, total: int, *, warmup: float, end: float, progressive: float = 0.0) -> float:
    """Warm-up, 5 % of the remaining steps at full rate, then linear to `end` (the published VAR schedule).

    Args:
        progressive: share of the steps of progressive training, which has a schedule of its own.
    """
    rising = warmup_factor(step, total, warmup)
    if rising is not None:
        return rising
    passed = _passed(step, total, warmup)
    if progressive:
        return progressive_factor(passed, share=progressive, end=end)
    return 1.0 if passed < FULL_SHARE else end + (1 - end) * (1 - passed) / (1 - FULL_SHARE)


def cosine_factor(step: int, total: int, *, warmup: float, end: float) -> float:
    """Warm-up, then half a cosine from 1 to `end`."""
    rising = warmup_factor(step, total, warmup)
    return rising if rising is not None else cosine(_passed(step, total, warmup), 1.0, end)


def cosine(passed: float, start: float, end: float) -> float:
    """From `start` (passed = 0) to `end` (passed = 1) along half a cosine."""
    return end + (start - end) * (0.5 + 0.5 * math.cos(math.pi * passed))


def set_rates(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float = 0.0) -> None:
    """Write learning rate and weight decay into the groups of `param_groups`."""
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = lr, weight_decay if group["decay"] else 0.0


def _passed(step: int, total: int, warmup: float) -> float:
    start = round(warmup * total)
    return (step - start) / max(1, total - 1 - start)


class Ema:
    """Moving average of the trainable parameters of a model.

    The decay warms up as (1 + step) / (10 + step), so a short run forgets its initial weights.

    Args:
        model: weights to begin with.
        decay: of the average.
        ranks, shared_out: each rank averages a share of the parameters, as large as that of the others.
    """

    def __init__(
        self, model: nn.Module, decay: float, ranks: Ranks = ALONE, *, shared_out: bool = False
    ) -> None:
        self.decay, self.ranks = decay, ranks
        self.shared_out = shared_out and ranks.world > 1
        owner = owners({name: p.numel() for name, p in _trainable(model)}, ranks.world)
        self.average = {
            name: p.detach().clone()
            for name, p in _trainable(model)
            if not self.shared_out or owner[name] == ranks.rank
        }

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Average in the parameters after `step` (counted from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        current = {name: local(p.detach()) for name, p in _trainable(model)}
        average = {name: local(tensor) for name, tensor in self.average.items()}
        get_ema_multi_avg_fn(decay)(list(average.values()), [current[name] for name in average], 0)

    def averages(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Name and average of each parameter of `model`; ranks that share them out call this together."""
        if not self.shared_out:
            yield from self.average.items()
        else:
            yield from collected(
                self.average, {name: p.detach() for name, p in _trainable(model)}, self.ranks
            )

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load an average with the same names; KeyError if one is missing."""
        for name, tensor in self.average.items():
            tensor.copy_(as_like(state[name], tensor))


def averaged(model: nn.Module, ema: Ema | None) -> dict[str, Tensor]:
    """Clones of all entries of the model, the averaged ones from `ema` if there is one."""
    entries = {**model.state_dict(), **(dict(ema.averages(model)) if ema else {})}
    return {name: tensor.detach().clone() for name, tensor in entries.items()}


@contextmanager
def in_place(model: nn.Module, ema: Ema | None) -> Iterator[None]:
    """Inside the block the model has the averaged weights; its own are restored bitwise."""
    own = {name: p.detach().clone() for name, p in _trainable(model)} if ema else {}
    parameters = dict(model.named_parameters())

    @torch.no_grad()
    def put(values: Iterable[tuple[str, Tensor]]) -> None:
        for name, value in values:
            local(parameters[name]).copy_(local(value))

    put(ema.averages(model) if ema else ())
    try:
        yield
    finally:
        put(own.items())


def _trainable(model: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)
