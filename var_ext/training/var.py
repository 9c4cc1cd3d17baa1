"""Training of the transformer: `train_var` on the tokens of a trained tokenizer, `VARTask` for the loop.

A conditioning other than class labels would enter through `VARTask.step`; another loss through
`tally.token_losses`.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from var_ext.checkpoints import check_apart, find_model, load_tokenizer
from var_ext.grid import tiles
from var_ext.models import VAR, VQVAE
from var_ext.models.keyed import row_keys
from var_ext.paths import user_path
from var_ext.sampling import Sampler
from var_ext.schedule import ScaleSchedule
from var_ext.training.checkpoint import DIGESTS
from var_ext.training.flops import flops_of
from var_ext.training.init_from import with_scales
from var_ext.training.loop import Moment, Task, fit, in_float32, prepare, step_seed
from var_ext.training.loss_weights import token_weights
from var_ext.training.network import (
    first_network,
    other_classes,
    plain_network,
    prepare_network,
    publish_network,
    sampling_of,
    save_network,
)
from var_ext.training.optim import (
    Ema,
    averaged,
    build_optimizers,
    cosine,
    in_place,
    linear_factor,
    set_rates,
)
from var_ext.training.parallel import (
    accumulating,
    as_like,
    clip_gradients,
    distribute,
    load_optimizer_state,
    optimizer_state,
    whole,
)
from var_ext.training.precision import DTYPES, LossScale, autocast
from var_ext.training.progressive import check_first, stage
from var_ext.training.ranks import ALONE, Part, Ranks, join
from var_ext.training.recipes import VARRecipe
from var_ext.training.speed import Meter, peak_tflops
from var_ext.training.stored_tokens import open_splits, open_tokens
from var_ext.training.tally import Tally, token_losses
from var_ext.training.tokens import digest_of, digests_of

log = logging.getLogger(__name__)


@in_float32()
def train_var(
    data: str | Path,
    tokenizer: str | Path,
    out: str | Path,
    recipe: VARRecipe,
    *,
    init_from: str | Path | None = None,
    device: str | torch.device = "cpu",
    resume: bool = True,
    progress: bool = True,
) -> Path:
    """Train a VAR transformer (paper, section 3.1) and write it with its tokenizer as a model folder, or with
    `recipe.lora_save` "adapter" the adapters alone.

    Args:
        data: as of `load_dataset`, such as a folder of class folders of images; or "tokens:FOLDER", see
            `stored_tokens`.
        tokenizer: folder of a trained tokenizer.
        out: folder of the result; it also keeps recipe.json, last.ckpt, log.jsonl and the cached tokens of
            the run.
        recipe: e.g. `VARRecipe.digits()`.
        init_from: name or folder of a model whose transformer gives the first weights (`training.init_from`); its sizes
            must be those of the recipe, classes and scales may differ.
        device: where to train: "cpu" or "cuda", which under torchrun is each rank's own.
        resume: resume from `out`/last.ckpt if it exists.
        progress: show progress bars.

    Returns:
        `out`, ready for `var_ext.load`.

    Raises:
        DataError: the data cannot be used.
        CheckpointError: the tokenizer or the checkpoint cannot be used, or `out` cannot be written.
        ValueError: the scales or the weights to begin with do not fit, tokenizer or weights are in `out`, a pattern
            names nothing, or what the recipe asks for does not work here.
        Diverged: the loss is no longer finite, see `recipe.on_divergence`.
        SystemExit: status 75: SIGTERM came, and a checkpoint was written.
    """
    out = user_path(out)
    check_apart(out, tokenizer=tokenizer, init_from=init_from)
    with join(device, recipe.rank_timeout) as (ranks, device):
        prepare(out, ranks)
        vae = load_tokenizer(tokenizer)
        if recipe.patch_nums:
            vae = with_scales(vae, recipe.patch_nums)
        begin = None if init_from is None else find_model(init_from)
        # no name for the transformer here: a second copy of the weights would live as long as the training
        task = VARTask(
            data, vae, out, recipe, device=device, ranks=ranks, progress=progress,
            source=None if begin is None else begin.models()[1],
            source_classes=None if begin is None else begin.class_names,
        )  # fmt: skip
        weights = fit(task, out, resume=resume, progress=progress)
        if ranks.rank == 0:
            new_classes = task.var.class_emb.weight.requires_grad
            save_network(
                out, weights, recipe, vae.cpu(), task.class_names, source=init_from, new_classes=new_classes
            )
        ranks.wait()
    return out


class VARTask(Task):
    """A VAR transformer, its optimizer, and the tokens of the training and validation images."""

    def __init__(
        self,
        data: str | Path,
        vae: VQVAE,
        cache: Path,
        recipe: VARRecipe,
        *,
        source: VAR | None = None,
        source_classes: Sequence[str] | None = None,
        device: str | torch.device = "cpu",
        ranks: Ranks = ALONE,
        progress: bool = False,
    ) -> None:
        self.recipe: VARRecipe = recipe
        self.ranks = ranks
        self.device = torch.device(device)
        self.vae = vae.to(self.device).eval()
        self.schedule: ScaleSchedule = vae.schedule
        self.token_weights = token_weights(recipe.loss_weights, self.schedule).to(self.device)  # (L,)
        if recipe.pg:
            check_first(recipe.pg0, len(self.schedule))
        self.train_data, self.val_data = open_splits(data, vae, recipe)
        self.num_items, self.class_names = len(self.train_data), self.train_data.class_names
        self.cache, self.progress = cache, progress
        digests = digests_of(self.train_data, self.val_data) | {"tokenizer": digest_of(vae)}
        if source is not None:
            digests["weights to begin with"] = digest_of(source)
        self.pins = {"kind": "var", DIGESTS: digests, "recipe": recipe.pinned()}
        new_classes = None
        if source is not None:
            new_classes = other_classes(self.class_names, source.num_classes, source_classes)
        self.var, notes = first_network(recipe, self.vae, self.train_data.num_classes, source)
        notes += prepare_network(self.var, recipe, self.device, new_classes=new_classes)
        for note in notes if ranks.rank == 0 else ():
            log.warning("%s", note)
        if recipe.compile:
            for block in self.var.blocks:
                block.compile()
        # AdaLN is called for all blocks before the first one, so it is gathered on its own
        projections = [block.ada_lin for block in self.var.blocks if not recipe.shared_aln]
        self.parallel = distribute(
            self.var, ranks, recipe.shard, self.device,
            units=[*projections, *self.var.blocks], dtype=DTYPES[recipe.autocast],
        )  # fmt: skip
        self.rows = self.var.key_rows(self.device)
        self.optimizers = build_optimizers(recipe.optimizer, self.var, ranks, recipe.shard, recipe.base_lr)
        shared_out = recipe.shard == "optimizer"
        self.ema = Ema(self.var, recipe.ema, ranks, shared_out=shared_out) if recipe.ema > 0 else None
        self.scale = LossScale(recipe.autocast == "fp16")

    def meter(self) -> Meter:
        """Of the transformer's FLOPs; making tokens online is not counted."""
        recipe, peak = self.recipe, self.recipe.peak_tflops
        if not peak and self.device.type == "cuda" and recipe.autocast != "fp32":
            peak = peak_tflops(torch.cuda.get_device_name(self.device))
        flops = flops_of(recipe, self.schedule, self.vae.vocab_size, self.vae.Cvae)
        return Meter(
            self.device, self.global_batch,
            tokens=self.schedule.num_tokens, flops=flops, peak=1e12 * peak * self.ranks.world,
        )  # fmt: skip

    def sides(self) -> list[int]:
        return [side * self.vae.downsample for side in self.schedule.patch_nums]

    def publish(self, out: Path, checkpoint: str) -> None:
        publish_network(out, checkpoint, self.recipe, self.vae, self.class_names)

    def picture(self) -> Tensor | None:
        """Eight images each of eight classes."""
        weights = {name: whole(tensor) for name, tensor in self.weights().items()}
        if self.ranks.rank:
            return None
        var = plain_network(self.recipe, self.vae, self.train_data.num_classes, weights)
        sampler = Sampler(self.vae, var.to(self.device), defaults=sampling_of(self.recipe), precision="fp32")
        count = min(8, sampler.num_classes)
        labels = [i * sampler.num_classes // count for i in range(count) for _ in range(8)]
        return tiles(sampler(labels, list(range(8)) * count).cpu(), 8)

    def parameters(self) -> dict[str, Tensor]:
        return dict(self.var.named_parameters())

    def load_data(self) -> None:
        """Open the tokens of the training and the validation images, the latter always cached."""
        self.val_tokens, self.tokens = (
            open_tokens(self.vae, data, self.recipe, self.cache, progress=self.progress)
            for data in (self.val_data, self.train_data)
        )

    def feed(self, epoch: int, batches: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
        """Tokens (B, L) int64 and labels (B,); each epoch uses another augmented version of an image."""
        return self.tokens.feed(epoch, batches)

    def step(self, at: Moment, batch: tuple[Tensor, Tensor]) -> Mapping[str, Any]:
        recipe, (tokens, labels) = self.recipe, batch
        count, start = self.global_batch, self.ranks.rows(self.global_batch).start
        self.var.train()
        factor = linear_factor(
            at.step, at.total, warmup=recipe.warmup, end=recipe.lr_end, progressive=recipe.pg
        )
        decay = cosine(at.step / max(1, at.total - 1), recipe.weight_decay, recipe.weight_decay_end)
        rate = recipe.base_lr * count / 256 * factor * self.rate
        for optimizer in self.optimizers:
            set_rates(optimizer, rate, decay)
            optimizer.zero_grad(set_to_none=True)
        last, weight = stage(
            at.step,
            at.total,
            scales=len(self.schedule),
            share=recipe.pg,
            first=recipe.pg0,
            warmup=recipe.warmup,
        )
        weights = self.token_weights[: self.schedule.slices[last].stop].clone()
        weights[self.schedule.slices[last]] *= weight
        seed = step_seed(recipe.seed, at.step)
        tally = Tally(self.schedule, last, self.vae.vocab_size, self.device)
        for part in self.parts(count):
            self.rows.keys = row_keys(seed, part.rows, self.device)
            mine = slice(part.rows.start - start, part.rows.stop - start)
            with accumulating(self.parallel, part.last):
                logits, targets = self.forward(tokens[mine], labels[mine], last)  # (b, L', V), (b, L')
                losses = token_losses(logits, targets, recipe.label_smoothing)
                loss = (losses * weights).sum(1).mean() / self.schedule.num_tokens
                (loss * (part.share * self.scale.scale)).backward()
            if at.logged and part.share:
                tally.add(losses.detach(), logits.detach().argmax(-1), targets)
        self.scale.unscale(self.var)
        norm = clip_gradients(self.var, recipe.clip)
        stepped = self.scale.accepts(norm)
        if stepped:
            for optimizer in self.optimizers:
                optimizer.step()
            if self.ema:
                self.ema.update(self.var, at.step)
        if not at.logged:
            return {}
        found = tally.summary(self.ranks, weights if recipe.loss_weights else None)
        metrics = {**found, "lr": rate, "weight_decay": decay}
        if recipe.pg:
            metrics |= {"stage": last, "stage_weight": weight}
        if stepped:
            metrics["grad"] = float(norm)
        return {**metrics, "scale": self.scale.scale} if self.scale.enabled else metrics

    def parts(self, count: int) -> list[Part]:
        """This rank's rows of `count`; where weights are shared out, every forward pass communicates."""
        return self.ranks.parts(count, self.recipe.micro_batch, even=self.recipe.shard == "full")

    def forward(self, tokens: Tensor, labels: Tensor, last: int) -> tuple[Tensor, Tensor]:
        """Logits of the scales 0..`last` and targets: tokens (B, L) -> (B, L', V) float32, (B, L') int64."""
        scales = self.schedule.slices[: last + 1]
        with torch.no_grad():
            known = self.vae.quantize.idxBl_to_var_input([tokens[:, where] for where in scales])
        run = self.parallel if self.var.training else self.var
        with autocast(self.device, self.recipe.autocast):
            logits: Tensor = run(labels, known)
        return logits.float(), tokens[:, : scales[-1].stop]

    @torch.no_grad()
    def validate(self) -> Mapping[str, Any]:
        """Loss (nats per token) and token accuracy (%): over all tokens, at the last scale, and per scale.

        With the weights to be kept, without label dropout or smoothing.
        """
        self.var.eval()
        last = len(self.schedule) - 1
        tally = Tally(self.schedule, last, self.vae.vocab_size, self.device)
        most = self.recipe.micro_batch or -(-self.recipe.batch_size // self.ranks.world)
        parts = self.ranks.parts(len(self.val_data), most, even=self.recipe.shard == "full")
        with in_place(self.var, self.ema):
            rows = [torch.arange(part.rows.start, part.rows.stop) for part in parts]
            for part, (tokens, labels) in zip(parts, self.val_tokens.feed(0, rows), strict=True):
                logits, targets = self.forward(tokens, labels, last)
                if part.share:
                    tally.add(token_losses(logits, targets, 0.0), logits.argmax(-1), targets)
        return tally.summary(self.ranks)

    def weights(self) -> dict[str, Tensor]:
        return averaged(self.var, self.ema)

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.var.state_dict(),
            "optimizer": {
                key: kept
                for optimizer in self.optimizers
                for key, kept in optimizer_state(optimizer, self.var, self.ranks).items()
            },
            "ema": dict(self.ema.averages(self.var)) if self.ema else None,
            "scale": self.scale.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        own = self.var.state_dict()
        self.var.load_state_dict(
            {n: as_like(t, own[n]) if n in own else t for n, t in state["model"].items()}
        )
        for optimizer in self.optimizers:
            load_optimizer_state(optimizer, self.var, state["optimizer"])
        if self.ema:
            self.ema.load_state_dict(state["ema"])
        self.scale.load_state_dict(state["scale"])
