"""FLOPs of training, counted from the architecture."""

from __future__ import annotations

from itertools import accumulate

from var_ext.schedule import ScaleSchedule
from var_ext.training.recipes import VARRecipe


def flops_of(recipe: VARRecipe, schedule: ScaleSchedule, codes: int, channels: int) -> int:
    """FLOPs of an image in a training step, two for each multiply-add of a product: three times the forward pass, and
    once more the blocks' if they are computed again. Beside adapters, whose own are left out, twice: weights that stay
    have no gradients."""
    c, depth, lengths = recipe.embed_dim, recipe.depth, schedule.lengths
    tokens, seen = schedule.num_tokens, list(accumulate(schedule.lengths))
    blocks = 2 * round((4 + 2 * recipe.mlp_ratio) * c * c) * tokens * depth
    blocks += 4 * c * depth * sum(n * m for n, m in zip(lengths, seen, strict=True))
    # AdaLN, for an image and not for a token
    once = 2 * ((6 if recipe.shared_aln else 6 * depth) + 2) * c * c
    ends = 2 * tokens * c * codes + 2 * (tokens - lengths[0]) * c * channels
    return (2 if recipe.lora else 3) * (blocks + once + ends) + recipe.activation_checkpointing * blocks
