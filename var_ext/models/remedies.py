"""What a quantizer may do in training beyond the published pass: against collapse, and for a decoder that bears errors.

All of it starts from the tokens and sums of `ops.residual_quantize`; a scale's residual never depends on it. Random
numbers are keyed by row where a trainer has keyed the model (`models/keyed.py`). Shape letters as in `quantizer.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from var_ext import ops

if TYPE_CHECKING:
    from var_ext.models.quantizer import MultiScaleQuantizer

GRADIENTS = ("straight_through", "rotation")


@dataclass
class Remedies:
    """The options of a training, and what it says anew at each step.

    Attributes:
        scale_dropout: share of the rows that leave out their finest scales (XQ-GAN, arXiv 2412.01762).
        dropout_start: scales that every row keeps, at least 1.
        gradient: how f_hat passes its gradient to the features, one of `GRADIENTS`.
        entropy, temperature: weight and temperature of `entropy_loss`, 0 is none.
        perturbed_rows, perturbed_tokens, perturbed_codes: of some rows the decoder sees codes among which a share of
            the tokens is replaced by one of so many nearest (RobustTok, arXiv 2503.08354).
        anchors: whether to keep a pool of residuals for `training.codebook.anchors`.
        centre: whether to keep the sum of the features, for their mean.
        shares: (K,) of the step's rows, on all ranks, how many keep each scale; None: of the rows that are seen.
        probabilities: (K, V) of the step's tokens, on all ranks, the mean of `assignments`; None likewise.
        strength: factor on the last two numbers of perturbation.
        pool: residuals of the step's passes so far in which codes are trained, (B, sum of the sides, C) each.
        sums: (C,) each, of the features of all rows and places in these passes.
    """

    scale_dropout: float = 0.0
    dropout_start: int = 3
    gradient: str = "straight_through"
    entropy: float = 0.0
    temperature: float = 0.01
    perturbed_rows: float = 0.0
    perturbed_tokens: float = 1.0
    perturbed_codes: int = 100
    anchors: bool = False
    centre: bool = False

    shares: Tensor | None = None
    probabilities: Tensor | None = None
    strength: float = 1.0
    pool: list[Tensor] = field(default_factory=list)
    sums: list[Tensor] = field(default_factory=list)

    def __call__(
        self, quantizer: MultiScaleQuantizer, features: Tensor, tokens: Tensor, scales: Tensor
    ) -> tuple[Tensor, Tensor]:
        """f_hat (B, C, P, P), with a gradient for the features, and the quantizer's loss.

        Args:
            features: (B, C, P, P) float32.
            tokens: (B, L) int64.
            scales: f_hat after each scale, (K, B, C, P, P).
        """
        schedule = quantizer.schedule
        sides, rows = sum(schedule.patch_nums), torch.arange(len(features), device=features.device)
        perturbing = self.perturbed_rows > 0
        count = 2 + sides + (1 + 2 * schedule.num_tokens if perturbing else 0)
        uniform = quantizer.uniform(len(features), count)
        kept = kept_scales(uniform[:, :2], len(scales), self.scale_dropout, self.dropout_start)
        loss = kept_losses(features, scales, kept, quantizer.beta, self.shares)
        f_hat = scales.detach()[kept - 1, rows]
        pooling = self.anchors and quantizer.embedding.weight.requires_grad
        if self.centre and features.requires_grad:  # not in a pass ahead of the step's
            self.sums.append(features.detach().sum((0, 2, 3)))
        if pooling or perturbing or self.entropy > 0:
            rest = residuals(features, scales.detach(), schedule.patch_nums)
            if pooling:
                self.pool.append(sample(rest, uniform[:, 2 : 2 + sides]))
            if self.entropy > 0:
                loss = loss + self.entropy * self.entropy_of(quantizer, rest)
            if perturbing:
                mine = uniform[:, 2 + sides] < self.perturbed_rows
                changed = perturb(
                    quantizer, [z.detach()[mine] for z in rest], tokens[mine], kept[mine],
                    uniform[mine, 3 + sides :], self.strength * self.perturbed_tokens,
                    max(1, int(self.strength * self.perturbed_codes)),
                )  # fmt: skip
                f_hat = f_hat.index_put((rows[mine],), changed)
        passed = rotated if self.gradient == "rotation" else straight_through
        return passed(features, f_hat), loss

    def entropy_of(self, quantizer: MultiScaleQuantizer, rest: list[Tensor]) -> Tensor:
        """Mean over scales of `entropy_loss`."""
        losses = []
        for k, z in enumerate(rest):
            logits = affinity(vectors(z), quantizer.embedding.weight.float(), quantizer.using_znorm)
            mean = None if self.probabilities is None else self.probabilities[k]
            losses.append(entropy_loss(logits, self.temperature, mean))
        return torch.stack(losses).mean()


def kept_scales(uniform: Tensor, scales: int, rate: float, start: int) -> Tensor:
    """How many scales each row keeps, (B,) int64: all K, or in a share `rate` of the rows one of start..K alike.

    Args:
        uniform: (B, 2) in [0, 1).
    """
    fewer = start + (uniform[:, 1] * (scales + 1 - start)).long().clamp(max=scales - start)
    return torch.where(uniform[:, 0] < rate, fewer, scales)


def kept_losses(
    features: Tensor, scales: Tensor, kept: Tensor, beta: float, shares: Tensor | None = None
) -> Tensor:
    """The published loss, mean over scales of beta * mse(stop(f_hat_k), f) + mse(f_hat_k, stop(f)), each scale's mean
    over the rows that keep it.

    Args:
        features, scales, kept: (B, C, P, P), (K, B, C, P, P), (B,).
        shares: (K,) of how many rows of the whole step keep each scale, of which these are a part; None: of these.
    """
    keeps = torch.arange(len(scales), device=kept.device)[:, None] < kept  # (K, B)
    if shares is None:
        shares = keeps.float().mean(1)
    factor = keeps / shares.clamp(min=torch.finfo(torch.float32).tiny)[:, None]  # no row: 0 / tiny
    commitment = (scales.detach() - features).square().mean((2, 3, 4))  # (K, B)
    codebook = (scales - features.detach()).square().mean((2, 3, 4))
    return ((beta * commitment + codebook) * factor).mean()


def straight_through(features: Tensor, f_hat: Tensor) -> Tensor:
    """f_hat, whose gradient goes to the features as it is."""
    return f_hat.detach() + (features - features.detach())


def rotated(features: Tensor, f_hat: Tensor, eps: float = 1e-6) -> Tensor:
    """f_hat (B, C, P, P), whose gradient goes to the features turned and scaled as each feature vector e is to become
    its quantized q: q = (|q| / |e|) R e with R = 1 - 2 w w^T + 2 q^ e^^T, w the normed sum of the unit vectors e^ and
    q^ (rotation trick, arXiv 2410.06424, section 4.2); R and the factor are constants of the backward pass."""
    e, q = features.detach(), f_hat.detach()
    size = e.norm(dim=1, keepdim=True).clamp(min=eps)  # (B, 1, P, P)
    unit_e, unit_q = e / size, F.normalize(q, dim=1)
    w = F.normalize(unit_e + unit_q, dim=1)

    def along(direction: Tensor) -> Tensor:
        return (features * direction).sum(1, keepdim=True)

    turned = features - 2 * w * along(w) + 2 * unit_q * along(unit_e)
    moved = turned * (q.norm(dim=1, keepdim=True) / size)
    return q + (moved - moved.detach())


def residuals(features: Tensor, scales: Tensor, patch_nums: tuple[int, ...]) -> list[Tensor]:
    """What each scale has to express given the coarser ones: K tensors (B, C, p, p).

    Args:
        features, scales: (B, C, P, P), and f_hat after each scale, (K, B, C, P, P).
    """
    before = [torch.zeros_like(scales[0]), *scales[:-1]]
    found = [features - f_hat for f_hat in before]
    return [
        z if side == z.shape[-1] else ops.area_downsample(z, side)
        for z, side in zip(found, patch_nums, strict=True)
    ]


def vectors(z: Tensor) -> Tensor:
    """(B, C, p, p) -> (B p p, C)."""
    return z.permute(0, 2, 3, 1).flatten(0, 2)


def sample(rest: list[Tensor], uniform: Tensor) -> Tensor:
    """p of the p x p residuals of each scale and row: K of (B, C, p, p), (B, sum of p) -> (B, sum of p, C)."""
    found = []
    for z, share in zip(rest, uniform.split([z.shape[-1] for z in rest], dim=1), strict=True):
        flat = z.detach().flatten(2).transpose(1, 2)  # (B, p p, C)
        place = (share * flat.shape[1]).long().clamp(max=flat.shape[1] - 1)  # (B, p)
        found.append(flat.gather(1, place[..., None].expand(-1, -1, flat.shape[2])))
    return torch.cat(found, 1)


def affinity(x: Tensor, codebook: Tensor, cosine: bool) -> Tensor:
    """What the search makes largest: the cosine, or minus the squared distance: (N, C), (V, C) -> (N, V)."""
    if cosine:
        return F.normalize(x, dim=-1) @ F.normalize(codebook, dim=-1).T
    return 2 * x @ codebook.T - x.square().sum(1, keepdim=True) - codebook.square().sum(1)


def assignments(logits: Tensor, temperature: float) -> Tensor:
    """Mean over tokens of the softmax over codes: (N, V) -> (V,)."""
    return (logits / temperature).softmax(-1).mean(0)


def entropy_loss(logits: Tensor, temperature: float, mean: Tensor | None = None) -> Tensor:
    """Mean entropy of a token's codes minus entropy of the mean over tokens (arXiv 2310.05737, eq. 8): tokens that are
    sure, codes that are used alike.

    Args:
        logits: `affinity`, (N, V); the codes of a token are the softmax of it over the temperature.
        mean: (V,), the mean over all tokens of a step of which these are a part; None: over these.
    """
    chances = (logits / temperature).log_softmax(-1)
    own = chances.exp().mean(0)
    mean = (own if mean is None else mean).detach()
    logs = mean.clamp(min=torch.finfo(mean.dtype).tiny).log()
    # its value; and for the gradient its linear part, so that those of parts add up to that of the whole
    batch = -(mean * logs).sum() - ((1 + logs) * (own - own.detach())).sum()
    return -(chances.exp() * chances).sum(-1).mean() - batch


def perturb(
    quantizer: MultiScaleQuantizer,
    rest: list[Tensor],
    tokens: Tensor,
    kept: Tensor,
    uniform: Tensor,
    share: float,
    near: int,
) -> Tensor:
    """f_hat (B, C, P, P) of tokens of which a share is replaced, each by one of its `near` nearest codes alike.

    Args:
        rest: `residuals`, K tensors (B, C, p, p); they stay those of the tokens as they were.
        tokens: (B, L).
        kept: (B,), the scales of each row that are summed.
        uniform: (B, 2 L) in [0, 1): whether to replace, and by which.
    """
    schedule, codebook = quantizer.schedule, quantizer.embedding.weight.detach().float()
    near = min(near, len(codebook))
    f_hat = torch.zeros(len(tokens), quantizer.Cvae, schedule.side, schedule.side, device=tokens.device)
    replaced, which = uniform[:, : schedule.num_tokens] < share, uniform[:, schedule.num_tokens :]
    with torch.no_grad():
        for k, where in enumerate(schedule.slices):
            order = (
                affinity(vectors(rest[k]), codebook, quantizer.using_znorm).topk(near).indices
            )  # (B p p, near)
            place = (which[:, where] * near).long().clamp(max=near - 1)  # (B, p p)
            other = order.gather(1, place.reshape(-1, 1)).view_as(place)
            codes = quantizer.codes(k, torch.where(replaced[:, where], other, tokens[:, where]))
            after, _ = quantizer.step(k, f_hat, codes, next_side=None)
            f_hat = torch.where((k < kept)[:, None, None, None], after, f_hat)
    return f_hat
