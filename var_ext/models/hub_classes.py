"""The published classes that load from and save to a hub repository: `from_pretrained`, `save_pretrained`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub import PyTorchModelHubMixin

from var_ext.models.var import VAR
from var_ext.models.vqvae import VQVAE


class VQVAEHF(VQVAE, PyTorchModelHubMixin):
    """`VQVAE` with the arguments of its constructor in the repository's config.json."""


class VARHF(VAR, PyTorchModelHubMixin):
    """`VAR` that builds its tokenizer itself. As published, the repository does not contain its weights: load them.

    Args:
        vae_kwargs: arguments of `VQVAE`.
        options: further arguments of `VAR`.
    """

    def __init__(self, vae_kwargs: Mapping[str, Any], **options: Any) -> None:
        super().__init__(VQVAE(**vae_kwargs), **options)
