"""Our training steps beside those of the published trainer, from a checkout: VAR_EXT_OFFICIAL names its folder."""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.models.test_published_face import official, with_official  # noqa: F401
from var_ext.models import VQVAE
from var_ext.training import VARRecipe
from var_ext.training.loop import Moment
from var_ext.training.var import VARTask

SCALES, STEPS, BATCH = (1, 2, 3, 4), 30, 6
NOT_DECAYED = ("pos_1LC", "pos_start", "lvl_embed", "ada_gss", "scale_mul")  # of the published names


def folder_of_images(root: Path) -> Path:
    for label in range(5):
        (root / str(label)).mkdir(parents=True)
        for i in range(3):
            pixels = np.random.default_rng([label, i]).integers(0, 255, (64, 64, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(root / str(label) / f"{i}.png")
    return root


@with_official
@pytest.mark.usefixtures("official")
@pytest.mark.parametrize("progressive", [0.0, 0.5])
def test_thirty_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, progressive: float) -> None:
    """Same weights, tokens, labels: the same losses, gradient norms, rates and stages; fp32, nothing dropped."""
    torch.manual_seed(0)
    vae = VQVAE(vocab_size=24, z_channels=8, ch=32, v_patch_nums=SCALES).eval()
    recipe = VARRecipe(
        epochs=1, batch_size=BATCH, depth=2, embed_dim=64, num_heads=2, drop_path_rate=0.0, cond_drop_rate=0.0,
        base_lr=0.05, warmup=0.1, lr_end=0.1, weight_decay=0.05, weight_decay_end=0.2, pg=progressive, pg0=1,
        init_adaln_gamma=0.5, init_head=0.5,
    )  # fmt: skip
    task = VARTask(folder_of_images(tmp_path / "images"), vae, tmp_path, recipe)

    models, control = importlib.import_module("models"), importlib.import_module("utils.lr_control")
    optimizers = importlib.import_module("utils.amp_sc")
    stubs = types.SimpleNamespace(MetricLogger=None, TensorboardLogger=None)
    monkeypatch.setitem(sys.modules, "utils.misc", stubs)
    trainers = importlib.import_module("trainer")
    published_vae = models.VQVAE(vocab_size=24, z_channels=8, ch=32, v_patch_nums=SCALES)
    published_vae.load_state_dict(vae.state_dict())
    var = models.VAR(
        published_vae, num_classes=5, depth=2, embed_dim=64, num_heads=2, drop_path_rate=0.0, cond_drop_rate=0.0,
        attn_l2_norm=True, patch_nums=SCALES,
    )  # fmt: skip
    var.load_state_dict(task.var.state_dict())
    groups: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
    for name, p in var.named_parameters():
        groups[not (p.ndim == 1 or name.endswith("bias") or any(key in name for key in NOT_DECAYED))].append(
            p
        )
    optimizer = torch.optim.AdamW(
        [{"params": params, "wd_sc": float(decays)} for decays, params in groups.items()], betas=(0.9, 0.95)
    )
    names, parameters = zip(*var.named_parameters(), strict=True)
    trainer = trainers.VARTrainer(
        "cpu", SCALES, tuple(16 * p for p in SCALES), published_vae, var, var,
        optimizers.AmpOptimizer(0, optimizer, names, parameters, recipe.clip), 0.0,
    )  # fmt: skip
    var.train()

    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        images = torch.rand(BATCH, 3, 64, 64, generator=generator) * 2 - 1
        labels = torch.randint(5, (BATCH,), generator=generator)
        tokens = torch.cat(vae.img_to_idxBl(images), dim=1)
        ours = task.step(Moment(step, STEPS, 0, True), (tokens, labels))

        schedule = f"lin{progressive}" if progressive else "lin0"
        peak, begin = recipe.base_lr * BATCH / 256, recipe.warmup * STEPS
        rates = control.lr_wd_annealing(
            schedule, optimizer, peak, recipe.weight_decay, recipe.weight_decay_end, step, begin, STEPS,
            wp0=0.005, wpe=recipe.lr_end,
        )  # fmt: skip
        stage = -1
        if progressive:
            end, last = STEPS * progressive, len(SCALES) - 1
            share = min(max((step - begin) / (end - begin), 0), 1)
            stage = 1 if step <= begin else last if step >= end else 1 + round(share * (last - 1))
        seen: dict[str, float] = {}
        logger = types.SimpleNamespace(
            log_iters=range(STEPS), update=lambda seen=seen, **values: seen.update(values)
        )
        board = types.SimpleNamespace(update=lambda **_: None)
        trainer.train_step(step, step, True, logger, board, images, labels, stage, STEPS / 300)

        # sums run in another order; over 30 steps of Adam differences grow by a digit
        assert ours["loss"] == pytest.approx(seen["Lm"], rel=1e-5)
        assert ours["accuracy"] == pytest.approx(seen["Accm"], rel=1e-5)
        assert ours["grad"] == pytest.approx(seen["tnm"], rel=1e-3)
        (adamw,) = task.optimizers
        for group in adamw.param_groups:
            assert group["lr"] == pytest.approx(rates[0], rel=1e-12)
            assert group["weight_decay"] == pytest.approx(rates[3] if group["decay"] else 0.0, rel=1e-12)
