"""What a training of the tokenizer will need, before it runs: bytes of a rank and FLOPs of a step. See `plan`."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from var_ext._torch import fake_tensors
from var_ext.models import VQVAE
from var_ext.models.keyed import key_rows
from var_ext.training.build_tokenizer import build_tokenizer, last_layer, train_mode
from var_ext.training.critics import Critic, build_discriminator
from var_ext.training.losses.adversarial import last_gradients
from var_ext.training.losses.chosen import image_losses, term
from var_ext.training.losses.term import ImageLosses
from var_ext.training.plan import PeakMemory, Plan, described, drop_gradient, first_that_fits
from var_ext.training.precision import autocast
from var_ext.training.ranks import ALONE
from var_ext.training.recipes import TokenizerRecipe

CPU = torch.device("cpu")


def describe(recipe: TokenizerRecipe, device: str, world: int | None, memory: float | None) -> str:
    """Text of the plan of a command; see `fitting`.

    Args:
        world: ranks, None for those of the launcher.
        memory: GB of a rank, None for the GPU's if the device is one, else without limit.
    """
    images = recipe.batch_size  # those of the data are not looked at
    return described(
        recipe, device, world, memory, images, lambda ranks, limit: fitting(recipe, ranks, limit)
    )


def fitting(recipe: TokenizerRecipe, world: int, memory: float) -> Plan:
    """The plan of a recipe, if it fits `memory` (GB).

    Raises:
        ValueError: it does not; names settings that do, or says that none does.
        CheckpointError: a file of weights cannot be used.
    """
    losses = image_losses(recipe, recipe.image_size, None, CPU)  # their files are read once
    step = functools.cache(lambda again: Step(replace(recipe, activation_checkpointing=again), losses))
    return first_that_fits(
        recipe,
        lambda tried: planned(tried, step(tried.activation_checkpointing), world),
        world, memory, ("optimizer",),
    )  # fmt: skip


def plan(recipe: TokenizerRecipe, world: int = 1) -> Plan:
    """What a training needs with all its losses, in the part of it where the discriminator trains too."""
    return planned(recipe, Step(recipe, image_losses(recipe, recipe.image_size, None, CPU)), world)


def planned(recipe: TokenizerRecipe, step: Step, world: int) -> Plan:
    """The same; `step` serves for any batch, micro-batch and sharing."""
    share = -(-recipe.batch_size // world)
    images = min(share, recipe.micro_batch or share)
    several = images < share
    states = 4 * (2 + (recipe.ema > 0)) * step.trained + 4 * 2 * step.critic_parameters
    if recipe.shard == "optimizer" and world > 1:
        states //= world
    own = step.trained + step.critic_parameters
    # buckets of all gradients; those of micro-batches are summed up beside them
    gradients = 4 * own * ((1 + several) if world > 1 else several)
    weights = 4 * (step.parameters + step.critic_parameters) + step.frozen
    peak = step.peak(images, gradients == 0)
    return Plan(
        recipe, world, step.parameters, step.trained, weights, gradients, states, peak,
        recipe.batch_size * step.flops(several),
    )  # fmt: skip


class Step:
    """A step of a recipe with tensors that have no memory.

    Attributes:
        parameters, trained, critic_parameters: of the tokenizer, those of them that are trained, of the discriminator.
        frozen: bytes of frozen networks.
        peak: (images, kept) -> bytes that live at once; with the gradients, if they are kept and not counted elsewhere.
        flops: several -> of an image; where the adaptive weight takes a pass of its own before several micro-batches.
    """

    def __init__(self, recipe: TokenizerRecipe, losses: ImageLosses) -> None:
        self.recipe, self.losses = recipe, losses
        # read before the mode, in which nothing has values
        critic = build_discriminator(recipe, CPU) if recipe.weight_adversarial > 0 else None
        self.mode = fake_tensors(beside_real=True)
        with self.mode:
            self.vae: VQVAE = build_tokenizer(replace(recipe, compile=False))
            self.rows = key_rows(self.vae, CPU)
            alone = replace(recipe, shard="none")
            self.critic = None if critic is None else Critic(critic, alone, ALONE, CPU)
        self.parameters = sum(p.numel() for p in self.vae.parameters())
        self.trained = sum(p.numel() for p in self.vae.parameters() if p.requires_grad)
        self.critic_parameters = sum(p.numel() for p in critic.parameters()) if critic else 0
        networks = [loss for _, loss in losses.parts if isinstance(loss, torch.nn.Module)]
        if self.critic and self.critic.vit:
            networks.append(self.critic.vit)
        self.frozen = sum(4 * p.numel() for network in networks for p in network.parameters())
        self.peak, self.flops = functools.cache(self._peak), functools.cache(self._flops)

    def forward(self, images: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Images, reconstruction, the loss without the adversarial one, and that one."""
        x = torch.zeros(images, 3, self.recipe.image_size, self.recipe.image_size)
        self.rows.keys = torch.zeros(images, dtype=torch.int64)
        train_mode(self.vae)
        self.vae.quantize.eval()  # counts of hits have shapes that depend on values
        with autocast(CPU, self.recipe.autocast):
            output, _, vq = self.vae(x)
        output = output.float()
        distance = self.losses(output, x)[0] + term(self.recipe, "vq").weight_at(1.0) * vq.float()
        adversarial = self.critic.opinion(output, 0, slice(0, images), 1.0) if self.critic else None
        return x, output, distance, adversarial

    def run(self, images: int) -> None:
        """Forward and backward passes of tokenizer and discriminator."""
        x, output, loss, adversarial = self.forward(images)
        if adversarial is not None:
            last_gradients(loss, adversarial, last_layer(self.vae))
            loss = loss + adversarial
            del adversarial
        loss.backward()
        del loss
        if self.critic:
            self.critic.losses(self.critic.module, x, output.detach(), 0.0)[0].backward()

    def _peak(self, images: int, kept: bool) -> int:
        trained = [p for p in self.vae.parameters() if p.requires_grad]
        trained += list(self.critic.module.parameters()) if self.critic else []
        hooks = [] if kept else [p.register_post_accumulate_grad_hook(drop_gradient) for p in trained]
        with self.mode, PeakMemory() as memory:
            self.run(images)
            for p in trained:
                p.grad = None
        for hook in hooks:
            hook.remove()
        return memory.peak

    def _flops(self, several: bool) -> int:
        with self.mode, FlopCounterMode(display=False) as counted:
            self.run(1)
        found = counted.get_total_flops()
        if several and self.critic:
            with self.mode, FlopCounterMode(display=False) as counted:
                self.forward(1)
            found += counted.get_total_flops()
        # the quantizer's own kernel: distances, and phi with its gradient
        quantizer, schedule = self.vae.quantize, self.vae.schedule
        distances = 2 * quantizer.vocab_size * quantizer.Cvae * schedule.num_tokens
        phi = len(schedule) * 18 * quantizer.Cvae**2 * schedule.side**2
        return found + distances + 3 * phi
