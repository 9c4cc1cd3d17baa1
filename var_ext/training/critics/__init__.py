"""Discriminators of the tokenizer's training.

patch.py      PatchGAN
vit_heads.py  heads over a frozen ViT
spectral.py   spectral normalisation
augment.py    what a discriminator sees
watch.py      one that has won waits
critic.py     `Critic`: all of it in training
"""

from var_ext.training.critics.critic import Critic, build_discriminator
from var_ext.training.critics.patch import PatchDiscriminator
from var_ext.training.critics.vit_heads import ViTDiscriminator

__all__ = ["Critic", "PatchDiscriminator", "ViTDiscriminator", "build_discriminator"]
