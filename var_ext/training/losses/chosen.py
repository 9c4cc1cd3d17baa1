"""The losses that a recipe asks for."""

from __future__ import annotations

import torch

from var_ext.training.losses.l1 import l1_loss
from var_ext.training.losses.l2 import l2_loss
from var_ext.training.losses.lpips_files import load_lpips
from var_ext.training.losses.perceptual import FrozenLoss
from var_ext.training.losses.semantic import semantic_loss
from var_ext.training.losses.structural import StructuralLoss
from var_ext.training.losses.term import ImageLosses, Loss, Term
from var_ext.training.recipe_losses import LossFields


def term(recipe: LossFields, name: str) -> Term:
    """Weight, start and warm-up of a loss in a recipe."""
    weight, start, warmup = (
        getattr(recipe, field) for field in (f"weight_{name}", f"{name}_start", f"{name}_warmup")
    )
    return Term(name, weight, start, warmup)


def perceptual_loss(recipe: LossFields, image_size: int) -> FrozenLoss | None:
    """The perceptual loss of a recipe, None where its weight is 0.

    Raises:
        ValueError: none is chosen, weights are given to one that has none, or images are too small for it.
        CheckpointError: a file of LPIPS cannot be used.
    """
    if recipe.weight_perceptual == 0:
        return None
    if recipe.perceptual == "structural":
        if recipe.lpips:
            raise ValueError(
                f"perceptual = structural takes no weights, got lpips = {','.join(recipe.lpips)}"
            )
        return StructuralLoss()
    if not recipe.lpips:
        raise ValueError(
            f"weight_perceptual = {recipe.weight_perceptual:g} needs a loss, got none: --lpips FILE (or stlpips, of "
            "pip install 'var_ext[stlpips]'), or without weights --perceptual structural, or --weight-perceptual 0"
        )
    loss = load_lpips(recipe.lpips)
    loss.check_size(image_size, image_size, ": use --perceptual structural")
    return loss


def name_of(loss: Loss | None) -> str | None:
    """What recipe.json calls a loss: its own name, or that of a user's function or class."""
    if loss is None:
        return None
    if isinstance(loss, FrozenLoss):
        return loss.name
    return f"{loss.__module__}.{getattr(loss, '__qualname__', type(loss).__qualname__)}"


def image_losses(recipe: LossFields, image_size: int, hook: Loss | None, device: torch.device) -> ImageLosses:
    """The losses between reconstructions and images of a recipe.

    Args:
        image_size: side of the images.
        hook: a perceptual loss of the caller's, instead of the recipe's.

    Raises:
        ValueError, CheckpointError: as `perceptual_loss` and `semantic_loss`; or the hook has no weight, or stands
            beside files of LPIPS.
    """
    if hook is not None and recipe.weight_perceptual == 0:
        raise ValueError(
            "a perceptual loss has no effect with weight_perceptual = 0: give it a weight, such as 1"
        )
    if hook is not None and recipe.lpips:
        raise ValueError(
            f"wanted one perceptual loss, got a function and lpips = {','.join(recipe.lpips)}: leave out one of them"
        )
    perceptual = perceptual_loss(recipe, image_size) if hook is None else hook
    losses = {"l1": l1_loss, "l2": l2_loss, "perceptual": perceptual, "semantic": semantic_loss(recipe)}
    return ImageLosses(
        [
            (term(recipe, name), loss.to(device) if isinstance(loss, torch.nn.Module) else loss)
            for name, loss in losses.items()
            if loss is not None
        ]
    )


def digests_of(losses: ImageLosses) -> dict[str, str]:
    """Digests of the weights that losses read from files, by names a reader understands."""
    found = {
        f"weights of the {each.name} loss": loss.digest()
        for each, loss in losses.parts
        if isinstance(loss, FrozenLoss)
    }
    return {name: digest for name, digest in found.items() if digest is not None}
