"""Are the codes used, scale by scale? Figures for log and reports, and an alarm that names the scale and a remedy."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from var_ext.schedule import ScaleSchedule
from var_ext.training.recipes import TokenizerRecipe

log = logging.getLogger(__name__)

ENOUGH = 0.5  # share of the codes that the tokens of a scale allow, below which the alarm sounds
REPEAT = 10  # validations until the alarm of a scale sounds again


def perplexity(hits: Tensor) -> Tensor:
    """exp of the entropy of the codes of each scale: hits (K, V) -> (K,) float64, 1 for a single code, V at most."""
    hits = hits.double()
    share = hits / hits.sum(1, keepdim=True).clamp(min=1)
    return torch.special.entr(share).sum(1).exp()


def allowed(tokens: int, vocab_size: int) -> float:
    """Different codes that so many tokens have on average where all codes are equally likely: V (1 - (1 - 1/V)^n)."""
    return vocab_size * (1 - (1 - 1 / vocab_size) ** tokens)


def figures(hits: Tensor) -> dict[str, list[float]]:
    """For each scale the share (%) of the codes that its tokens have, and their perplexity: from hits (K, V)."""
    return {
        "usage": (100 * (hits > 0).double().mean(1)).tolist(),
        "perplexity": perplexity(hits).tolist(),
    }


class Alarm:
    """Warns of scales that use too few codes: at once, then at most every `REPEAT` validations.

    Args:
        remedy: what it says helps, see `advice`.
    """

    def __init__(self, schedule: ScaleSchedule, remedy: str) -> None:
        self.schedule, self.remedy = schedule, remedy
        self.validations = 0
        self.sounded: dict[int, int] = {}  # scale -> validation

    def check(self, hits: Tensor, *, aloud: bool = True) -> list[int]:
        """Scales to warn of now, from the hits (K, V) of a validation.

        Args:
            aloud: whether to; False on the ranks that leave it to another.
        """
        self.validations += 1
        hits = hits.double()
        found = []
        for k, (used, count) in enumerate(zip((hits > 0).sum(1).tolist(), hits.sum(1).tolist(), strict=True)):
            most = allowed(int(count), hits.shape[1])
            if used >= ENOUGH * most or self.validations < self.sounded.get(k, -REPEAT) + REPEAT:
                continue
            self.sounded[k] = self.validations
            found.append(k)
            if not aloud:
                continue
            side = self.schedule.patch_nums[k]
            log.warning(
                "scale %d (%d x %d) uses %d codes, and its %d validation tokens allow about %.0f (%.0f%%): %s",
                k, side, side, used, count, most, 100 * used / most, self.remedy,
            )  # fmt: skip
        return found

    def state_dict(self) -> dict[str, Any]:
        """For `load_state_dict`: what has been told is not told again where a run goes on."""
        return {"validations": self.validations, "sounded": dict(self.sounded)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.validations = int(state["validations"])
        self.sounded = {int(k): int(when) for k, when in state["sounded"].items()}


def advice(
    recipe: TokenizerRecipe, *, tuned: bool = False, frozen: bool = False, features: bool = True
) -> str:
    """The next remedy against collapse that a recipe does without.

    Args:
        tuned: the first weights are those of a trained tokenizer, whose sizes and search stay.
        frozen: codes are not trained.
        features: whether the layer that makes them, quant_conv, is.
    """
    if frozen:
        return (
            "codes are frozen: a new run trains them without quantizer in --freeze, such as --freeze encoder"
        )
    remedies: Sequence[tuple[bool, str]] = (
        (recipe.codebook_init == 0 and not tuned, "start from data with --codebook-init 512"),
        (not recipe.using_znorm and not tuned, "compare directions with --using-znorm"),
        (recipe.centre == 0 and features, "keep features around zero with --centre 0.1"),
        (recipe.restart_every == 0, "move unused codes with --restart-every 100"),
        (
            recipe.restart_target == 0 and recipe.using_znorm,
            "want more codes at every scale with --restart-target 0.5",
        ),
        (not recipe.anchors, "move rarely used codes at each step with --anchors"),
        (recipe.scale_dropout == 0, "make coarse scales matter with --scale-dropout 0.1"),
        (recipe.weight_entropy == 0, "spread codes with --weight-entropy 0.05"),
        (tuned and recipe.codebook_init == 0, "take codes anew from the data with --codebook-init 512"),
    )
    for missing, text in remedies:
        if missing:
            return f"{text}, in a new run"
    smaller = "" if tuned else " or a smaller --vocab-size"
    return f"take a larger --batch-size{smaller} in a new run"
