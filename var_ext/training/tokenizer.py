"""Training of the tokenizer: `train_tokenizer` on images, `TokenizerTask` for the loop.

To add a reconstruction loss, see `losses`; a perceptual one needs no change here, it is passed as a hook. Another
discriminator is any module from images to logits that `critics.build_discriminator` returns.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from var_ext.checkpoints import check_apart, load_tokenizer, save_model
from var_ext.data import ImageLoader, load_dataset
from var_ext.grid import tiles
from var_ext.models import VQVAE
from var_ext.models.keyed import key_rows, row_keys
from var_ext.paths import user_path
from var_ext.training import codebook
from var_ext.training.build_tokenizer import build_tokenizer, last_layer, set_trainable, train_mode
from var_ext.training.checkpoint import DIGESTS
from var_ext.training.critics import Critic, build_discriminator
from var_ext.training.keeper import Keeper, restart
from var_ext.training.loop import Moment, Task, fit, in_float32, own_folder, step_seed
from var_ext.training.losses import Loss
from var_ext.training.losses.adversarial import adaptive_weight, last_gradients
from var_ext.training.losses.chosen import digests_of as digests_of_losses
from var_ext.training.losses.chosen import image_losses, name_of, term
from var_ext.training.means import Means
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
from var_ext.training.tokens import digest_of, digests_of
from var_ext.training.usage import perplexity

BETAS = (0.5, 0.9)


@in_float32()
def train_tokenizer(
    data: str | Path,
    out: str | Path,
    recipe: TokenizerRecipe,
    *,
    perceptual: Loss | None = None,
    init_from: str | Path | None = None,
    device: str | torch.device = "cpu",
    resume: bool = True,
    progress: bool = True,
) -> Path:
    """Train a multi-scale VQVAE (paper, section 3.2) and write it as a model folder.

    Args:
        data: "digits" or a folder of class folders of images.
        out: folder of the result; it also keeps recipe.json, last.ckpt and log.jsonl of the run.
        recipe: e.g. `TokenizerRecipe.digits()`.
        perceptual: a loss instead of the recipe's: called with (reconstruction, images), both (B, 3, S, S) float32 in
            [-1, 1], it returns a scalar or one value per image; its mean enters with `weight_perceptual`.
        init_from: name or folder of a tokenizer that gives the first weights, codes too unless `recipe.codebook_init`
            asks for others; its sizes must be those of the recipe (`TokenizerRecipe.finetune`), scales may differ.
        device: where to train: "cpu" or "cuda", which under torchrun is each rank's own.
        resume: resume from `out`/last.ckpt if it exists.
        progress: show progress bars.

    Returns:
        `out`, ready for `var_ext.checkpoints.load_tokenizer` and `train_var`.

    Raises:
        DataError: the data cannot be used.
        CheckpointError: `out` cannot be written, its checkpoint is broken or from another run, or a file of weights
            cannot be used.
        ValueError: a loss of the recipe lacks its weights or has none to weigh, the weights to begin with do not fit or
            are in `out`, or `freeze` names no parameter.
        Diverged: the loss is no longer finite, see `recipe.on_divergence`.
        SystemExit: status 75: SIGTERM came, and a checkpoint was written.
    """
    out = user_path(out)
    check_apart(out, init_from=init_from)
    with join(device, recipe.rank_timeout) as (ranks, device), own_folder(out, ranks):
        source = None if init_from is None else load_tokenizer(init_from)
        task = TokenizerTask(data, recipe, perceptual=perceptual, source=source, device=device, ranks=ranks)
        weights = fit(task, out, resume=resume, progress=progress)
        if ranks.rank == 0:
            save_model(out, task.model(weights), dtype=torch.float16 if recipe.half else torch.float32)
        ranks.wait()
    return out


class TokenizerTask(Task):
    """A VQVAE, its losses and optimizer, and a `Critic` if the recipe has an adversarial weight."""

    def __init__(
        self,
        data: str | Path,
        recipe: TokenizerRecipe,
        *,
        perceptual: Loss | None = None,
        source: VQVAE | None = None,
        device: str | torch.device = "cpu",
        ranks: Ranks = ALONE,
    ) -> None:
        self.recipe: TokenizerRecipe = recipe.beginning(source is not None)
        recipe = self.recipe
        self.device, self.ranks = torch.device(device), ranks
        self.losses = image_losses(recipe, recipe.image_size, perceptual, self.device)
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
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.vae = build_tokenizer(recipe, source).to(self.device)
            self.critic = (
                Critic(build_discriminator(recipe, self.device), recipe, ranks, self.device)
                if recipe.weight_adversarial > 0
                else None
            )
        self.pins = self.identity(source)
        self.schedule = self.vae.schedule
        self.rows = key_rows(self.vae, self.device)
        self.trained = {name for name, p in self.vae.named_parameters() if p.requires_grad}
        self.keeper = Keeper(self.vae, recipe, ranks, self.rows, self.device, tuned=source is not None)
        self.parallel = distribute(self.vae, ranks, recipe.shard, self.device)
        groups = param_groups(self.vae)
        self.optimizer = build_optimizer(
            torch.optim.AdamW, groups, ranks, recipe.shard, lr=recipe.lr, betas=BETAS, fused=True
        )
        self.ema = self.average() if recipe.ema > 0 else None

    def identity(self, source: VQVAE | None) -> dict[str, Any]:
        """What a checkpoint must have in common with this run; recipe.json shows it."""
        digests = digests_of(self.train_data, self.val_data) | digests_of_losses(self.losses)
        if source is not None:
            digests["weights to begin with"] = digest_of(source)
        if self.critic is not None:
            digests |= self.critic.digests()
        names = {name: name_of(self.losses.loss(name)) for name in ("perceptual", "semantic")}
        names["discriminator"] = self.critic.name if self.critic else None
        return {"kind": "tokenizer", DIGESTS: digests, **names, "recipe": self.recipe.pinned()}

    def average(self) -> Ema:
        return Ema(self.vae, self.recipe.ema, self.ranks, shared_out=self.recipe.shard == "optimizer")

    def publish(self, out: Path, checkpoint: str) -> None:
        save_model(out, self.model(), training=checkpoint)

    def model(self, weights: Mapping[str, Tensor] | None = None) -> VQVAE:
        """A tokenizer of its own with these weights, without storage where there are none."""
        with torch.device("meta"):
            vae = VQVAE(**self.vae.config)
        if weights is not None:
            vae.load_state_dict(weights, assign=True)
        return vae.eval()

    @torch.no_grad()
    def picture(self) -> Tensor | None:
        """Eight validation images above their reconstructions."""
        images, _ = self.val_data.batch(torch.arange(min(8, len(self.val_data))))
        images = images.to(self.device)
        self.vae.eval()
        with in_place(self.vae, self.ema):
            output, _ = self.reconstruct(self.vae, images)
        if self.ranks.rank:
            return None
        return tiles((torch.cat([images, output]).cpu() + 1) / 2, len(images))

    def parameters(self) -> dict[str, Tensor]:
        return dict(self.vae.named_parameters())

    def start(self) -> None:
        """Initialise the codes with features of the data, where the recipe asks for it."""
        count = min(self.recipe.codebook_init, self.num_items)
        if count:
            images, _ = self.train_data.batch(torch.randperm(self.num_items)[:count])
            self.vae.eval()
            parts = images.to(self.device).split(self.recipe.micro_batch or self.recipe.batch_size)
            if self.recipe.centre:
                codebook.centre(self.vae, parts)
            codebook.seed_codebook(self.vae, parts, self.schedule)  # every rank: the same codes
            if self.ema:
                self.ema = self.average()

    def feed(self, epoch: int, batches: Tensor) -> Iterable[Any]:
        return ((images[:, 0], labels) for images, labels in self.loader.batches(batches, [epoch]))

    def step(self, at: Moment, batch: tuple[Tensor, Tensor]) -> Mapping[str, Any]:
        recipe, images, quantizer = self.recipe, batch[0], self.vae.quantize
        train_mode(self.vae)
        lr = recipe.lr * self.rate * cosine_factor(at.step, at.total, warmup=recipe.warmup, end=recipe.lr_end)
        set_rates(self.optimizer, lr, recipe.weight_decay)
        seed, start = step_seed(recipe.seed, at.step), self.ranks.rows(self.global_batch).start
        parts = self.ranks.parts(self.global_batch, recipe.micro_batch)
        inputs = [images[p.rows.start - start : p.rows.stop - start].to(self.device) for p in parts]
        critic = self.critic if self.critic is not None and self.critic.weight(at.progress) > 0 else None
        self.keeper.begin(seed, at.progress, self.global_batch, parts, inputs)
        means, outputs, balance = Means(self.ranks, self.device), [], None
        if critic and len(parts) > 1:
            balance = self.balance_ahead(critic, parts, inputs, seed, at.progress)
        quantizer.collected = torch.zeros_like(quantizer.ema_vocab_hit_SV)
        self.optimizer.zero_grad(set_to_none=True)
        for part, x in zip(parts, inputs, strict=True):
            self.rows.keys = row_keys(seed, part.rows, self.device)
            with accumulating(self.parallel, part.last):
                output, vq = self.reconstruct(self.parallel, x)
                distance, values = self.losses(output, x, at.progress)
                loss = distance + term(recipe, "vq").weight_at(at.progress) * vq
                values |= {"loss": loss, "l1": (output - x).detach().abs().mean(), "vq": vq}
                if critic:
                    adversarial = critic.opinion(output, seed, part.rows, at.progress)
                    if balance is None:
                        balance = self.balance(part.share * self.last_gradients(distance, adversarial))
                    weight = critic.weight(at.progress) * recipe.weight_adversarial * balance
                    loss = loss + weight * adversarial
                    values |= {"adversarial": adversarial, "weight_adversarial": weight}
                (loss * part.share).backward()
            outputs.append(output.detach())
            means.add(part.share, **values)
        grad = clip_gradients(self.vae, recipe.clip)
        self.optimizer.step()
        quantizer.record_hits(self.ranks.sum(quantizer.collected))
        quantizer.collected = None
        metrics: dict[str, Any] = {"grad": grad, "lr": lr}
        metrics |= self.keeper.finish(self.global_batch, self.optimizer, self.ema)
        if critic:
            metrics |= critic.step(at.step, at.total, seed, parts, inputs, outputs, self.rate)
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
        metrics |= means.read() | self.changing_weights(at.progress)
        scales = {
            "usage": quantizer.usages(self.global_batch * self.schedule.side**2),
            "perplexity": perplexity(quantizer.ema_vocab_hit_SV).tolist(),
        }
        return {**{name: float(value) for name, value in metrics.items()}, **scales}

    def changing_weights(self, progress: float) -> dict[str, float]:
        """Weights that depend on the step, for the log; all others stand in the recipe."""
        terms = [each for each, _ in self.losses.parts] + [term(self.recipe, "vq")]
        return {f"weight_{each.name}": each.weight_at(progress) for each in terms if each.changes}

    def reconstruct(self, vae: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruction (b, 3, S, S) float32 and the quantizer's loss."""
        with autocast(self.device, self.recipe.autocast):
            output, _, vq = vae(images)
        return output.float(), vq.float()

    def last_gradients(self, distance: Tensor, adversarial: Tensor) -> Tensor:
        return last_gradients(distance, adversarial, last_layer(self.vae))

    def balance(self, gradients: Tensor) -> Tensor:
        """The adaptive weight of the global batch, from this rank's sum of gradients at the last layer."""
        mean = self.ranks.sum(gradients) / self.ranks.world
        return adaptive_weight(mean, self.recipe.adaptive_clamp)

    def balance_ahead(
        self, critic: Critic, parts: list[Part], inputs: list[Tensor], seed: int, progress: float
    ) -> Tensor:
        """The same in a pass of its own, where the graphs of all micro-batches would not fit into memory."""
        last = last_layer(self.vae)
        self.vae.requires_grad_(False)
        last.requires_grad_(True)
        self.vae.quantize.collected = torch.zeros_like(self.vae.quantize.ema_vocab_hit_SV)  # counted later
        gradients = torch.zeros(2, *last.shape, device=self.device)
        for part, x in zip(parts, inputs, strict=True):
            self.rows.keys = row_keys(seed, part.rows, self.device)
            output, _ = self.reconstruct(self.vae, x)
            distance, _ = self.losses(output, x, progress)
            adversarial = critic.opinion(output, seed, part.rows, progress)
            gradients += part.share * self.last_gradients(distance, adversarial)
        set_trainable(self.vae, self.trained)
        return self.balance(gradients)

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
        names = [each.name for each, _ in self.losses.parts if each.weight > 0]
        means = Means(self.ranks, self.device, ("loss", "l1", "l2", *names))
        hits = torch.zeros_like(self.vae.quantize.ema_vocab_hit_SV)
        most = self.recipe.micro_batch or -(-self.recipe.batch_size // self.ranks.world)
        parts = self.ranks.parts(len(self.val_data), most)
        rows = [torch.arange(part.rows.start, part.rows.stop) for part in parts]
        for part, (images, _) in zip(parts, self.val_loader.batches(rows, [0]), strict=True):
            x = images[:, 0]
            with autocast(self.device, self.recipe.autocast):
                output, tokens = self.vae.reconstruct(x)
            output = output.float()
            distance, values = self.losses(output, x)
            error = output - x
            values |= {"loss": distance, "l1": error.abs().mean(), "l2": error.square().mean()}
            means.add(part.share, **values)
            hits += self.vae.quantize.hits(tokens)
        return {**means.read(), **self.keeper.validated(self.ranks.sum(hits))}

    def weights(self) -> dict[str, Tensor]:
        return averaged(self.vae, self.ema)

    def state_dict(self) -> dict[str, Any]:
        state = {
            "model": self.vae.state_dict(),
            "updates": self.vae.quantize.record_hit,
            "optimizer": optimizer_state(self.optimizer, self.vae, self.ranks),
            "ema": dict(self.ema.averages(self.vae)) if self.ema else None,
            "alarm": self.keeper.alarm.state_dict(),
        }
        if self.critic is not None:
            state["critic"] = self.critic.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.vae.load_state_dict(state["model"])
        self.vae.quantize.record_hit = state["updates"]
        load_optimizer_state(self.optimizer, self.vae, state["optimizer"])
        self.keeper.alarm.load_state_dict(state["alarm"])
        if self.ema:
            self.ema.load_state_dict(state["ema"])
        if self.critic is not None:
            self.critic.load_state_dict(state["critic"])
