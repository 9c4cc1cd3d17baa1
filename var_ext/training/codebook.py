"""Against codebook collapse: codes start on data features, and unused ones are moved to data.

All scales share one codebook, but the fine ones have almost all tokens, so the coarse ones (1x1 to 3x3)
easily end up with a handful of codes. Both remedies therefore allot codes by the *side* of a scale, not by its
token count. Others work inside the pass (`models/remedies.py`); `keeper.py` calls them all.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from var_ext.models import VQVAE
from var_ext.models.remedies import affinity, vectors
from var_ext.models.remedies import residuals as residuals_of
from var_ext.schedule import ScaleSchedule

DEAD_SHARE = 0.03  # a code counts as unused below this share of uniform use
USED_SHARE = 0.1  # the same for one scale, where uniform means over the codes allotted to it
MOVED_SHARE = 1 / 32  # used codes that one restart may move to scales with too few
CVQ_DECAY = 0.99  # of the average of hits, which is the quantizer's
CVQ_LEAST = 1e-3  # codes that would move by a smaller share of the way stay where they are


def residuals(vae: VQVAE, f: Tensor, schedule: ScaleSchedule) -> list[Tensor]:
    """What each scale has to express given the coarser ones: (B, C, P, P) -> K tensors (B * p_k * p_k, C)."""
    scales = torch.stack(vae.quantize.f_to_idxBl_or_fhat(f, to_fhat=True))
    return [vectors(z) for z in residuals_of(f, scales, schedule.patch_nums)]


@torch.no_grad()
def centre(vae: VQVAE, images: Sequence[Tensor]) -> None:
    """Take the mean of the features of `images`, batches (B, 3, S, S), off the bias of quant_conv.

    The coarsest scale sees means over places. What all features have in common is largest there: in a trained tokenizer
    without this it is four times as long as what tells images apart, and a few codes around it take every token. The
    decoder's biases can express it too.
    """
    total = torch.stack([vae.features(batch).float().mean((2, 3)).sum(0) for batch in images]).sum(0)
    bias = vae.quant_conv.bias
    assert bias is not None
    bias -= total / sum(len(batch) for batch in images)


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
    target: float = 0.0,
) -> Tensor:
    """Move codes that nothing uses, and the least used ones where a scale has too few, to residuals of
    `images`.

    A scale has too few when it uses fewer codes than its share. Without this the coarse scales collapse although
    no code is unused: the encoder settles on their few codes, and the fine scales take the others.

    Args:
        images: batches (B, 3, S, S), of which one at a time must fit into memory.
        gather: what of all ranks, from the rows of this one.
        target: share of all codes that each scale is to use, where the search lets scales share codes (by cosine);
            0: the scales divide them by side.

    Returns:
        indices of the moved codes, (n,) int64.
    """
    weight = vae.quantize.embedding.weight
    hits = vae.quantize.ema_vocab_hit_SV  # (K, V)
    total = hits.sum(0)
    lacking = []
    shares = [round(target * len(weight))] * len(schedule) if target else _shares(len(weight), schedule)
    for share, scale_hits in zip(shares, hits, strict=True):
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


@torch.no_grad()
def anchors(vae: VQVAE, pool: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where rarely used codes are to move: e <- (1 - a) e + a * anchor, a = exp(-10 V N / (1 - 0.99) - 0.001), with N
    the code's share of the hits (moving average) and its anchor a residual drawn by the softmax of their affinity
    (CVQ-VAE, arXiv 2307.15139, eqs. 5-7, in the figures of its code).

    All ranks draw the same where their generators stand alike.

    Args:
        pool: residuals of all scales and ranks, (N, C).

    Returns:
        indices of the codes with an a worth moving for, (n,) int64; a of each, (n,); their anchors, (n, C).
    """
    quantizer = vae.quantize
    weight, hits = quantizer.embedding.weight, quantizer.ema_vocab_hit_SV.sum(0)
    share = hits / hits.sum().clamp(min=1)
    blend = torch.exp(-10 * len(weight) * share / (1 - CVQ_DECAY) - 1e-3)  # (V,)
    moved = (blend > CVQ_LEAST).nonzero().flatten()
    drawn = [pool[:0]]
    for part in moved.split(256):  # of the table (V, N)
        chances = affinity(weight[part].float(), pool, quantizer.using_znorm).softmax(1)
        drawn.append(pool[torch.multinomial(chances.cpu(), 1)[:, 0].to(pool.device)])
    return moved, blend[moved], torch.cat(drawn)


def forget(
    optimizer: torch.optim.Optimizer, weight: Tensor, rows: Tensor, share: Tensor | float = 1.0
) -> None:
    """Take a share, a number or (n,), off the optimizer's moments of rows whose codes were replaced to that share."""
    inner = getattr(optimizer, "optim", optimizer)  # a ZeroRedundancyOptimizer has this rank's inside
    kept = (1 - torch.as_tensor(share, device=rows.device).expand(len(rows)))[:, None]
    for name, value in inner.state.get(weight, {}).items():
        if name in ("exp_avg", "exp_avg_sq"):
            value[rows] *= kept


def _draw(pool: Tensor, count: int) -> Tensor:
    """`count` random rows of (N, C); distinct if there are enough."""
    order = torch.randperm(len(pool), device="cpu").to(pool.device)
    return pool[order.repeat(-(-count // len(pool)) if count else 1)[:count]]


def _shares(total: int, schedule: ScaleSchedule) -> list[int]:
    """Codes of each scale, in proportion to its side; they add up to `total`."""
    sides = schedule.patch_nums
    ends = [round(total * sum(sides[: k + 1]) / sum(sides)) for k in range(len(sides))]
    return [end - start for start, end in pairwise([0, *ends])]
