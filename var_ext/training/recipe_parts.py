"""Options that belong to a part of a training: asked for where that part is off, they are refused, not ignored.

Presets set options of parts that a user may switch off by one weight, so what counts is what was asked for: options of
a command, or fields that `Recipe.with_options` changes. A new option of a part goes into `PARTS`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from var_ext.training.recipe_losses import CriticFields

if TYPE_CHECKING:
    from var_ext.training.recipes import Recipe

ADAPTERS = ("lora_alpha", "lora_dropout", "lora_save", "lora_targets")
CRITIC = tuple(f.name for f in fields(CriticFields) if f.name != "weight_adversarial")


@dataclass(frozen=True)
class Part:
    """
    Attributes:
        off: the part is off where all of these fields have these values; "init_from" is whether there is a source.
        options: of this part.
        text: what a message says of one of them.
    """

    off: Mapping[str, Any]
    options: tuple[str, ...]
    text: str


def _loss(name: str, what: str, *more: str, example: str = "1") -> Part:
    text = f"is of the {what}, whose weight is 0: add weight_{name}, such as {example}"
    return Part({f"weight_{name}": 0}, (f"{name}_start", f"{name}_warmup", *more), text)


PARTS = (
    _loss("l1", "L1 loss"),
    _loss("l2", "L2 loss"),
    _loss("perceptual", "perceptual loss", "perceptual", "lpips"),
    _loss("semantic", "semantic loss", "semantic", "semantic_size", example="0.1"),
    _loss("vq", "quantizer loss", "beta", "weight_entropy"),
    Part(
        {"weight_adversarial": 0},
        CRITIC,
        "is of the discriminator, of which there is none: add weight_adversarial, such as 0.4",
    ),
    Part(
        {"discriminator": "patch"},
        ("discriminator_size",),
        "is of heads over a ViT: add discriminator, the file of its weights",
    ),
    Part(
        {"critic_augment": 0, "bcr": 0},
        ("critic_cutout",),
        "is of the discriminator's augmented input, of which there is none: add critic_augment or bcr",
    ),
    Part(
        {"weight_entropy": 0},
        ("entropy_temperature",),
        "is of the entropy loss, whose weight is 0: add weight_entropy, such as 0.05",
    ),
    Part(
        {"restart_every": 0},
        ("restart_until", "restart_target"),
        "is of restarts of codes, of which there are none: add restart_every, such as 100",
    ),
    Part(
        {"using_znorm": False},
        ("restart_target",),
        "is of restarts of cosine codes, got codes at Euclidean distances: add using_znorm",
    ),
    Part(
        {"scale_dropout": 0},
        ("scale_dropout_start",),
        "is of images that leave out scales, of which there are none: add scale_dropout, such as 0.1",
    ),
    Part(
        {"perturb_rows": 0},
        ("perturb_tokens", "perturb_codes", "perturb_start", "perturb_stop", "perturb_last"),
        "is of perturbed images, of which there are none: add perturb_rows, such as 0.5",
    ),
    Part(
        {"pg": 0},
        ("pg0",),
        "is of progressive training, of which there is none: add pg, a share of the steps",
    ),
    Part({"tokens": "online"}, ("copies",), "is of cached tokens, got tokens = online: add tokens = cached"),
    Part({"augment": 0}, ("copies",), "is of augmented images, of which there are none: add augment = 1"),
    Part({"lora": 0}, ADAPTERS, "is of adapters, of which there are none: add lora, their rank"),
    Part(
        {"init_from": True},
        ("init_gain", "init_adaln", "init_adaln_gamma", "init_head"),
        "is of random weights, got those of --init-from: leave out --init-from",
    ),
)
# Values that ask for nothing, wherever they stand.
NOTHING = {
    **{name: 0 for part in PARTS for name in part.off}, "lecam": 0, "critic_blur": 0, "critic_throttle": 0, "copies": 1,
    "discriminator": "patch", "semantic": "", "lpips": (),
}  # fmt: skip


def check_used(recipe: Recipe, names: Iterable[str], *, init_from: bool = False) -> None:
    """Refuse options that were asked for and belong to a part that is off.

    Args:
        names: of the options. A value that asks for nothing, such as a weight of 0, may stand anywhere.
        init_from: whether the first weights are those of a trained model.

    Raises:
        ValueError: names one, and what to add.
    """
    values = {**{f.name: getattr(recipe, f.name) for f in fields(recipe)}, "init_from": init_from}
    for name in names:
        if name in NOTHING and values[name] == NOTHING[name]:
            continue
        for part in PARTS:
            if name in part.options and all(values.get(key) == value for key, value in part.off.items()):
                raise ValueError(f"{name} {part.text}, or leave out {name}")
