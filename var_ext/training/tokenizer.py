"""Training of the tokenizer: `train_tokenizer` on images, `TokenizerTask` for the loop.

To add a reconstruction loss, edit `losses.py`; a perceptual one needs no change here, it is passed as a hook.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from var_ext.checkpoints import save_model
from var_ext.data import ImageLoader, load_dataset
from var_ext.models import VQVAE
from var_ext.paths import user_path
from var_ext.training import codebook
from var_ext.training.checkpoint import DIGESTS
from var_ext.training.loop import Moment, Task, fit, in_float32, prepare
from var_ext.training.losses import PatchDiscriminator, adaptive_weight, hinge_loss, reconstruction_loss
from var_ext.training.optim import Ema, averaged, cosine_factor, in_place, param_groups, set_rates
from var_ext.training.recipes import TokenizerRecipe
from var_ext.training.tokens import digests_of

log = logging.getLogger(__name__)

Perceptual = Callable[[Tensor, Tensor], Tensor]
BETAS = (0.5, 0.9)


@in_float32()
def train_tokenizer(
    data: str | Path,
    out: str | Path,
    recipe: TokenizerRecipe,
    *,
    perceptual: Perceptual | None = None,
    device: str | torch.device = "cpu",
    resume: bool = True,
    progress: bool = True,
) -> Path:
    """Train a multi-scale VQVAE (paper, section 3.2) and write it as a model folder.

    Args:
        data: "digits" or a folder of class folders of images.
        out: folder of the result; it also keeps recipe.json, last.ckpt and log.jsonl of the run.
        recipe: e.g. `TokenizerRecipe.digits()`.
        perceptual: called with (reconstruction, images), both (B, 3, S, S) float32 in [-1, 1], and returns a
            scalar or one value per image; its mean enters the loss with `weight_perceptual`. LPIPS is the
            usual choice; its weights are not part of this package.
        device: where to train.
        resume: resume from `out`/last.ckpt if it exists.
        progress: show progress bars.

    Returns:
        `out`, ready for `var_ext.checkpoints.load_tokenizer` and `train_var`.

    Raises:
        DataError: the data cannot be used.
        CheckpointError: `out` cannot be written, or its checkpoint is broken or from another run.
    """
    out = user_path(out)
    prepare(out)
    task = TokenizerTask(data, recipe, perceptual=perceptual, device=device)
    weights = fit(task, out, resume=resume, progress=progress)
    task.vae.load_state_dict(weights)
    task.vae.eval()
    dtype = torch.float16 if recipe.half else torch.float32
    return save_model(out, task.vae.cpu(), dtype=dtype)


class TokenizerTask(Task):
    """A VQVAE, its optimizer, and a discriminator if the recipe has an adversarial weight."""

    def __init__(
        self,
        data: str | Path,
        recipe: TokenizerRecipe,
        *,
        perceptual: Perceptual | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        hook = None
        if perceptual is not None:
            hook = f"{perceptual.__module__}.{getattr(perceptual, '__qualname__', type(perceptual).__qualname__)}"
        elif recipe.weight_perceptual > 0:
            log.warning(
                "no perceptual hook is given, so weight_perceptual is 0, not %g", recipe.weight_perceptual
            )
            recipe = replace(recipe, weight_perceptual=0.0)
        self.recipe: TokenizerRecipe = recipe
        self.perceptual, self.device = perceptual, torch.device(device)
        read: dict[str, Any] = {"geometry": recipe.geometry, "decode": recipe.decode}
        self.train_data = load_dataset(
            data, "train", recipe.image_size, augment=recipe.augment, seed=recipe.seed, **read
        )
        self.val_data = load_dataset(data, "val", recipe.image_size, **read)
        self.loader, self.val_loader = (
            ImageLoader(each, workers=recipe.workers, device=self.device)
            for each in (self.train_data, self.val_data)
        )
        self.num_items = len(self.train_data)
        digests = digests_of(self.train_data, self.val_data)
        self.pins = {"kind": "tokenizer", DIGESTS: digests, "perceptual": hook, "recipe": recipe.pinned()}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.vae = VQVAE(
                vocab_size=recipe.vocab_size, z_channels=recipe.z_channels, ch=recipe.ch,
                ch_mult=recipe.ch_mult, dropout=recipe.dropout, beta=recipe.beta,
                using_znorm=recipe.using_znorm, share_quant_resi=recipe.share_quant_resi,
                v_patch_nums=recipe.patch_nums, test_mode=False,
            ).to(self.device)  # fmt: skip
            self.critic = (
                PatchDiscriminator(recipe.image_size).to(self.device)
                if recipe.weight_adversarial > 0
                else None
            )
        self.schedule = self.vae.schedule
        self.optimizer = torch.optim.Adam(param_groups(self.vae), lr=recipe.lr, betas=BETAS, fused=True)
        self.critic_optimizer = (
            torch.optim.Adam(param_groups(self.critic), lr=recipe.lr, betas=BETAS, fused=True)
            if self.critic
            else None
        )
        self.ema = Ema(self.vae, recipe.ema) if recipe.ema > 0 else None

    def start(self) -> None:
        """Initialise the codes with features of the data."""
        count = min(self.recipe.codebook_init, self.num_items)
        if count:
            images, _ = self.train_data.batch(torch.randperm(self.num_items)[:count])
            self.vae.eval()
            parts = images.to(self.device).split(self.recipe.batch_size)
            codebook.seed_codebook(self.vae, parts, self.schedule)
            if self.ema:
                self.ema = Ema(self.vae, self.recipe.ema)

    def feed(self, epoch: int, batches: Tensor) -> Iterable[Any]:
        return ((images[:, 0], labels) for images, labels in self.loader.batches(batches, [epoch]))

    def step(self, at: Moment, batch: tuple[Tensor, Tensor]) -> Mapping[str, Any]:
        recipe, images = self.recipe, batch[0].to(self.device)
        self.vae.train()
        factor = cosine_factor(at.step, at.total, warmup=recipe.warmup, end=recipe.lr_end)
        set_rates(self.optimizer, recipe.lr * factor)
        output, usages, vq_loss = self.vae(images, ret_usages=at.logged)
        distance = self.distance(output, images)
        loss = distance + recipe.weight_vq * vq_loss
        metrics = {"loss": loss, "l1": (output - images).abs().mean(), "vq": vq_loss}
        ramp = self.adversarial_ramp(at.progress)
        if self.critic and ramp > 0:
            adversarial = -self.critic(output).mean()
            last = self.vae.decoder.conv_out.weight
            loss = (
                loss
                + ramp
                * recipe.weight_adversarial
                * adaptive_weight(distance, adversarial, last)
                * adversarial
            )
            metrics["adversarial"] = adversarial
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        metrics["grad"] = torch.nn.utils.clip_grad_norm_(self.vae.parameters(), recipe.clip)
        self.optimizer.step()
        if self.critic and ramp > 0:
            metrics["critic"] = self.critic_step(images, output.detach(), recipe.lr * factor)
        if self.ema:
            self.ema.update(self.vae, at.step)
        if (
            recipe.restart_every
            and (at.step + 1) % recipe.restart_every == 0
            and at.progress < recipe.restart_until
        ):
            metrics["restarted"] = self.restart(images)
        return (
            {**{k: float(torch.as_tensor(v).detach()) for k, v in metrics.items()}, "usage": usages}
            if at.logged
            else {}
        )

    def distance(self, output: Tensor, images: Tensor) -> Tensor:
        """Reconstruction and perceptual loss of (B, 3, S, S)."""
        loss = reconstruction_loss(output, images, self.recipe.weight_l1, self.recipe.weight_l2)
        if self.perceptual is not None:
            loss = loss + self.recipe.weight_perceptual * self.perceptual(output, images).mean()
        return loss

    def adversarial_ramp(self, progress: float) -> float:
        """0 until the discriminator starts, then rising to 1."""
        since = progress - self.recipe.adversarial_start
        return (
            min(1.0, since / self.recipe.adversarial_warmup)
            if self.recipe.adversarial_warmup
            else float(since >= 0)
        )

    def critic_step(self, images: Tensor, output: Tensor, lr: float) -> Tensor:
        assert self.critic is not None and self.critic_optimizer is not None
        set_rates(self.critic_optimizer, lr)
        loss = hinge_loss(self.critic(images), self.critic(output))
        self.critic_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.critic.parameters(), self.recipe.clip)
        self.critic_optimizer.step()
        return loss.detach()

    def restart(self, images: Tensor) -> int:
        """Move unused codes, in the moving average too; returns how many."""
        self.vae.eval()
        moved = codebook.restart_codes(self.vae, images, self.schedule)
        weight = self.vae.quantize.embedding.weight
        codebook.forget(self.optimizer, weight, moved)
        if self.ema:
            self.ema.average["quantize.embedding.weight"][moved] = weight.detach()[moved]
        return len(moved)

    @torch.no_grad()
    def validate(self) -> Mapping[str, Any]:
        """Losses on validation images and codes in use per scale (%), with the weights to be kept."""
        self.vae.eval()
        with in_place(self.vae, self.ema):
            return self.measure()

    def measure(self) -> dict[str, Any]:
        """What `validate` returns, with the model's current weights."""
        sums = {"loss": 0.0, "l1": 0.0, "l2": 0.0}
        seen = torch.zeros(len(self.schedule), self.recipe.vocab_size, dtype=torch.bool)
        parts = torch.arange(len(self.val_data)).split(self.recipe.batch_size)
        for images in (batch[0][:, 0] for batch in self.val_loader.batches(parts, [0])):
            output = self.vae(images)[0]
            values = (
                self.distance(output, images),
                (output - images).abs().mean(),
                (output - images).square().mean(),
            )
            for name, value in zip(sums, values, strict=True):
                sums[name] += float(value) * len(images) / len(self.val_data)
            for k, tokens in enumerate(self.vae.img_to_idxBl(images)):
                seen[k, tokens.flatten().cpu()] = True
        return {**sums, "usage": (100 * seen.float().mean(1)).tolist()}

    def weights(self) -> dict[str, Tensor]:
        return averaged(self.vae, self.ema)

    def state_dict(self) -> dict[str, Any]:
        return {
            "vae": self.vae.state_dict(),
            "updates": self.vae.quantize.record_hit,
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "critic": self.critic.state_dict() if self.critic else None,
            "critic_optimizer": self.critic_optimizer.state_dict() if self.critic_optimizer else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.vae.load_state_dict(state["vae"])
        self.vae.quantize.record_hit = state["updates"]
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema:
            self.ema.load_state_dict(state["ema"])
        if self.critic and self.critic_optimizer:
            self.critic.load_state_dict(state["critic"])
            self.critic_optimizer.load_state_dict(state["critic_optimizer"])
