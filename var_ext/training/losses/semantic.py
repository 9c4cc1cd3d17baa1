"""Semantic loss: reconstructions keep what a frozen ViT sees in the images (arXiv 2412.01762 aligns features so)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from var_ext.training.frozen_vit import FrozenViT, load_vit
from var_ext.training.losses.perceptual import FrozenLoss
from var_ext.training.recipe_losses import LossFields


class SemanticLoss(FrozenLoss):
    """1 - cosine between the last tokens of a frozen ViT, mean over tokens, the class token among them: (B,)."""

    def __init__(self, vit: FrozenViT) -> None:
        super().__init__()
        self.vit, self.name = vit, vit.name
        self.freeze()

    def compare(self, output: Tensor, images: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self.vit(self.vit.fitted(images))[-1]
        found = self.vit(self.vit.fitted(output))[-1]
        return 1 - F.cosine_similarity(found, wanted, dim=2).mean(1)


def semantic_loss(recipe: LossFields) -> SemanticLoss | None:
    """The semantic loss of a recipe, None where its weight is 0.

    Raises:
        ValueError: no file is given.
        CheckpointError: the file cannot be used.
    """
    if recipe.weight_semantic == 0:
        return None
    if not recipe.semantic:
        raise ValueError(
            f"weight_semantic = {recipe.weight_semantic:g} needs a frozen ViT, got none: --semantic FILE (weights of "
            "DINO or DINOv2), or --weight-semantic 0"
        )
    return SemanticLoss(load_vit(recipe.semantic, recipe.semantic_size))
