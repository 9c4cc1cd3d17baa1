"""Losses of the tokenizer, one a file.

term.py         `Term`: weight, start and warm-up of a loss; `ImageLosses`: their weighted sum
l1.py, l2.py    differences of pixels
perceptual.py   `FrozenLoss`, what the next three have in common
lpips.py        LPIPS; lpips_files.py: its weights in public layouts
structural.py   a perceptual loss without weights
semantic.py     cosine of features of a frozen ViT
adversarial.py  hinge, LeCAM and consistency of logits; the adaptive weight
chosen.py       the losses that a recipe asks for

To add one, write its function or `FrozenLoss`, its fields in `recipe_losses.py` (weight_NAME, NAME_start,
NAME_warmup), and its line in `chosen.image_losses`. A perceptual loss needs none of that: `train_tokenizer` takes one.
"""

from var_ext.training.losses.lpips import LPIPS
from var_ext.training.losses.lpips_files import load_lpips
from var_ext.training.losses.semantic import SemanticLoss
from var_ext.training.losses.structural import StructuralLoss
from var_ext.training.losses.term import ImageLosses, Loss, Term

__all__ = [
    "LPIPS",
    "ImageLosses",
    "Loss",
    "SemanticLoss",
    "StructuralLoss",
    "Term",
    "load_lpips",
]
