"""The discriminator of a tokenizer's training: what it sees, its losses, its optimizer and schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from var_ext.models.keyed import key_rows, row_keys
from var_ext.training.critics import spectral
from var_ext.training.critics.augment import DiffAugment, blurred
from var_ext.training.critics.patch import PatchDiscriminator
from var_ext.training.critics.vit_heads import ViTDiscriminator
from var_ext.training.critics.watch import Watch
from var_ext.training.frozen_vit import load_vit
from var_ext.training.losses.adversarial import consistency_loss, hinge_loss, lecam_loss
from var_ext.training.losses.term import ramp
from var_ext.training.means import Means
from var_ext.training.optim import cosine_factor, param_groups, set_rates
from var_ext.training.parallel import (
    accumulating,
    build_optimizer,
    clip_gradients,
    distribute,
    load_optimizer_state,
    optimizer_state,
)
from var_ext.training.precision import autocast
from var_ext.training.ranks import Part, Ranks
from var_ext.training.recipes import TokenizerRecipe

BETAS = (0.5, 0.9)
STREAM = 0x5DEECE66D  # sets its random numbers apart from the tokenizer's
LECAM_DECAY = 0.999
WEIGHT_STD = 0.02  # of convolutions at the start
# what is seen in a step, each with draws of its own; the last two are for consistency
VIEWS = ("decoder", "real", "fake", "real again", "fake again")


def build_discriminator(recipe: TokenizerRecipe, device: torch.device) -> nn.Module:
    """The discriminator of a recipe: images (B, 3, S, S) in [-1, 1] -> logits (B, ...).

    Raises:
        ValueError, CheckpointError: the image size or the file does not serve.
    """
    module: nn.Module
    if recipe.discriminator == "patch":
        module = PatchDiscriminator(recipe.image_size)
    else:
        vit = load_vit(recipe.discriminator, recipe.discriminator_size).to(device)
        vit.activation_checkpointing = recipe.activation_checkpointing
        module = ViTDiscriminator(vit)
    for layer in module.modules():
        if isinstance(layer, nn.Conv1d | nn.Conv2d):
            nn.init.trunc_normal_(layer.weight, std=WEIGHT_STD)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return spectral.normalise(module) if recipe.critic_spectral_norm else module


class Critic:
    """A discriminator in training.

    Attributes:
        module: the discriminator, images (B, 3, S, S) in [-1, 1] -> logits (B, ...).
        vit: the frozen network that it is built on, if there is one.
    """

    def __init__(
        self, module: nn.Module, recipe: TokenizerRecipe, ranks: Ranks, device: torch.device
    ) -> None:
        self.module, self.recipe, self.ranks, self.device = module.to(device), recipe, ranks, device
        strong = {name: (1.0, recipe.critic_cutout) for name in VIEWS[3:]}
        usual = {name: (recipe.critic_augment, recipe.critic_cutout) for name in VIEWS[:3]}
        self.views = nn.ModuleDict({name: DiffAugment(*how) for name, how in (usual | strong).items()})
        self.rows = key_rows(nn.ModuleList([self.module, self.views]), device)
        self.parallel = distribute(self.module, ranks, recipe.shard, device)
        groups = param_groups(self.module)
        self.optimizer = build_optimizer(
            torch.optim.AdamW, groups, ranks, recipe.shard, lr=recipe.critic_lr, betas=BETAS, fused=True
        )
        self.vit = module.frozen[0] if isinstance(module, ViTDiscriminator) else None
        self.watch = Watch(recipe.critic_throttle)
        self.averages: tuple[float, float] | None = None  # of logits of real and fake images, for LeCAM

    @property
    def name(self) -> str:
        """What recipe.json calls the discriminator."""
        return f"{self.vit.name} heads" if self.vit else type(self.module).__name__

    def digests(self) -> dict[str, str]:
        """Of the frozen weights it is built on, by a name a reader understands."""
        return {"weights of the discriminator": self.vit.digest()} if self.vit else {}

    def weight(self, progress: float) -> float:
        """Factor on the adversarial loss at a share of the steps, 0 until the discriminator begins."""
        return ramp(progress, self.recipe.adversarial_start, self.recipe.adversarial_warmup)

    def blur(self, progress: float) -> float:
        """How much of the first blur is left, in [0, 1]."""
        fades = self.recipe.critic_blur
        return 1 - ramp(progress, self.recipe.adversarial_start, fades) if fades else 0.0

    def rate(self, step: int, total: int) -> float:
        """Learning rate: a warm-up from its own start, then half a cosine to the end of the run."""
        start = math.floor(self.recipe.adversarial_start * total)
        own = max(1, total - start)
        warmup = min(1.0, self.recipe.critic_warmup * total / own)
        return self.recipe.critic_lr * cosine_factor(
            max(0, step - start), own, warmup=warmup, end=self.recipe.lr_end
        )

    def opinion(self, output: Tensor, seed: int, rows: slice, progress: float) -> Tensor:
        """The adversarial loss of reconstructions (b, 3, S, S), (); the discriminator learns nothing from it.

        Args:
            seed: of the step.
            rows: of the global batch.
            progress: share of the steps.
        """
        self.key(seed, rows)
        self.module.requires_grad_(False)
        logits = self.logits(self.module, self.view("decoder", output, self.blur(progress)))
        self.module.requires_grad_(True)
        return -logits.mean()

    def key(self, seed: int, rows: slice) -> None:
        self.rows.keys = row_keys(seed ^ STREAM, rows, self.device)

    def view(self, name: str, images: Tensor, blur: float = 0.0) -> Tensor:
        return self.views[name](blurred(images, blur))

    def logits(self, module: nn.Module, images: Tensor) -> Tensor:
        with autocast(self.device, self.recipe.autocast):
            return module(images).float()

    def step(
        self,
        step: int,
        total: int,
        seed: int,
        parts: Sequence[Part],
        images: Sequence[Tensor],
        outputs: Sequence[Tensor],
        factor: float = 1.0,
    ) -> dict[str, float]:
        """An optimizer step on images and reconstructions, (b, 3, S, S) for each part; all ranks together.

        Args:
            step, total: this one, of how many.
            seed: of the step.
            factor: on the learning rate.

        Returns:
            Means of the loss and logits, and whether the step was left out.
        """
        recipe, held, blur = self.recipe, self.watch.held, self.blur(step / total)
        found = Means(self.ranks, self.device)
        if not held:
            lr = factor * self.rate(step, total)
            set_rates(self.optimizer, lr, recipe.critic_weight_decay)
            self.optimizer.zero_grad(set_to_none=True)
            spectral.iterate(self.module)
        for part, real, fake in zip(parts, images, outputs, strict=True):
            self.key(seed, part.rows)
            with (
                nullcontext() if held else accumulating(self.parallel, part.last),
                torch.set_grad_enabled(not held),
            ):
                loss, values = self.losses(self.module if held else self.parallel, real, fake, blur)
                if not held:
                    (loss * part.share).backward()
            found.add(part.share, **values)
        metrics = found.read()
        if not held:
            clip_gradients(self.module, recipe.clip)
            self.optimizer.step()
        if recipe.lecam:
            self.average(metrics["critic_real"], metrics["critic_fake"])
        self.watch.update(metrics["critic"], step + 1, total, tell=self.ranks.rank == 0)
        return {**metrics, "critic_held": float(held)}

    def losses(
        self, module: nn.Module, real: Tensor, fake: Tensor, blur: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The discriminator's loss on a part, and what of it is logged."""
        recipe = self.recipe
        seen = [self.view("real", real, blur), self.view("fake", fake, blur)]
        if recipe.bcr:
            seen += [self.view("real again", real), self.view("fake again", fake)]
        first, second, *again = self.logits(module, torch.cat(seen)).chunk(len(seen))
        loss = hinge_loss(first, second)
        values = {"critic": loss, "critic_real": first.mean(), "critic_fake": second.mean()}
        if recipe.bcr:
            values["bcr"] = consistency_loss(first, again[0]) + consistency_loss(second, again[1])
            loss = loss + recipe.bcr * values["bcr"]
        if recipe.lecam and self.averages is not None:
            values["lecam"] = lecam_loss(first, second, *self.averages)
            loss = loss + recipe.lecam * values["lecam"]
        return loss, values

    def average(self, real: float, fake: float) -> None:
        before = self.averages or (real, fake)
        new = (LECAM_DECAY * a + (1 - LECAM_DECAY) * b for a, b in zip(before, (real, fake), strict=True))
        self.averages = tuple(new)  # type: ignore[assignment]

    def state_dict(self) -> dict[str, Any]:
        return {
            "module": self.module.state_dict(),
            "optimizer": optimizer_state(self.optimizer, self.module, self.ranks),
            "watch": self.watch.state_dict(),
            "averages": self.averages,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.module.load_state_dict(state["module"])
        load_optimizer_state(self.optimizer, self.module, state["optimizer"])
        self.watch.load_state_dict(state["watch"])
        self.averages = None if state["averages"] is None else tuple(state["averages"])
