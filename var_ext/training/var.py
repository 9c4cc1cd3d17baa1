"""Training of the transformer: `train_var` on the tokens of a trained tokenizer, `VARTask` for the loop.

A conditioning other than class labels would enter through `VARTask.step`; another loss through
`token_losses`.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from var_ext.checkpoints import load_tokenizer, save_model
from var_ext.data import load_dataset
from var_ext.models import VAR, VQVAE
from var_ext.paths import user_path
from var_ext.schedule import ScaleSchedule
from var_ext.training.checkpoint import DIGESTS
from var_ext.training.loop import Moment, Task, fit, in_float32, prepare
from var_ext.training.optim import Ema, averaged, cosine, in_place, linear_factor, param_groups, set_rates
from var_ext.training.recipes import VARRecipe
from var_ext.training.tokens import BATCH, digest_of, digests_of, open_tokens

BETAS = (0.9, 0.95)
NEW_SCALE_WARMUP = 1 / 300  # share of the steps over which a new scale's loss weight rises to 1
NEW_SCALE_START = 0.01


@in_float32()
def train_var(
    data: str | Path,
    tokenizer: str | Path,
    out: str | Path,
    recipe: VARRecipe,
    *,
    device: str | torch.device = "cpu",
    resume: bool = True,
    progress: bool = True,
) -> Path:
    """Train a VAR transformer (paper, section 3.1) and write it with its tokenizer as a model folder.

    Args:
        data: "digits" or a folder of class folders of images.
        tokenizer: folder of a trained tokenizer.
        out: folder of the result; it also keeps recipe.json, last.ckpt, log.jsonl and the cached tokens of
            the run.
        recipe: e.g. `VARRecipe.digits()`.
        device: where to train.
        resume: resume from `out`/last.ckpt if it exists.
        progress: show progress bars.

    Returns:
        `out`, ready for `var_ext.load`.

    Raises:
        DataError: the data cannot be used.
        CheckpointError: the tokenizer or the checkpoint cannot be used, or `out` cannot be written.
    """
    out = user_path(out)
    prepare(out)
    vae = load_tokenizer(tokenizer)
    task = VARTask(data, vae, out, recipe, device=device, progress=progress)
    weights = fit(task, out, resume=resume, progress=progress)
    task.var.load_state_dict(weights)
    task.var.eval()
    sampling = {"cfg": recipe.cfg, "top_k": recipe.top_k, "top_p": recipe.top_p}
    dtype = torch.float16 if recipe.half else torch.float32
    return save_model(
        out, vae.cpu(), task.var.cpu(), sampling=sampling, class_names=task.class_names, dtype=dtype
    )


class VARTask(Task):
    """A VAR transformer, its optimizer, and the tokens of the training and validation images."""

    def __init__(
        self,
        data: str | Path,
        vae: VQVAE,
        cache: Path,
        recipe: VARRecipe,
        *,
        device: str | torch.device = "cpu",
        progress: bool = False,
    ) -> None:
        self.recipe: VARRecipe = recipe
        self.device = torch.device(device)
        self.vae = vae.to(self.device).eval()
        self.schedule: ScaleSchedule = vae.schedule
        size = self.schedule.side * vae.downsample
        read: dict[str, Any] = {"geometry": recipe.geometry, "decode": recipe.decode}
        self.train_data = load_dataset(data, "train", size, augment=recipe.augment, seed=recipe.seed, **read)
        self.val_data = load_dataset(data, "val", size, **read)
        self.num_items, self.class_names = len(self.train_data), self.train_data.class_names
        self.cache, self.progress = cache, progress
        digests = digests_of(self.train_data, self.val_data) | {"tokenizer": digest_of(vae)}
        self.pins = {"kind": "var", DIGESTS: digests, "recipe": recipe.pinned()}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.var = VAR(
                self.vae, num_classes=self.train_data.num_classes, depth=recipe.depth, embed_dim=recipe.embed_dim,
                num_heads=recipe.num_heads, mlp_ratio=recipe.mlp_ratio, drop_rate=recipe.drop_rate,
                drop_path_rate=recipe.drop_path_rate, shared_aln=recipe.shared_aln,
                cond_drop_rate=recipe.cond_drop_rate, attn_l2_norm=recipe.attn_l2_norm,
                patch_nums=self.schedule.patch_nums,
            )  # fmt: skip
            self.var.init_weights(
                init_adaln=recipe.init_adaln,
                init_adaln_gamma=recipe.init_adaln_gamma,
                init_head=recipe.init_head,
                init_std=-1,  # sqrt(1 / (3 C))
            )
        self.var.to(self.device)
        self.optimizer = torch.optim.AdamW(param_groups(self.var), lr=recipe.base_lr, betas=BETAS, fused=True)
        self.ema = Ema(self.var, recipe.ema) if recipe.ema > 0 else None

    def load_data(self) -> None:
        """Open the tokens of the training and the validation images, the latter always cached."""
        recipe = self.recipe
        options: dict[str, Any] = {
            "batch_size": min(BATCH, recipe.batch_size), "workers": recipe.workers, "progress": self.progress,
        }  # fmt: skip
        copies = recipe.copies if recipe.augment > 0 else 1
        self.val_tokens = open_tokens("cached", self.vae, self.val_data, self.cache, **options)
        self.tokens = open_tokens(
            recipe.tokens, self.vae, self.train_data, self.cache, copies=copies, **options
        )

    def feed(self, epoch: int, batches: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
        """Tokens (B, L) int64 and labels (B,); each epoch uses another augmented version of an image."""
        return self.tokens.feed(epoch, batches)

    def step(self, at: Moment, batch: tuple[Tensor, Tensor]) -> Mapping[str, Any]:
        recipe, (tokens, labels) = self.recipe, batch
        self.var.train()
        factor = linear_factor(at.step, at.total, warmup=recipe.warmup, end=recipe.lr_end)
        decay = cosine(at.step / max(1, at.total - 1), recipe.weight_decay, recipe.weight_decay_end)
        set_rates(self.optimizer, recipe.base_lr * len(labels) / 256 * factor, decay)
        last, weight = progressive(at.progress, len(self.schedule), recipe.pg, recipe.pg0, recipe.warmup)
        logits, targets = self.forward(tokens, labels, last)  # (B, L', V), (B, L')
        losses = token_losses(logits, targets, recipe.label_smoothing)
        weights = torch.ones(targets.shape[1], device=self.device)
        weights[self.schedule.slices[last]] = weight
        loss = (losses * weights).sum(1).mean() / self.schedule.num_tokens
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.var.parameters(), recipe.clip)
        self.optimizer.step()
        if self.ema:
            self.ema.update(self.var, at.step)
        if not at.logged:
            return {}
        found = logits.detach().argmax(-1)
        accuracy = 100 * (found == targets).float().mean()
        usage = used(found, self.schedule.patch_nums[: last + 1], logits.shape[-1])
        return {
            "loss": float(losses.detach().mean()),
            "accuracy": float(accuracy),
            "grad": float(norm),
            "usage": usage,
        }

    def forward(self, tokens: Tensor, labels: Tensor, last: int) -> tuple[Tensor, Tensor]:
        """Logits of the scales 0..`last` and targets: tokens (B, L) -> (B, L', V) float32, (B, L') int64."""
        scales = self.schedule.slices[: last + 1]
        with torch.no_grad():
            known = self.vae.quantize.idxBl_to_var_input([tokens[:, where] for where in scales])
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.autocast == "bf16"):
            logits: Tensor = self.var(labels, known)
        return logits.float(), tokens[:, : scales[-1].stop]

    @torch.no_grad()
    def validate(self) -> Mapping[str, Any]:
        """Loss (nats per token) and token accuracy (%): over all tokens, at the last scale, and per scale.

        With the weights to be kept, without label dropout or smoothing.
        """
        self.var.eval()
        losses, hits, found = [], [], []
        with in_place(self.var, self.ema):
            parts = torch.arange(len(self.val_data)).split(self.recipe.batch_size)
            for tokens, labels in self.val_tokens.feed(0, parts):
                logits, targets = self.forward(tokens, labels, len(self.schedule) - 1)
                losses.append(token_losses(logits, targets, 0.0))
                found.append(logits.argmax(-1))
                hits.append((found[-1] == targets).float())
        loss, hit = torch.cat(losses).mean(0), 100 * torch.cat(hits).mean(0)  # (L,)
        tail = self.schedule.slices[-1]
        return {
            "loss": float(loss.mean()),
            "loss_last": float(loss[tail].mean()),
            "accuracy": float(hit.mean()),
            "accuracy_last": float(hit[tail].mean()),
            "accuracy_scales": [float(hit[where].mean()) for where in self.schedule.slices],
            "usage": used(torch.cat(found), self.schedule.patch_nums, self.vae.vocab_size),
        }

    def weights(self) -> dict[str, Tensor]:
        return averaged(self.var, self.ema)

    def state_dict(self) -> dict[str, Any]:
        ema = self.ema.state_dict() if self.ema else None
        return {"var": self.var.state_dict(), "optimizer": self.optimizer.state_dict(), "ema": ema}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.var.load_state_dict(state["var"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema:
            self.ema.load_state_dict(state["ema"])


def token_losses(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy of every token: (B, L, V), (B, L) -> (B, L)."""
    flat = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="none", label_smoothing=smoothing
    )
    return flat.view(targets.shape)


def used(tokens: Tensor, patch_nums: tuple[int, ...], vocab_size: int) -> list[float]:
    """Share (%) of the codes that occur in `tokens` (B, L), for each scale."""
    scales = ScaleSchedule(patch_nums).slices
    return [100 * len(tokens[:, where].unique()) / vocab_size for where in scales]


def progressive(progress: float, scales: int, pg: float, pg0: int, warmup: float) -> tuple[int, float]:
    """Progressive training: the last scale trained now, and its loss weight.

    Scales after `pg0` join one by one, until at a share `pg` of the steps all are trained.
    """
    first = min(pg0, scales - 1)
    if pg <= 0 or progress >= pg + NEW_SCALE_WARMUP or first == scales - 1:
        return scales - 1, 1.0
    span = max(pg - warmup, 1e-9)
    last = first + int(min(1.0, max(0.0, progress - warmup) / span) * (scales - 1 - first))
    joined = warmup + span * (last - first) / (scales - 1 - first)
    weight = 1.0 if last == first else (progress - joined) / NEW_SCALE_WARMUP
    return last, min(1.0, max(NEW_SCALE_START, weight))
