"""What a tokenizer's trainer does at each step for the codebook: the remedies of its recipe, beside `codebook.py`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from var_ext.models import VQVAE
from var_ext.models.keyed import Rows, row_keys
from var_ext.models.remedies import Remedies, affinity, assignments, kept_scales, residuals, vectors
from var_ext.training import codebook
from var_ext.training.optim import Ema
from var_ext.training.precision import autocast
from var_ext.training.ranks import Part, Ranks
from var_ext.training.recipes import TokenizerRecipe
from var_ext.training.usage import Alarm, advice, figures

NAME = "quantize.embedding.weight"


def remedies_of(recipe: TokenizerRecipe) -> Remedies | None:
    """Those of a recipe, None for the published pass."""
    wanted = Remedies(
        scale_dropout=recipe.scale_dropout,
        dropout_start=recipe.scale_dropout_start,
        gradient=recipe.gradient,
        entropy=recipe.weight_entropy,
        temperature=recipe.entropy_temperature,
        perturbed_rows=recipe.perturb_rows,
        perturbed_tokens=recipe.perturb_tokens,
        perturbed_codes=recipe.perturb_codes,
        anchors=recipe.anchors,
        centre=recipe.centre > 0,
    )
    shares = wanted.scale_dropout, wanted.entropy, wanted.perturbed_rows, recipe.centre
    return wanted if max(shares) > 0 or wanted.anchors or recipe.gradient != "straight_through" else None


class Keeper:
    """Sets up the quantizer of a keyed tokenizer, and tells it at each step what all ranks and micro-batches share.

    Args:
        rows: of `key_rows`.
        tuned: whether its first weights are those of a trained one.
    """

    def __init__(
        self,
        vae: VQVAE,
        recipe: TokenizerRecipe,
        ranks: Ranks,
        rows: Rows,
        device: torch.device,
        *,
        tuned: bool = False,
    ) -> None:
        self.vae, self.recipe, self.ranks, self.rows, self.device = vae, recipe, ranks, rows, device
        self.remedies = vae.quantize.remedies = remedies_of(recipe)
        remedy = advice(
            recipe,
            tuned=tuned,
            frozen=not vae.quantize.embedding.weight.requires_grad,
            features=all(p.requires_grad for p in vae.quant_conv.parameters()),
        )
        self.alarm = Alarm(vae.schedule, remedy)

    def begin(self, seed: int, progress: float, count: int, parts: list[Part], inputs: list[Tensor]) -> None:
        """Before the passes of a step.

        Args:
            count: rows of the step, of all ranks.
            inputs: the images (b, 3, S, S) of each part.
        """
        remedies, quantizer = self.remedies, self.vae.quantize
        if remedies is None:
            return
        remedies.pool.clear()
        remedies.sums.clear()
        remedies.strength = self.strength(progress)
        if remedies.scale_dropout > 0:
            assert quantizer.draws is not None
            uniform = quantizer.draws.of(row_keys(seed, slice(0, count), self.device)).uniform(2)
            scales = len(quantizer.schedule)
            kept = kept_scales(uniform, scales, remedies.scale_dropout, remedies.dropout_start)
            remedies.shares = (torch.arange(scales, device=self.device)[:, None] < kept).float().mean(1)
        if remedies.entropy > 0 and (self.ranks.world > 1 or len(parts) > 1):
            remedies.probabilities = self.probabilities(seed, parts, inputs)

    def strength(self, progress: float) -> float:
        """Of perturbation: 1, between the shares of the run that the recipe names falling to its last value."""
        recipe = self.recipe
        length = recipe.perturb_stop - recipe.perturb_start
        passed = (
            (progress - recipe.perturb_start) / length if length else float(progress >= recipe.perturb_stop)
        )
        return 1 + (recipe.perturb_last - 1) * min(1.0, max(0.0, passed))

    @torch.no_grad()
    def probabilities(self, seed: int, parts: list[Part], inputs: list[Tensor]) -> Tensor:
        """Mean over the tokens of all ranks of their codes' chances, (K, V): the entropy of a mean is no mean of
        entropies, so this takes a pass of its own through the encoder."""
        quantizer, remedies = self.vae.quantize, self.remedies
        assert remedies is not None
        total = torch.zeros_like(quantizer.ema_vocab_hit_SV)
        for part, images in zip(parts, inputs, strict=True):
            self.rows.keys = row_keys(seed, part.rows, self.device)
            with autocast(self.device, self.recipe.autocast):
                features = self.vae.features(images)
            features, schedule = features.float(), quantizer.schedule
            _, _, scales = quantizer.quantize(features, schedule, per_scale=True)
            assert scales is not None
            rest = residuals(features, scales, schedule.patch_nums)
            for k, z in enumerate(rest):
                logits = affinity(vectors(z), quantizer.embedding.weight.float(), quantizer.using_znorm)
                total[k] += part.share / self.ranks.world * assignments(logits, remedies.temperature)
        return self.ranks.sum(total)

    def finish(self, count: int, optimizer: torch.optim.Optimizer, ema: Ema | None) -> dict[str, Tensor]:
        """After the step of the optimizer and the count of hits: centre and anchors. Returns metrics for the log."""
        if self.remedies is None:
            return {}
        return self.centre(count) | self.anchors(count, optimizer, ema)

    @torch.no_grad()
    def centre(self, count: int) -> dict[str, Tensor]:
        """Take a share of the mean of the step's features off the bias that they have in common."""
        if not self.recipe.centre:
            return {}
        assert self.remedies is not None
        places = count * self.vae.schedule.side**2
        mean = self.ranks.sum(torch.stack(self.remedies.sums).sum(0)) / places
        bias = self.vae.quant_conv.bias
        assert bias is not None
        bias -= self.recipe.centre * mean
        return {"off_centre": mean.norm()}

    def anchors(self, count: int, optimizer: torch.optim.Optimizer, ema: Ema | None) -> dict[str, Tensor]:
        """Move rarely used codes, in the moving average too, towards the step's residuals."""
        assert self.remedies is not None
        if not self.remedies.pool:
            return {}
        weight = self.vae.quantize.embedding.weight
        pool = self.ranks.together(torch.cat(self.remedies.pool), count)  # (B, sum of the sides, C)
        self.remedies.pool.clear()
        moved, blend, anchors = codebook.anchors(self.vae, pool.flatten(0, 1))
        average = ema.average.get(NAME) if ema else None
        for tensor in (weight.detach(), *(() if average is None else (average,))):
            tensor[moved] = torch.lerp(tensor[moved], anchors, blend[:, None])
        codebook.forget(optimizer, weight, moved, blend)
        return {"anchored": blend.sum()}

    def validated(self, hits: Tensor) -> dict[str, list[float]]:
        """`usage.figures` of a validation's hits (K, V), of all ranks, and the alarm."""
        self.alarm.check(hits, aloud=self.ranks.rank == 0)
        return figures(hits)


def restart(
    vae: VQVAE,
    images: Sequence[Tensor],
    ranks: Ranks,
    count: int,
    optimizer: torch.optim.Optimizer,
    ema: Ema | None,
    target: float,
) -> int:
    """Move unused codes, in the moving average too, to residuals of a step's images; returns how many."""
    vae.eval()
    moved = codebook.restart_codes(
        vae, images, vae.schedule, lambda rows: ranks.together(rows, count), target
    )
    weight = vae.quantize.embedding.weight
    codebook.forget(optimizer, weight, moved)
    average = ema.average.get(NAME) if ema else None
    if average is not None:
        average[moved] = weight.detach()[moved]
    return len(moved)
