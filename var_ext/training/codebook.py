"""Against codebook collapse: codes start on data features, and unused ones are moved to data.

All scales share one codebook, but the fine ones have almost all tokens, so the coarse ones (1x1 to 3x3)
easily end up with a handful of codes. Both remedies therefore allot codes by the *side* of a scale, not by its
token count. To try another, call it from `TokenizerTask.step` beside `restart_codes`.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from var_ext.models import VQVAE
from var_ext.ops import area_downsample
from var_ext.schedule import ScaleSchedule

DEAD_SHARE = 0.03  # a code counts as unused below this share of uniform use
USED_SHARE = 0.1  # the same for one scale, where uniform means over the codes allotted to it
MOVED_SHARE = 1 / 32  # used codes that one restart may move to scales with too few


def residuals(vae: VQVAE, f: Tensor, schedule: ScaleSchedule) -> list[Tensor]:
    """What each scale has to express given the coarser ones: (B, C, P, P) -> K tensors (B * p_k * p_k, C)."""
    f_hats = [torch.zeros_like(f), *vae.quantize.f_to_idxBl_or_fhat(f, to_fhat=True)]
    return [_rows(f - f_hat, side) for f_hat, side in zip(f_hats, schedule.patch_nums, strict=False)]


@torch.no_grad()
def seed_codebook(vae: VQVAE, images: Sequence[Tensor], schedule: ScaleSchedule) -> None:
    """Fill the codebook (V, C) with features of `images`, coarse to fine: a scale's codes are drawn from the
    residual that coarser scales leave. `images` are batches (B, 3, S, S); one batch at a time must fit into
    memory."""
    weight = vae.quantize.embedding.weight
    f = [vae.features(batch).float() for batch in images]  # each (B, C, P, P)
    filled = 0
    for k, share in enumerate(_shares(len(weight), schedule)):
        # unfilled rows repeat a filled one, so that quantizing the scales before k ignores them
        weight[filled:] = weight[0]
        pool = torch.cat([residuals(vae, part, schedule)[k] for part in f])
        weight[filled : filled + share] = _draw(pool, share)
        filled += share


@torch.no_grad()
def restart_codes(
    vae: VQVAE,
    images: Sequence[Tensor],
    schedule: ScaleSchedule,
    gather: Callable[[Tensor], Tensor] = lambda rows: rows,
) -> Tensor:
    """Move codes that nothing uses, and the least used ones where a scale has too few, to residuals of
    `images`.

    A scale has too few when it uses fewer codes than its share. Without this the coarse scales collapse although
    no code is unused: the encoder settles on their few codes, and the fine scales take the others.

    Args:
        images: batches (B, 3, S, S), of which one at a time must fit into memory.
        gather: what of all ranks, from the rows of this one.

    Returns:
        indices of the moved codes, (n,) int64.
    """
    weight = vae.quantize.embedding.weight
    hits = vae.quantize.ema_vocab_hit_SV  # (K, V)
    total = hits.sum(0)
    lacking = []
    for share, scale_hits in zip(_shares(len(weight), schedule), hits, strict=True):
        in_use = scale_hits >= USED_SHARE * scale_hits.sum() / max(1, share)
        lacking.append(max(0, share - int(in_use.sum())))
    dead = int((total < DEAD_SHARE * total.mean()).sum())
    count = max(dead, min(sum(lacking), round(MOVED_SHARE * len(weight))))
    moved = total.argsort(stable=True)[:count]
    if count:
        f = gather(torch.cat([vae.features(batch).float() for batch in images]))
        pools = residuals(vae, f, schedule)
        need = torch.tensor(lacking if sum(lacking) else schedule.patch_nums, dtype=torch.float64)
        scale = torch.multinomial(need, count, replacement=True).to(moved.device)
        for k, pool in enumerate(pools):
            mine = moved[scale == k]
            weight[mine] = _draw(pool, len(mine))
    return moved


def forget(optimizer: torch.optim.Optimizer, weight: Tensor, rows: Tensor) -> None:
    """Zero the optimizer's moments of rows whose codes were replaced."""
    inner = getattr(optimizer, "optim", optimizer)  # a ZeroRedundancyOptimizer has this rank's inside
    for name, value in inner.state.get(weight, {}).items():
        if name in ("exp_avg", "exp_avg_sq"):
            value[rows] = 0


def _rows(rest: Tensor, side: int) -> Tensor:
    pooled = rest if side == rest.shape[-1] else area_downsample(rest, side)  # (B, C, p, p)
    return pooled.permute(0, 2, 3, 1).reshape(-1, rest.shape[1])  # (B * p * p, C)


def _draw(pool: Tensor, count: int) -> Tensor:
    """`count` random rows of (N, C); distinct if there are enough."""
    order = torch.randperm(len(pool), device="cpu").to(pool.device)
    return pool[order.repeat(-(-count // len(pool)) if count else 1)[:count]]


def _shares(total: int, schedule: ScaleSchedule) -> list[int]:
    """Codes of each scale, in proportion to its side; they add up to `total`."""
    sides = schedule.patch_nums
    ends = [round(total * sum(sides[: k + 1]) / sum(sides)) for k in range(len(sides))]
    return [end - start for start, end in pairwise([0, *ends])]
