"""What a ladder's runs leave: rows of their validations, losses of each held-out image, and tables of all runs."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import var_ext
from var_ext.checkpoints import atomic_write, write_json
from var_ext.training import VARRecipe
from var_ext.training.log import read_log
from var_ext.training.precision import autocast
from var_ext.training.stored_tokens import StoredTokens, TokenData
from var_ext.training.tally import token_losses

ROWS, LOSSES = "rows.json", "losses.npy"
NAMES = ("loss_avg", "loss_last", "err_avg", "err_last")  # columns of LOSSES


def is_done(run: Path) -> bool:
    """Whether a run was measured."""
    return (run / ROWS).exists()


def keep_run(run: Path, data: Path, recipe: VARRecipe, about: dict[str, Any]) -> None:
    """Measures a finished training, and keeps what it found in its folder.

    Args:
        run: folder of the training.
        data: folder of its tokens.
        about: of the whole training: images, tokens, flops, and what else there is to say.
    """
    with atomic_write(run / LOSSES) as handle:
        np.save(handle, image_losses(run, data, recipe))
    write_json(run / ROWS, {"rows": rows_of(run / "log.jsonl", about, recipe.batch_size)})


@torch.no_grad()
def image_losses(run: Path, data: Path, recipe: VARRecipe) -> np.ndarray:
    """Loss (nats) and error (%) of each held-out image, over all tokens and at the last scale: (N, 4), see `NAMES`."""
    sampler = var_ext.load(run)
    vae, var = sampler.vae, sampler.var.eval()
    tokens, last = StoredTokens(vae, TokenData(f"tokens:{data}", "val", vae)), vae.schedule.slices[-1]
    found = []
    for rows, labels in tokens.feed(0, torch.arange(len(tokens)).split(recipe.batch_size)):
        known = vae.quantize.idxBl_to_var_input([rows[:, where] for where in vae.schedule.slices])
        with autocast(torch.device("cpu"), recipe.autocast):
            logits = var(labels, known).float()  # (b, L, V)
        losses, wrong = token_losses(logits, rows, 0.0), 100 * (logits.argmax(-1) != rows).float()
        parts = (losses, losses[:, last], wrong, wrong[:, last])
        found.append(torch.stack([part.mean(1) for part in parts], 1))
    return torch.cat(found).numpy()


def rows_of(log: Path, about: dict[str, Any], batch: int) -> list[dict[str, Any]]:
    """A row for each validation of a training, in the names of `var_ext.scaling`."""
    rows = []
    for line in read_log(log):
        if line["phase"] != "val":
            continue
        share = line["step"] * batch / about["images"]
        grown = {key: round(about[key] * share) for key in ("images", "tokens", "flops", "flops_6nt")}
        measured = {
            "step": line["step"], "seconds": line["seconds"], "loss_avg": line["loss"], "loss_last": line["loss_last"],
            "err_avg": 100 - line["accuracy"], "err_last": 100 - line["accuracy_last"],
            **{f"loss_s{k + 1}": value for k, value in enumerate(line["loss_scales"])},
            **{f"err_s{k + 1}": 100 - value for k, value in enumerate(line["accuracy_scales"])},
        }  # fmt: skip
        rows.append({**about, **grown, **measured})
    return rows


def write_tables(work: Path, runs: Mapping[str, bool]) -> int:
    """scaling.csv, a row a finished run; curves.csv, a row a validation; probes.csv, a row a probe.

    All runs are judged on the same images, so what these have in common is no noise between sizes: a standard error is
    that of a run's difference from the mean of all, image by image.

    Args:
        runs: folders in `work`, and whether each is a probe.

    Returns:
        how many are finished.
    """
    done = {name: probe for name, probe in runs.items() if is_done(work / name)}
    rows = {name: json.loads((work / name / ROWS).read_text())["rows"] for name in done}
    whole = {name: np.load(work / name / LOSSES) for name, probe in done.items() if not probe}
    mean = np.mean(list(whole.values()), 0) if whole else 0
    final = []
    for name, losses in whole.items():
        errors = (losses - mean).std(0, ddof=1) / len(losses) ** 0.5
        final.append(
            {**rows[name][-1], **{f"{key}_se": float(e) for key, e in zip(NAMES, errors, strict=True)}}
        )
    _write(work / "scaling.csv", final)
    _write(work / "curves.csv", [row for name in whole for row in rows[name]])
    _write(work / "probes.csv", [rows[name][-1] for name, probe in done.items() if probe])
    return len(done)


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    with atomic_write(path) as handle:
        text = io.TextIOWrapper(handle, newline="", write_through=True)
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        text.detach()
