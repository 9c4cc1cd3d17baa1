"""Precisions and memory: the scale of fp16, bf16 of the tokenizer, blocks computed again, and what a plan promises."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from tests.training.test_train_var import make
from var_ext._torch import fake_tensors
from var_ext.checkpoints import load_tokenizer
from var_ext.models import VQVAE
from var_ext.training import TokenizerRecipe, VARRecipe
from var_ext.training.loop import Moment
from var_ext.training.optim import of_muon
from var_ext.training.plan import GB, PeakMemory, fitting, one_pass, plan, without_memory
from var_ext.training.precision import LossScale, tf32
from var_ext.training.tokenizer import TokenizerTask


def test_the_loss_scale_follows_torchs_and_the_published_cap() -> None:
    ours, weight = LossScale(enabled=True), torch.nn.Parameter(torch.zeros(1))
    ours.GROW_AFTER = 3  # type: ignore[misc]
    theirs = torch.amp.GradScaler("cpu", init_scale=LossScale.START, growth_interval=3)
    sgd = torch.optim.SGD([weight], lr=0.0)
    for finite in [1] * 20 + [0, 1, 1, 0, 0] + [1] * 7:
        weight.grad = torch.full((1,), 1.0 if finite else torch.inf)
        theirs.scale(torch.zeros(1))
        theirs.step(sgd)
        theirs.update()
        if theirs.get_scale() > LossScale.MOST:
            theirs.update(LossScale.MOST)
        assert ours.accepts(weight.grad.norm()) == bool(finite)
        assert ours.scale == theirs.get_scale()
    assert ours.scale == 2.0**14


def test_fp16_skips_a_step_with_infinite_gradients(
    images: Path, tokenizer: Path, var_recipe: VARRecipe, tmp_path: Path
) -> None:
    task = make(images, tokenizer, var_recipe.with_options(autocast="fp16"), tmp_path)
    batch = next(iter(task.feed(0, torch.arange(12).view(1, 12))))
    metrics = task.step(Moment(0, 10, 0, True), batch)
    assert metrics["scale"] == 2.0**11 and metrics["grad"] > 0
    before = copy.deepcopy(task.var.state_dict())
    task.scale.scale = 1e30
    metrics = task.step(Moment(1, 10, 0, True), batch)
    assert metrics["scale"] == 5e29 and "grad" not in metrics and metrics["loss"] > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.var.state_dict().items())


def test_the_tokenizer_trains_in_bf16_with_its_quantizer_in_fp32(
    images: Path, tokenizer_recipe: TokenizerRecipe
) -> None:
    seen, losses = [], []
    for autocast in ("fp32", "bf16"):
        recipe = tokenizer_recipe.with_options(
            autocast=autocast, weight_adversarial=0.4, adversarial_start=0.0
        )
        task = TokenizerTask(images, recipe)
        task.vae.quantize.register_forward_hook(
            lambda _, given, found: seen.append((given[0].dtype, found[0].dtype))
        )
        batch = task.train_data.batch(range(12))
        losses.append(task.step(Moment(10, 100, 0, True), batch)["loss"])
        assert all(p.dtype == torch.float32 for p in task.vae.parameters())
    assert seen == [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)]
    assert (
        losses[1] == pytest.approx(losses[0], rel=0.05) and losses[0] != losses[1]
    )  # 8 bits in some forty layers


@pytest.mark.parametrize("autocast", ["fp32", "bf16"])
def test_blocks_computed_again_give_the_same_gradients(
    images: Path, tokenizer: Path, var_recipe: VARRecipe, tmp_path: Path, autocast: str
) -> None:
    found = []
    for again in (False, True):
        recipe = var_recipe.with_options(
            autocast=autocast, activation_checkpointing=again, drop_path_rate=0.5
        )
        task = make(images, tokenizer, recipe, tmp_path)
        task.step(Moment(0, 10, 0, False), next(iter(task.feed(0, torch.arange(12).view(1, 12)))))
        found.append({name: p.grad for name, p in task.var.named_parameters()})
    for name, grad in found[0].items():
        again_grad = found[1][name]
        assert grad is not None and again_grad is not None and torch.equal(grad, again_grad), name


def test_blocks_computed_again_keep_a_quarter_at_most() -> None:
    """Of 478 MB that an image of d16 at 256 px keeps for its gradient in bf16 without."""
    sizes = []
    for again in (False, True):
        recipe = VARRecipe.paper(16).with_options(activation_checkpointing=again)
        mode = fake_tensors()
        var = without_memory(recipe, VQVAE(ch=32), 1000, torch.float32, mode)
        for images in (1, 2):
            with mode, PeakMemory() as memory:
                loss = one_pass(var, images, recipe.autocast)
            sizes.append(memory.now)
            del loss
    plain, again = sizes[1] - sizes[0], sizes[3] - sizes[2]  # without what is kept once, such as cast weights
    assert 400e6 < plain < 560e6 and again <= 478e6 / 4


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"micro_batch": 4},
        {"activation_checkpointing": True, "autocast": "bf16"},
        {"freeze": ("blocks.{0-0}.*", "head.*")},
        {"optimizer": "muon"},
    ],
)
def test_a_plan_promises_what_a_step_takes(
    images: Path, tokenizer: Path, var_recipe: VARRecipe, tmp_path: Path, options: dict[str, object]
) -> None:
    recipe = var_recipe.with_options(embed_dim=128, drop_rate=0.0, **options)
    promised = plan(recipe, load_tokenizer(tokenizer), 2)
    with PeakMemory() as peak:
        task = make(images, tokenizer, recipe, tmp_path)
        for step in range(2):  # the state of the optimizer comes with the first
            peak.peak = 0
            (batch,) = task.feed(0, torch.arange(12).view(1, 12))
            task.step(Moment(step, 10, 0, False), batch)
    assert promised.parameters == sum(p.numel() for p in task.var.parameters())
    states = sum(p.numel() for p in task.var.parameters() if p.requires_grad)
    matrices = sum(p.numel() for p in of_muon(task.var)) if recipe.optimizer == "muon" else 0
    assert promised.optimizer == 12 * states - 4 * matrices
    assert promised.total == pytest.approx(peak.peak, rel=0.1)


def test_a_plan_that_does_not_fit_names_one_that_does(tokenizer: Path, var_recipe: VARRecipe) -> None:
    vae = load_tokenizer(tokenizer)
    whole = plan(var_recipe, vae, 2)
    assert fitting(var_recipe, vae, 2, 1, 1.01 * whole.total / GB) == whole
    memory = 0.8 * whole.total / GB
    with pytest.raises(ValueError, match=r"a rank needs .* GB, got .* GB; --micro-batch (\d+)") as caught:
        fitting(var_recipe, vae, 2, 1, memory)
    micro = int(str(caught.value).split("--micro-batch ")[1].split()[0])
    assert plan(var_recipe.with_options(micro_batch=micro), vae, 2).total <= memory * GB
    with pytest.raises(ValueError, match="everything shared out does not fit: take more ranks"):
        fitting(var_recipe, vae, 2, 2, 1e-6)


def test_sharing_out_saves_memory(tokenizer: Path, var_recipe: VARRecipe) -> None:
    vae = load_tokenizer(tokenizer)
    recipe = var_recipe.with_options(depth=12)  # two blocks gathered are little then
    plans = [plan(recipe.with_options(shard=shard), vae, 2, 4) for shard in ("none", "optimizer", "full")]
    assert plans[1].optimizer == plans[2].optimizer == pytest.approx(plans[0].optimizer / 4, abs=3)
    assert plans[2].gradients < plans[0].gradients == plans[1].gradients


def test_tf32_is_put_back() -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    with tf32(True):
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.allow_tf32
    with tf32(False):
        assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32
    assert before == (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)
