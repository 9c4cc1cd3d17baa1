"""Training of the tokenizer: `train_tokenizer` on images, `TokenizerTask` for the loop.

To add a reconstruction loss, edit `losses.py`; a perceptual one needs no change here, it is passed as a hook.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from var_ext.checkpoints import save_model
from var_ext.data import ImageLoader, load_dataset
from var_ext.models import VQVAE
from var_ext.models.keyed import key_rows, row_keys
from var_ext.paths import user_path
from var_ext.training import codebook
from var_ext.training.checkpoint import DIGESTS
from var_ext.training.keeper import Keeper, restart
from var_ext.training.loop import Moment, Task, fit, in_float32, prepare, step_seed
from var_ext.training.losses import (
    PatchDiscriminator,
    adaptive_weight,
    hinge_loss,
    last_gradients,
    reconstruction_loss,
)
from var_ext.training.optim import Ema, averaged, cosine_factor, in_place, param_groups, set_rates
from var_ext.training.parallel import (
    accumulating,
    build_optimizer,
    clip_gradients,
    distribute,
    load_optimizer_state,
    optimizer_state,
)
from var_ext.training.precision import autocast
from var_ext.training.ranks import ALONE, Part, Ranks, join
from var_ext.training.recipes import TokenizerRecipe
from var_ext.training.tokens import digests_of
from var_ext.training.usage import perplexity

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
        device: where to train: "cpu" or "cuda", which under torchrun is each rank's own.
        resume: resume from `out`/last.ckpt if it exists.
        progress: show progress bars.

    Returns:
        `out`, ready for `var_ext.checkpoints.load_tokenizer` and `train_var`.

    Raises:
        DataError: the data cannot be used.
        CheckpointError: `out` cannot be written, or its checkpoint is broken or from another run.
        Diverged: the loss is no longer finite, see `recipe.on_divergence`.
        SystemExit: status 75: SIGTERM came, and a checkpoint was written.
    """
    out = user_path(out)
    with join(device, recipe.rank_timeout) as (ranks, device):
        prepare(out, ranks)
        task = TokenizerTask(data, recipe, perceptual=perceptual, device=device, ranks=ranks)
        weights = fit(task, out, resume=resume, progress=progress)
        if ranks.rank == 0:
            task.vae.load_state_dict(weights)
            task.vae.eval()
            save_model(out, task.vae.cpu(), dtype=torch.float16 if recipe.half else torch.float32)
        ranks.wait()
    return out


class TokenizerTask(Task):
    """A VQVAE, its optimizer, and a discriminator if the recipe has an adversarial weight."""

    def __init__(
        self,
        data: str | Path,
        recipe: TokenizerRecipe,
        *,
        perceptual: Perceptual | None = None,
        device: str | torch.device = "cpu",
        ranks: Ranks = ALONE,
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
        self.perceptual, self.device, self.ranks = perceptual, torch.device(device), ranks
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
        self.rows = key_rows(self.vae, self.device)
        self.keeper = Keeper(self.vae, recipe, ranks, self.rows, self.device)
        self.parallel = distribute(self.vae, ranks, recipe.shard, self.device)
        self.optimizer = self.adam(self.vae)
        if self.critic is not None:
            self.parallel_critic = distribute(self.critic, ranks, recipe.shard, self.device)
            self.critic_optimizer = self.adam(self.critic)
        self.ema = self.average() if recipe.ema > 0 else None

    def adam(self, module: nn.Module) -> torch.optim.Optimizer:
        recipe, groups = self.recipe, param_groups(module)
        return build_optimizer(
            torch.optim.Adam, groups, self.ranks, recipe.shard, lr=recipe.lr, betas=BETAS, fused=True
        )

    def average(self) -> Ema:
        return Ema(self.vae, self.recipe.ema, self.ranks, shared_out=self.recipe.shard == "optimizer")

    def parameters(self) -> dict[str, Tensor]:
        return dict(self.vae.named_parameters())

    def start(self) -> None:
        """Initialise the codes with features of the data."""
        count = min(self.recipe.codebook_init, self.num_items)
        if count:
            images, _ = self.train_data.batch(torch.randperm(self.num_items)[:count])
            self.vae.eval()
            parts = images.to(self.device).split(self.recipe.micro_batch or self.recipe.batch_size)
            codebook.seed_codebook(self.vae, parts, self.schedule)  # every rank: the same codes
            if self.ema:
                self.ema = self.average()

    def feed(self, epoch: int, batches: Tensor) -> Iterable[Any]:
        return ((images[:, 0], labels) for images, labels in self.loader.batches(batches, [epoch]))

    def step(self, at: Moment, batch: tuple[Tensor, Tensor]) -> Mapping[str, Any]:
        recipe, images, quantizer = self.recipe, batch[0], self.vae.quantize
        self.vae.train()
        lr = recipe.lr * self.rate * cosine_factor(at.step, at.total, warmup=recipe.warmup, end=recipe.lr_end)
        set_rates(self.optimizer, lr)
        seed, start = step_seed(recipe.seed, at.step), self.ranks.rows(self.global_batch).start
        parts = self.ranks.parts(self.global_batch, recipe.micro_batch)
        inputs = [images[p.rows.start - start : p.rows.stop - start].to(self.device) for p in parts]
        ramp = self.adversarial_ramp(at.progress) if self.critic else 0.0
        sums = torch.zeros(4, dtype=torch.float64, device=self.device)
        outputs, balance = [], None
        self.keeper.begin(seed, at.progress, self.global_batch, parts, inputs)
        if ramp > 0 and len(parts) > 1:
            balance = self.balance_ahead(parts, inputs, seed)
        quantizer.collected = torch.zeros_like(quantizer.ema_vocab_hit_SV)
        self.optimizer.zero_grad(set_to_none=True)
        for part, x in zip(parts, inputs, strict=True):
            self.rows.keys = row_keys(seed, part.rows, self.device)
            with accumulating(self.parallel, part.last):
                output, distance, vq = self.reconstruct(self.parallel, x)
                loss = distance + recipe.weight_vq * vq
                terms = [loss.detach(), (output - x).detach().abs().mean(), vq.detach()]
                if ramp > 0:
                    adversarial = self.opinion(output)
                    if balance is None:
                        balance = self.balance(part.share * self.last_gradients(distance, adversarial))
                    loss = loss + ramp * recipe.weight_adversarial * balance * adversarial
                    terms.append(adversarial.detach())
                (loss * part.share).backward()
            outputs.append(output.detach())
            sums[: len(terms)] += part.share / self.ranks.world * torch.stack(terms).double()
        grad = clip_gradients(self.vae, recipe.clip)
        self.optimizer.step()
        quantizer.record_hits(self.ranks.sum(quantizer.collected))
        quantizer.collected = None
        metrics: dict[str, Any] = {"grad": grad, "lr": lr}
        metrics |= self.keeper.finish(self.global_batch, self.optimizer, self.ema)
        if ramp > 0:
            metrics["critic"] = self.critic_step(parts, inputs, outputs, lr)
        if self.ema:
            self.ema.update(self.vae, at.step)
        if (
            recipe.restart_every
            and (at.step + 1) % recipe.restart_every == 0
            and at.progress < recipe.restart_until
        ):
            metrics["restarted"] = self.restart(inputs)
        if not at.logged:
            return {}
        names = ("loss", "l1", "vq", "adversarial")[: 4 if ramp > 0 else 3]
        metrics |= zip(names, self.ranks.sum(sums).tolist(), strict=False)
        scales = {
            "usage": quantizer.usages(self.global_batch * self.schedule.side**2),
            "perplexity": perplexity(quantizer.ema_vocab_hit_SV).tolist(),
        }
        return {**{name: float(value) for name, value in metrics.items()}, **scales}

    def reconstruct(self, vae: nn.Module, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruction (b, 3, S, S) float32, its distance, and the quantizer's loss."""
        with autocast(self.device, self.recipe.autocast):
            output, _, vq = vae(images)
        return output.float(), self.distance(output.float(), images), vq.float()

    def opinion(self, output: Tensor) -> Tensor:
        """The adversarial term of (b, 3, S, S); the discriminator learns nothing from it."""
        assert self.critic is not None
        self.critic.requires_grad_(False)
        with autocast(self.device, self.recipe.autocast):
            logits = self.critic(output)
        self.critic.requires_grad_(True)
        return -logits.float().mean()

    def last_gradients(self, distance: Tensor, adversarial: Tensor) -> Tensor:
        return last_gradients(distance, adversarial, self.vae.decoder.conv_out.weight)

    def balance(self, gradients: Tensor) -> Tensor:
        """The adaptive weight of the global batch, from this rank's sum of gradients at the last layer."""
        return adaptive_weight(self.ranks.sum(gradients) / self.ranks.world)

    def balance_ahead(self, parts: list[Part], inputs: list[Tensor], seed: int) -> Tensor:
        """The same in a pass of its own, where the graphs of all micro-batches would not fit into memory."""
        last = self.vae.decoder.conv_out.weight
        self.vae.requires_grad_(False)
        last.requires_grad_(True)
        self.vae.quantize.collected = torch.zeros_like(self.vae.quantize.ema_vocab_hit_SV)  # counted later
        gradients = torch.zeros(2, *last.shape, device=self.device)
        for part, x in zip(parts, inputs, strict=True):
            self.rows.keys = row_keys(seed, part.rows, self.device)
            output, distance, _ = self.reconstruct(self.vae, x)
            gradients += part.share * self.last_gradients(distance, self.opinion(output))
        self.vae.requires_grad_(True)
        return self.balance(gradients)

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

    def critic_step(self, parts: list[Part], images: list[Tensor], outputs: list[Tensor], lr: float) -> float:
        assert self.critic is not None
        set_rates(self.critic_optimizer, lr)
        self.critic_optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for part, x, output in zip(parts, images, outputs, strict=True):
            with accumulating(self.parallel_critic, part.last):
                with autocast(self.device, self.recipe.autocast):
                    real, fake = self.parallel_critic(x), self.parallel_critic(output)
                loss = hinge_loss(real.float(), fake.float())
                (loss * part.share).backward()
            total += part.share / self.ranks.world * loss.detach()
        clip_gradients(self.critic, self.recipe.clip)
        self.critic_optimizer.step()
        return float(self.ranks.sum(total))

    def restart(self, images: list[Tensor]) -> int:
        """Move unused codes to residuals of the global batch; returns how many."""
        target = self.recipe.restart_target
        return restart(self.vae, images, self.ranks, self.global_batch, self.optimizer, self.ema, target)

    @torch.no_grad()
    def validate(self) -> Mapping[str, Any]:
        """Losses on validation images, and `usage.figures` of their tokens, with the weights to be kept."""
        self.vae.eval()
        with in_place(self.vae, self.ema):
            return self.measure()

    def measure(self) -> dict[str, Any]:
        """What `validate` returns, with the model's current weights."""
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        hits = torch.zeros_like(self.vae.quantize.ema_vocab_hit_SV)
        most = self.recipe.micro_batch or -(-self.recipe.batch_size // self.ranks.world)
        parts = [
            torch.arange(part.rows.start, part.rows.stop)
            for part in self.ranks.parts(len(self.val_data), most)
        ]
        for images in (batch[0][:, 0] for batch in self.val_loader.batches(parts, [0])):
            output, distance, _ = self.reconstruct(self.vae, images)
            values = distance, (output - images).abs().mean(), (output - images).square().mean()
            sums += len(images) / len(self.val_data) * torch.stack(values).double()
            hits += self.vae.quantize.hits(torch.cat(self.vae.img_to_idxBl(images), 1))
        names = ("loss", "l1", "l2")
        found = dict(zip(names, self.ranks.sum(sums).tolist(), strict=True))
        return {**found, **self.keeper.validated(self.ranks.sum(hits))}

    def weights(self) -> dict[str, Tensor]:
        return averaged(self.vae, self.ema)

    def state_dict(self) -> dict[str, Any]:
        state = {
            "vae": self.vae.state_dict(),
            "updates": self.vae.quantize.record_hit,
            "optimizer": optimizer_state(self.optimizer, self.vae, self.ranks),
            "ema": dict(self.ema.averages(self.vae)) if self.ema else None,
            "alarm": self.keeper.alarm.state_dict(),
        }
        if self.critic is not None:
            state["critic"] = self.critic.state_dict()
            state["critic_optimizer"] = optimizer_state(self.critic_optimizer, self.critic, self.ranks)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.vae.load_state_dict(state["vae"])
        self.vae.quantize.record_hit = state["updates"]
        load_optimizer_state(self.optimizer, self.vae, state["optimizer"])
        self.keeper.alarm.load_state_dict(state["alarm"])
        if self.ema:
            self.ema.load_state_dict(state["ema"])
        if self.critic is not None:
            self.critic.load_state_dict(state["critic"])
            load_optimizer_state(self.critic_optimizer, self.critic, state["critic_optimizer"])
