"""Weights of the loss by scale, against loops."""

from __future__ import annotations

import copy
import json
import statistics
from pathlib import Path

import pytest
import torch

from tests.training.test_train_var import make
from var_ext.models.keyed import row_keys
from var_ext.schedule import SCALES_256, SCALES_512, ScaleSchedule
from var_ext.training import VARRecipe, train_var
from var_ext.training.loop import Moment, step_seed
from var_ext.training.loss_weights import token_weights


@pytest.mark.parametrize("sides", [SCALES_256, SCALES_512, (1, 2, 3, 4, 6, 8), (1, 2, 4), (2, 5)])
def test_lognormal_by_a_loop(sides: tuple[int, ...]) -> None:
    ratios = [side / sides[-1] for side in sides]
    mean, spread = statistics.mean(ratios), statistics.stdev(ratios)
    density = [statistics.NormalDist(mean, spread).pdf(ratio) for ratio in reversed(ratios)]
    wanted = []
    for share, side in zip(density, sides, strict=True):
        wanted += [share / sum(density) / side**2] * side**2  # which add up to 1, as in HMAR's code
    found = token_weights(("lognormal",), ScaleSchedule(sides))
    length = sum(side**2 for side in sides)
    torch.testing.assert_close(found, length * torch.tensor(wanted), rtol=1e-5, atol=1e-6)
    assert found.mean().item() == pytest.approx(1, rel=1e-5)


def test_the_middle_scales_count_most_in_lognormal() -> None:
    schedule = ScaleSchedule(SCALES_256)
    weights = token_weights(("lognormal",), schedule)
    shares = [(weights[where].sum() / 680).item() for where in schedule.slices]
    assert shares.index(max(shares)) == 4 and shares[-1] < 0.1  # all tokens alike give the last scale .376


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ((), [1.0, 1.0, 1.0]),
        (("1", "1", "1"), [1.0, 1.0, 1.0]),
        (("2", "2", "2"), [1.0, 1.0, 1.0]),
        (("0", "1", "3"), [0.0, 21 / 52, 63 / 52]),  # 4 tokens of weight 1 and 16 of 3
    ],
)
def test_numbers_weigh_the_tokens_of_their_scale(given: tuple[str, ...], wanted: list[float]) -> None:
    found = token_weights(given, ScaleSchedule((1, 2, 4)))
    repeated = torch.tensor(wanted).repeat_interleave(torch.tensor([1, 4, 16]))
    torch.testing.assert_close(found, repeated)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("1,2", "loss_weights must have 3 numbers, one a scale, got 2: 1,2"),
        ("1,2,3,4", "loss_weights must have 3 numbers, one a scale, got 4"),
        ("0,0,0", "numbers of at least 0, one a scale and not all 0, such as 1,1,2; got '0,0,0'"),
        ("1,-1,1", "got '1,-1,1'"),
        ("1,nan,1", "got '1,nan,1'"),
        ("1,inf,1", "got '1,inf,1'"),
        ("lognorm", "loss_weights must be 'lognormal' or numbers .*; got 'lognorm'"),
        ("lognormal,1", "got 'lognormal,1'"),
    ],
)
def test_other_weights_are_refused(given: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        token_weights(VARRecipe(loss_weights=tuple(given.split(","))).loss_weights, ScaleSchedule((1, 2, 4)))


def test_one_scale_has_no_lognormal() -> None:
    with pytest.raises(ValueError, match="lognormal needs two scales or more, got one"):
        token_weights(("lognormal",), ScaleSchedule((3,)))


@pytest.mark.parametrize("weights", ["lognormal", "3,1,0.5"])
@pytest.mark.parametrize(("pg", "scales", "newest"), [(0.0, 3, 1.0), (0.9, 2, 2 / (1001 / 300))])
def test_a_step_by_hand(
    images: Path,
    tokenizer: Path,
    var_recipe: VARRecipe,
    tmp_path: Path,
    weights: str,
    pg: float,
    scales: int,
    newest: float,
) -> None:
    """The gradient is that of a loop over scales; progressive training (step 302 is the second with two scales, see
    test_train_var) multiplies the newest scale's weight; what is logged as the loss has no weights."""
    progressive = {"pg": pg, "pg0": 0} if pg else {}
    recipe = var_recipe.with_options(loss_weights=weights, warmup=0.1, clip=1e6, micro_batch=5, **progressive)
    task = make(images, tokenizer, recipe, tmp_path)
    tokens, labels = next(iter(task.feed(0, torch.arange(12).view(1, 12))))
    twin = copy.deepcopy(task.var).train()
    found = task.step(Moment(302, 1001, 0, True), (tokens, labels))

    twin.key_rows(task.device).keys = row_keys(step_seed(recipe.seed, 302), slice(0, 12))
    parts = [tokens[:, where] for where in task.schedule.slices[:scales]]
    logits = twin(labels, task.vae.quantize.idxBl_to_var_input(parts))
    objective, plain = torch.zeros(()), []
    for k, where in enumerate(task.schedule.slices[:scales]):
        weight = token_weights(recipe.loss_weights, task.schedule)[where.start] * (
            newest if k == scales - 1 else 1
        )
        losses = torch.nn.functional.cross_entropy(
            logits[:, where].flatten(0, 1), parts[k].flatten(), reduction="none"
        )
        objective = objective + weight * losses.sum() / 12 / 21
        plain.append(losses)
    objective.backward()
    assert found["objective"] == pytest.approx(objective.item(), rel=1e-5)
    assert found["loss"] == pytest.approx(torch.cat(plain).mean().item(), rel=1e-5)
    assert found["loss_scales"] == pytest.approx([losses.mean().item() for losses in plain], rel=1e-5)
    for (name, ours), theirs in zip(task.var.named_parameters(), twin.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(
                ours.grad, theirs.grad, rtol=1e-3, atol=1e-6, msg=name
            )  # micro-batches: other sums


def test_no_weights_no_objective(
    images: Path, tokenizer: Path, var_recipe: VARRecipe, tmp_path: Path
) -> None:
    logs = []
    for weights in ("", "1,1,1"):
        recipe = var_recipe.with_options(epochs=1, loss_weights=weights)
        out = train_var(images, tokenizer, tmp_path / f"out{weights}", recipe, progress=False)
        logs.append([json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()])
    for plain, alike in zip(*logs, strict=True):
        assert plain["loss"] == alike["loss"]
        assert "objective" not in plain and ("objective" in alike) == (alike["phase"] == "train")
        assert alike.get("objective", alike["loss"]) == pytest.approx(
            alike["loss"], rel=1e-5
        )  # six digits are kept
