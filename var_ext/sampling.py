"""From weights to images: one call, one random stream an image."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from var_ext import ops
from var_ext.models import VAR, VQVAE

log = logging.getLogger(__name__)

DEFAULTS: Mapping[str, Any] = {"cfg": 1.5, "top_k": 900, "top_p": 0.96}  # of the published evaluation


class Sampler:
    """A tokenizer and a transformer, ready to draw images.

    Each image has a seed of its own: the same (label, seed) takes the same random numbers in any batch, at any place in
    it, on any device and with any number of threads. Logits differ by rounding between batch sizes, as matrix products
    do; a token could differ only where that tips a draw.

    Args:
        vae, var: the two models, `var` built on `vae`; switched to evaluation.
        class_names: name of each class, for show.
        defaults: recommended cfg, top_k and top_p; those of the published evaluation where left out.

    Raises:
        ValueError: `var` was built on another tokenizer, names do not match classes, or a default is unknown.
    """

    def __init__(
        self,
        vae: VQVAE,
        var: VAR,
        *,
        class_names: Sequence[str] | None = None,
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        if var.vae_proxy[0] is not vae:
            raise ValueError("var must be built on the vae that is given with it, got another one")
        if class_names is not None and len(class_names) != var.num_classes:
            raise ValueError(f"class_names must name {var.num_classes} classes, got {len(class_names)}")
        unknown = sorted(set(defaults or {}) - set(DEFAULTS))
        if unknown:
            raise ValueError(f"defaults may hold {', '.join(DEFAULTS)}, got {', '.join(unknown)}")
        self.vae, self.var = vae.eval(), var.eval()
        self.class_names = list(class_names or map(str, range(var.num_classes)))
        self.defaults = {**DEFAULTS, **(defaults or {})}

    @property
    def num_classes(self) -> int:
        """Number of classes; the label `num_classes` means "no class"."""
        return self.var.num_classes

    @property
    def image_size(self) -> int:
        """Side of the images in pixels."""
        return self.vae.image_size

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return self.var.lvl_1L.device

    def to(self, device: torch.device | str) -> Sampler:
        """Move both models; returns self."""
        self.vae.to(device)
        self.var.to(device)
        return self

    def __call__(
        self,
        labels: int | Sequence[int] | Tensor,
        seeds: int | Sequence[int] | Tensor | None = None,
        *,
        cfg: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        batch_size: int = 64,
    ) -> Tensor:
        """Draw one image for each (label, seed).

        Args:
            labels: (N,) classes in 0..num_classes, or one for all seeds.
            seeds: (N,) integers of 64 bits, or one for all labels; None draws them from torch's global generator.
            cfg: guidance; at scale k of K its weight is cfg * k / (K - 1). 0: none.
            top_k, top_p: see `ops.sample_tokens`; 0 keeps all. None, here and above: the recommended value.
            batch_size: how many images to draw at once.

        Returns:
            (N, 3, S, S) float32 in [0, 1].

        Raises:
            ValueError: a label, a seed or an option is out of range, or labels and seeds differ in number.
            TypeError: labels or seeds are not integers.
        """
        none = torch.empty(0, 3, self.image_size, self.image_size, device=self.device)
        return torch.cat([none, *self._draw(labels, seeds, cfg, top_k, top_p, batch_size)[1]])

    def stream(
        self,
        labels: int | Sequence[int] | Tensor,
        seeds: int | Sequence[int] | Tensor | None = None,
        *,
        cfg: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        batch_size: int = 64,
        progress: bool = False,
    ) -> Iterator[tuple[int, Tensor]]:
        """As a call, but each batch as soon as it is drawn: memory for one batch, however many images.

        Args:
            labels, seeds, cfg, top_k, top_p, batch_size: as in a call; ranges are checked batch by batch.
            progress: show a progress bar; else each batch is a line of the log.

        Returns:
            Iterator of (place of the batch's first image, (B, 3, S, S) float32 in [0, 1]), in order. B is batch_size,
            less in the last batch. Nothing is drawn ahead of what is asked for.
        """
        count, batches = self._draw(labels, seeds, cfg, top_k, top_p, batch_size)

        def follow() -> Iterator[tuple[int, Tensor]]:
            start = 0
            with tqdm(total=count, desc="images", unit="img", disable=not progress) as bar:
                for images in batches:
                    bar.update(len(images))
                    if not progress:
                        log.info("%d of %d images", start + len(images), count)
                    yield start, images.clone()  # the copy is an ordinary tensor, not one of inference mode
                    start += len(images)

        return follow()

    def tokens(
        self,
        labels: int | Sequence[int] | Tensor,
        seeds: int | Sequence[int] | Tensor | None = None,
        *,
        cfg: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        batch_size: int = 64,
    ) -> Tensor:
        """As a call, but the drawn tokens instead of images: (N, L) int64."""
        none = torch.empty(0, self.var.L, dtype=torch.int64, device=self.device)
        return torch.cat([none, *self._draw(labels, seeds, cfg, top_k, top_p, batch_size, decode=False)[1]])

    def _draw(
        self,
        labels: int | Sequence[int] | Tensor,
        seeds: int | Sequence[int] | Tensor | None,
        cfg: float | None,
        top_k: int | None,
        top_p: float | None,
        batch_size: int,
        decode: bool = True,
    ) -> tuple[int, Iterator[Tensor]]:
        """Number of images, and the batches of images, or of tokens, each drawn when it is asked for."""
        options: dict[str, Any] = {
            "cfg": self.defaults["cfg"] if cfg is None else cfg,
            "top_k": self.defaults["top_k"] if top_k is None else top_k,
            "top_p": self.defaults["top_p"] if top_p is None else top_p,
        }
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        pairs = self._pairs(labels, seeds)

        def batches() -> Iterator[Tensor]:
            for start in range(0, len(pairs[0]), batch_size):
                label, seed = (t[start : start + batch_size].to(self.device) for t in pairs)
                # calls are cheaper in inference mode than under no_grad; the mode must not reach who reads the batch
                with torch.inference_mode():
                    f_hat, result = self._draw_batch(label, seed, **options)
                    if decode:
                        f_hat = f_hat.to(self.vae.post_quant_conv.weight.dtype)
                        result = self.vae.fhat_to_img(f_hat).float().add(1).mul(0.5)
                yield result

        return len(pairs[0]), batches()

    def _draw_batch(
        self, labels: Tensor, seeds: Tensor, cfg: float, top_k: int, top_p: float
    ) -> tuple[Tensor, Tensor]:
        drawn: list[Tensor] = []

        def choose(logits: Tensor, k: int) -> Tensor:
            t = cfg * self.var.schedule.ratio(k)
            drawn.append(ops.sample_tokens(logits, seeds, scale_index=k, cfg=t, top_k=top_k, top_p=top_p))
            return self.vae.quantize.embedding(drawn[-1])  # (B, l, Cvae)

        f_hat = self.var.generate(labels, choose)
        return f_hat, torch.cat(drawn, dim=1)

    def _pairs(
        self, labels: int | Sequence[int] | Tensor, seeds: int | Sequence[int] | Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Labels and seeds as two (N,) int64 tensors."""
        label = _integers("labels", labels)
        if seeds is None:
            seed = torch.randint(2**63 - 1, label.shape, device=label.device)
        else:
            seed = _integers("seeds", seeds).to(label.device)
        if label.ndim > 1 or seed.ndim > 1 or (label.ndim == seed.ndim == 1 and len(label) != len(seed)):
            raise ValueError(
                "labels and seeds must be one each or two lists of one length, "
                f"got shapes {tuple(label.shape)} and {tuple(seed.shape)}"
            )
        label, seed = torch.broadcast_tensors(label, seed)
        return label.reshape(-1), seed.reshape(-1)


def _integers(name: str, values: int | Sequence[int] | Tensor) -> Tensor:
    """`values` as int64; nothing is rounded or wrapped on the way."""
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be integers of 64 bits, got {values!r}: {error}") from error
    if tensor.numel() and (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool):
        raise TypeError(f"{name} must be integers, got {str(tensor.dtype).removeprefix('torch.')}")
    return tensor.to(torch.int64)
