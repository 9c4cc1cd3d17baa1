"""Usage and perplexity of each scale, and the alarm of those that use too few codes."""

from __future__ import annotations

import json
import logging
import math
import re
from pathlib import Path

import pytest
import torch

from var_ext.checkpoints import load_tokenizer
from var_ext.schedule import ScaleSchedule
from var_ext.training import TokenizerRecipe
from var_ext.training.tokenizer import TokenizerTask
from var_ext.training.usage import REPEAT, Alarm, advice, allowed, figures, perplexity

SCHEDULE = ScaleSchedule((1, 2, 4))


def test_perplexity_is_the_number_of_codes_where_they_are_alike() -> None:
    hits = torch.tensor([[3.0, 3, 3, 0], [7, 0, 0, 0], [4, 2, 2, 0], [0, 0, 0, 0]])
    wanted = [3, 1, math.exp(0.5 * math.log(2) + 0.5 * math.log(4)), 1]
    assert perplexity(hits).tolist() == pytest.approx(wanted)
    assert figures(hits)["usage"] == [75, 25, 75, 0]


def test_what_tokens_allow_is_what_uniform_draws_give() -> None:
    assert allowed(1, 50) == pytest.approx(1) and allowed(10**6, 50) == pytest.approx(50)
    generator = torch.Generator().manual_seed(0)
    drawn = [len(torch.randint(50, (40,), generator=generator).unique()) for _ in range(2000)]
    assert allowed(40, 50) == pytest.approx(sum(drawn) / 2000, abs=0.2)  # four standard errors


def test_the_alarm_names_scale_and_remedy_once_and_again_later(
    tokenizer_recipe: TokenizerRecipe, caplog: pytest.LogCaptureFixture
) -> None:
    alarm, hits = Alarm(SCHEDULE, advice(tokenizer_recipe)), torch.zeros(3, 16)
    hits[0, 0] = 40  # one of about 14.8
    hits[1, :7] = 160 / 7  # 7 of 16
    hits[2, :8] = 80  # half of them: enough
    assert alarm.check(hits) == [0, 1]
    message = caplog.messages[0]
    assert message.startswith(
        "scale 0 (1 x 1) uses 1 codes, and its 40 validation tokens allow about 15 (7%)"
    )
    assert "compare directions with --using-znorm, in a new run" in message
    assert "scale 1 (2 x 2) uses 7 codes" in caplog.messages[1]
    assert [alarm.check(hits) for _ in range(REPEAT - 1)] == [[]] * (REPEAT - 1)
    later = Alarm(SCHEDULE, advice(tokenizer_recipe))
    later.load_state_dict(json.loads(json.dumps(alarm.state_dict())))
    hits[1] = 1
    assert later.check(hits) == alarm.check(hits) == [0]
    hits[2] = hits[2].clone()
    hits[2, 1:] = 0  # another scale is told at once
    assert alarm.check(hits) == [2]
    count = len(caplog.messages)
    assert (
        Alarm(SCHEDULE, advice(tokenizer_recipe)).check(hits, aloud=False) and len(caplog.messages) == count
    )


def test_advice_goes_through_the_remedies(tokenizer_recipe: TokenizerRecipe) -> None:
    recipe, seen = tokenizer_recipe.with_options(codebook_init=0, restart_every=0), []
    for done in (
        {"codebook_init": 512}, {"using_znorm": True}, {"centre": 0.1}, {"restart_every": 100},
        {"restart_target": 0.5}, {"anchors": True}, {"scale_dropout": 0.1}, {"weight_entropy": 0.05}, {},
    ):  # fmt: skip
        seen.append(advice(recipe))
        for name in done:
            assert f"--{name.replace('_', '-')}" in seen[-1]
        recipe = recipe.with_options(**done)
    assert len(set(seen)) == 9 and "larger --batch-size" in seen[-1]


@pytest.mark.parametrize("freeze", ["encoder,quantizer", "quantize.embedding.*", "encoder", "decoder.mid.*"])
def test_advice_in_fine_tuning_can_be_followed(tokenizer: Path, images: Path, freeze: str) -> None:
    """Each remedy is taken, until none is left; none is refused."""
    source, seen = load_tokenizer(tokenizer), list[str]()
    recipe = TokenizerRecipe.finetune(source.config).with_options(freeze=freeze)
    while True:
        remedy = TokenizerTask(images, recipe, source=source).keeper.alarm.remedy
        assert remedy not in seen
        seen.append(remedy)
        asked = re.findall(r"--([a-z-]+)(?: ([\w.]+))?", remedy.partition(", in a new run")[0])
        options = {name.replace("-", "_"): value or True for name, value in asked}
        if "batch_size" in options:
            break
        if "freeze" in options and freeze.startswith("quant"):
            assert remedy.startswith("codes are frozen")
            return
        recipe = recipe.with_options(**options)
    first = {"encoder,quantizer": "frozen", "encoder": "restart", "decoder.mid.*": "centre"}[freeze]
    # centre is of the encoder; targets of restarts are of cosine codes
    assert first in seen[0] and len(seen) == 6 + (freeze != "encoder")


def test_a_collapsed_tokenizer_is_told_in_its_validation(
    images: Path, tokenizer_recipe: TokenizerRecipe, caplog: pytest.LogCaptureFixture
) -> None:
    task = TokenizerTask(images, tokenizer_recipe.with_options(ema=0, weight_perceptual=0))
    with torch.no_grad():
        task.vae.quantize.embedding.weight[1:] = 100
    with caplog.at_level(logging.WARNING):
        found = task.validate()
    assert found["usage"] == [100 / 16] * 3 and found["perplexity"] == pytest.approx([1, 1, 1])
    assert [message[:7] for message in caplog.messages] == ["scale 0", "scale 1", "scale 2"]
    state = task.state_dict()
    again = TokenizerTask(images, tokenizer_recipe.with_options(ema=0, weight_perceptual=0))
    again.load_state_dict(state)
    assert again.keeper.alarm.sounded == {0: 1, 1: 1, 2: 1}
