"""A run that goes back to its last checkpoint keeps nothing of what came after it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from tests.tiny import tiny
from var_ext.checkpoints import CheckpointError
from var_ext.training import TokenizerRecipe, VARRecipe, train_tokenizer, train_var
from var_ext.training.loop import Moment
from var_ext.training.optim import build_optimizers, set_rates
from var_ext.training.parallel import load_optimizer_state, optimizer_state
from var_ext.training.ranks import ALONE, Ranks
from var_ext.training.tokenizer import TokenizerTask


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of this process alone, which torch's optimizer of ranks asks for."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def step(model: nn.Module, optimizers: list[Optimizer], gradient: float) -> None:
    for p in model.parameters():
        p.grad = gradient * (1 + p.detach())
    for optimizer in optimizers:
        set_rates(optimizer, 0.1)
        optimizer.step()


@pytest.mark.parametrize("before", [0, 1], ids=["without state", "with state"])
@pytest.mark.parametrize(
    ("kind", "shard"), [("adamw", "none"), ("muon", "none"), ("adamw", "optimizer"), ("muon", "optimizer")]
)
@pytest.mark.usefixtures("group")
def test_moments_are_those_of_the_checkpoint(kind: str, shard: str, before: int) -> None:
    ranks = Ranks(0, 2) if shard == "optimizer" else ALONE  # of two, so that it is shared out
    ends = []
    for diverging in (True, False):
        _, var = tiny()
        var.requires_grad_(True)
        optimizers = build_optimizers(kind, var, ranks, shard, 0.1)
        assert any(hasattr(each, "optim") for each in optimizers) == (shard == "optimizer")
        for _ in range(before):
            step(var, optimizers, 1.0)
        weights = copy.deepcopy(var.state_dict())
        state = {key: kept for each in optimizers for key, kept in optimizer_state(each, var, ALONE).items()}
        if diverging:
            state = copy.deepcopy(state)
            step(var, optimizers, math.nan)
            assert all(p.isnan().all() for p in var.parameters())
            var.load_state_dict(weights)
            for optimizer in optimizers:
                load_optimizer_state(optimizer, var, state)
        step(var, optimizers, 2.0)
        ends.append(var.state_dict())
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


@pytest.mark.parametrize("at", [0, 6], ids=["first step", "critic's first step"])
def test_a_tokenizer_and_its_critic_go_back(images: Path, tokenizer_recipe: TokenizerRecipe, at: int) -> None:
    recipe = tokenizer_recipe.with_options(
        weight_adversarial=0.4, adversarial_start=0.5, adversarial_warmup=0
    )
    tasks = [TokenizerTask(images, recipe) for _ in range(2)]
    batch = tasks[0].train_data.batch(range(12))
    for task in tasks:
        if at:  # a step of the tokenizer alone
            task.step(Moment(1, 10, 0, True), batch)
        assert task.critic is not None
        state = copy.deepcopy(task.state_dict())
        assert not state["critic"]["optimizer"]["step"]
        if task is tasks[0]:
            found = task.step(Moment(at, 10, 0, True), (batch[0] * math.nan, batch[1]))
            assert found["loss"] != found["loss"] and ("critic" in found) == bool(at)
            task.load_state_dict(state)
        task.step(Moment(max(at, 6), 10, 0, True), batch)
    ends = [{**t.vae.state_dict(), **t.critic.module.state_dict(), **t.weights()} for t in tasks if t.critic]
    assert all(tensor.isfinite().all() for tensor in ends[0].values())
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


def test_a_run_that_diverges_before_its_first_checkpoint_is_trained_to_the_end(
    images: Path, tokenizer_recipe: TokenizerRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = TokenizerTask.step

    def diverging(task: TokenizerTask, at: Moment, batch: tuple[Tensor, Tensor]) -> Mapping[str, Any]:
        broken = at.step == 1 and task.rate == 1
        return step(task, at, (batch[0] * math.nan, batch[1]) if broken else batch)

    monkeypatch.setattr(TokenizerTask, "step", diverging)
    recipe = tokenizer_recipe.with_options(on_divergence="halve", epochs=2, checkpoint_every=100)
    train_tokenizer(images, tmp_path, recipe, progress=False)
    assert '"phase": "halve", "seconds"' in (tmp_path / "log.jsonl").read_text()


FOREIGN = {
    "rows": lambda moment: torch.cat([moment, moment]),
    "a single number": lambda moment: moment.new_zeros(1),
    "dtype": lambda moment: moment.half(),
    "double": lambda moment: moment.double(),
    "sparse": lambda moment: moment.to_sparse(),
    "no tensor": lambda moment: 3,
}


@pytest.mark.parametrize("change", FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "step"])
def test_moments_of_other_parameters_are_refused(key: str, change: Callable[[Tensor], Any]) -> None:
    _, var = tiny()
    var.requires_grad_(True)
    optimizers = build_optimizers("adamw", var, ALONE, "none", 0.1)
    step(var, optimizers, 1.0)
    state = copy.deepcopy(optimizer_state(optimizers[0], var, ALONE))
    whole = torch.ones(1) if key == "step" else state[key]["head.weight"]
    state[key]["head.weight"] = change(whole)
    with pytest.raises(ValueError, match=rf"{key} of head\.weight must be torch\.float32 \(.*\), got "):
        load_optimizer_state(optimizers[0], var, state)


def test_moments_whose_rows_share_memory_get_their_own() -> None:
    _, var = tiny()
    var.requires_grad_(True)
    optimizers = build_optimizers("adamw", var, ALONE, "none", 0.1)
    step(var, optimizers, 1.0)
    state = copy.deepcopy(optimizer_state(optimizers[0], var, ALONE))
    moment = state["exp_avg"]["head.weight"]
    state["exp_avg"]["head.weight"] = moment[:1].expand_as(moment)
    load_optimizer_state(optimizers[0], var, state)
    found = optimizers[0].state[var.head.weight]["exp_avg"]
    assert found.stride() == var.head.weight.stride()
    assert torch.equal(found, moment[:1].expand_as(moment))


@pytest.mark.parametrize(
    "place", [("optimizer", "exp_avg_sq", "head.weight"), ("model",), ("scale",), ("ema",)]
)
def test_a_checkpoint_that_does_not_fit_is_one_line(
    place: tuple[str, ...], images: Path, tokenizer: Path, var_recipe: VARRecipe, tmp_path: Path
) -> None:
    train_var(images, tokenizer, tmp_path, var_recipe.with_options(epochs=1), progress=False)
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    level = content["state"]["task"]
    for key in place[:-1]:
        level = level[key]
    level[place[-1]] = torch.zeros(2)
    torch.save(content, tmp_path / "last.ckpt")
    with pytest.raises(
        CheckpointError, match=r"last\.ckpt does not fit the model of this recipe: .*"
    ) as raised:
        train_var(images, tokenizer, tmp_path, var_recipe.with_options(epochs=2), progress=False)
    assert "\n" not in str(raised.value)
