"""Muon for the matrices of attention and MLP, AdamW for the rest."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import tiny
from tests.training.ranked import ranked, train
from tests.training.test_train_var import make
from var_ext.checkpoints import load_tensors, load_tokenizer
from var_ext.training import VARRecipe, train_var
from var_ext.training.loop import Moment
from var_ext.training.optim import build_optimizers, of_muon
from var_ext.training.plan import plan
from var_ext.training.ranks import ALONE
from var_ext.training.var import VARTask


@pytest.fixture(scope="session")
def recipe(var_recipe: VARRecipe) -> VARRecipe:
    return var_recipe.with_options(optimizer="muon", epochs=3)


@pytest.mark.parametrize("shared_aln", [False, True])
def test_what_muon_takes(shared_aln: bool) -> None:
    _, var = tiny(shared_aln=shared_aln)
    names = {p: name for name, p in var.named_parameters()}
    matrices = ("attn.mat_qkv", "attn.proj", "ffn.fc1", "ffn.fc2")
    wanted = {f"blocks.{i}.{part}.weight" for i in range(2) for part in matrices}
    assert {names[p] for p in of_muon(var)} == wanted
    muon, adamw = build_optimizers("muon", var, ALONE, "none", 0.1)
    assert isinstance(muon, torch.optim.Muon) and isinstance(adamw, torch.optim.AdamW)
    taken = [{names[p] for group in kind.param_groups for p in group["params"]} for kind in (muon, adamw)]
    assert taken[0] == wanted and taken[1] == set(names.values()) - wanted
    assert [group["decay"] for group in muon.param_groups] == [True]
    assert [group["decay"] for group in adamw.param_groups] == [True, False]


def test_a_step_by_hand(images: Path, tokenizer: Path, recipe: VARRecipe, tmp_path: Path) -> None:
    """Two steps: matrices go as torch's Muon alone makes them, about as far as Adam's would (0.2 lr by root mean
    square, where all of a gradient's directions are used); the rest goes as Adam's."""
    task = make(images, tokenizer, recipe.with_options(weight_decay=0.3, weight_decay_end=0.3), tmp_path)
    (batch,) = task.feed(0, torch.arange(12).view(1, 12))
    parameters = dict(task.var.named_parameters())
    twins = {n: p.detach().clone() for n, p in parameters.items() if p in set(of_muon(task.var))}
    muon = torch.optim.Muon([*twins.values()], momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for step in (50, 51):
        before = copy.deepcopy(task.var.state_dict())
        found = task.step(Moment(step, 100, 0, True), batch)
        lr = found["lr"]
        muon.param_groups[0].update(lr=lr, weight_decay=0.3)
        for name, twin in twins.items():
            twin.grad = parameters[name].grad
        muon.step()
        for name, twin in twins.items():
            torch.testing.assert_close(parameters[name].detach(), twin, rtol=1e-6, atol=1e-8)
            moved = (twin - before[name] * (1 - lr * 0.3)).square().mean().sqrt()
            assert 0.05 < moved / lr < 0.3, name
        if step == 50:
            head, shrink = parameters["head.weight"], 1 - lr * 0.3
            assert head.grad is not None
            adam = before["head.weight"] * shrink - lr * head.grad / (head.grad.abs() + 1e-8)
            torch.testing.assert_close(head.detach(), adam, rtol=1e-4, atol=1e-6)


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    "options", [{}, {"autocast": "bf16", "micro_batch": 5}, {"autocast": "fp16"}], ids=str
)
def test_a_resumed_run_ends_with_the_same_bits(
    images: Path,
    tokenizer: Path,
    recipe: VARRecipe,
    tmp_path: Path,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = recipe.with_options(**options)
    whole = train_var(images, tokenizer, tmp_path / "whole", recipe, progress=False)
    step = VARTask.step

    def killed(self: VARTask, at: Moment, batch: Any) -> Any:
        if at.step == 5:
            raise Killed
        return step(self, at, batch)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(VARTask, "step", killed)
        train_var(images, tokenizer, tmp_path / "cut", recipe, progress=False)
    state = torch.load(tmp_path / "cut" / "last.ckpt", weights_only=True)["state"]["task"]["optimizer"]
    assert state.keys() == {"momentum_buffer", "step", "exp_avg", "exp_avg_sq"}
    assert len(state["momentum_buffer"]) == 8 and not state["momentum_buffer"].keys() & state["step"].keys()
    cut = train_var(images, tokenizer, tmp_path / "cut", recipe, progress=False)
    found, wanted = (load_tensors(folder / "var.safetensors") for folder in (cut, whole))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.slow
def test_ranks_train_the_same(images: Path, tokenizer: Path, recipe: VARRecipe, tmp_path: Path) -> None:
    """Newton-Schulz in bfloat16 turns rounding of a gradient into thousandths of an update: a matrix after 9 steps is
    as near as that, and the same again bit for bit."""
    recipe = recipe.with_options(base_lr=0.01)
    train(("var", (images, tokenizer, tmp_path / "alone"), recipe))
    kinds = {"none": {}, "optimizer": {"shard": "optimizer", "micro_batch": 4}, "again": {}}
    cases: list[Any] = [
        ("var", (images, tokenizer, tmp_path / name), recipe.with_options(**options))
        for name, options in kinds.items()
    ]
    ranked(2, cases, tmp_path)
    found = {name: load_tensors(tmp_path / name / "var.safetensors") for name in ("alone", *kinds)}
    for kind in kinds:
        for name, _ in tiny()[1].named_parameters():
            wanted = found["alone"][name]
            far = (found[kind][name] - wanted).abs().max().item()
            assert far < 2e-4, (kind, name, far)
    assert all(torch.equal(found["again"][name], tensor) for name, tensor in found["none"].items())
    # the checkpoint of two ranks that share out goes on with one: nothing is left to train
    train_var(images, tokenizer, tmp_path / "optimizer", recipe.with_options(micro_batch=4), progress=False)
    after = load_tensors(tmp_path / "optimizer" / "var.safetensors")
    assert all(torch.equal(after[name], tensor) for name, tensor in found["optimizer"].items())


def test_a_plan_knows_that_muon_keeps_half(tokenizer: Path, var_recipe: VARRecipe) -> None:
    vae, recipe = load_tokenizer(tokenizer), var_recipe.with_options(optimizer="muon")
    adamw, muon = plan(var_recipe, vae, 2), plan(recipe, vae, 2)
    matrices = 2 * (32 * 96 + 32 * 32 + 2 * 32 * 128)
    assert adamw.optimizer - muon.optimizer == 4 * matrices
    assert plan(recipe.with_options(shard="optimizer"), vae, 2, 2).optimizer == muon.optimizer // 2


def test_nothing_left_for_muon(images: Path, tokenizer: Path, recipe: VARRecipe, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="muon trains matrices of attention and MLP, got none: freeze fewer"):
        make(images, tokenizer, recipe.with_options(freeze="blocks.*"), tmp_path)
    task = make(
        images, tokenizer, recipe.with_options(freeze="*emb*,pos*,head*,*ada*,*bias,*scale*"), tmp_path
    )
    assert [type(optimizer) for optimizer in task.optimizers] == [torch.optim.Muon]


def test_whole_matrices_are_needed(recipe: VARRecipe) -> None:
    with pytest.raises(
        ValueError, match=r"optimizer = muon needs whole matrices, .*: take shard = optimizer"
    ):
        recipe.with_options(shard="full")
