"""From weights to images: one call, one random stream an image."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from var_ext import editing, ops
from var_ext.editing import KeptCodes, Region
from var_ext.models import VAR, VQVAE

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
        return self._draw(labels, seeds, cfg, top_k, top_p, batch_size)[0]

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
        return self._draw(labels, seeds, cfg, top_k, top_p, batch_size, decode=False)[1]

    def edit(
        self,
        image: Tensor,
        mask: Tensor | Sequence[float],
        label: int | Sequence[int] | Tensor | None = None,
        seed: int | Sequence[int] | Tensor | None = None,
        *,
        outside: bool = False,
        cfg: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        paste: bool = False,
        batch_size: int = 64,
    ) -> Tensor:
        """Draw a part of given images anew (paper, section 4.4): in-painting, out-painting, class-conditional editing.

        What the mask covers is replaced. The rest is kept as tokens: it comes back as the tokenizer renders it, a bit
        changed near the mask, unless it is pasted. The N images are all that image, mask, label and seed ask for, each
        of which is one for all or N.

        Args:
            image: (3, S, S) or (N, 3, S, S) floating point in [0, 1].
            mask: True or at least 0.5 where to replace: (S, S), (N, S, S) or (N, 1, S, S) bool or floating point, or
                the same in tokens of the last scale. A token stays only if none of its pixels is to be replaced. Or
                a box (x0, y0, x1, y1) in shares of the side, rounded to whole tokens; see `editing.Region`.
            label: class to draw, (N,) in 0..num_classes; None: no class, what fits to what is kept.
            seed: (N,) integers of 64 bits; None draws one an image from torch's global generator.
            outside: replace what lies outside the mask or box: out-painting.
            cfg, top_k, top_p: as in a call; None: 3, 900, 0.95, those of the published demonstration.
            paste: put the given pixels back where the mask does not cover them.
            batch_size: how many images to tokenize and draw at once.

        Returns:
            (N, 3, S, S) float32 in [0, 1].

        Raises:
            ValueError: wrong shape or range of image, mask, box, label, seed or an option, or their numbers differ.
            TypeError: image or mask is not of floats (a mask: or bools), or label or seed not of integers.
        """
        _check_batch_size(batch_size)
        images = editing.checked_images(image, self.image_size).to(self.device)
        region = Region.of(mask, image_size=self.image_size, grid=self.vae.schedule.side, outside=outside)
        labels = _row("label", self.num_classes if label is None else label)
        seeds = None if seed is None else _row("seed", seed)
        counts = {} if seeds is None else {"seed": len(seeds)}
        count = editing.common_count(image=len(images), mask=len(region.keep), label=len(labels), **counts)
        kept = KeptCodes.of(self.vae, images, region.keep, count=count, batch_size=batch_size)
        seeds = None if seeds is None else seeds.expand(count)
        cfg = editing.DEFAULTS["cfg"] if cfg is None else cfg
        top_k = editing.DEFAULTS["top_k"] if top_k is None else top_k
        top_p = editing.DEFAULTS["top_p"] if top_p is None else top_p
        edited = self._draw(labels.expand(count), seeds, cfg, top_k, top_p, batch_size, edit=kept)[0]
        return torch.where(region.replace.to(self.device)[:, None], edited, images) if paste else edited

    def _draw(
        self,
        labels: int | Sequence[int] | Tensor,
        seeds: int | Sequence[int] | Tensor | None,
        cfg: float | None,
        top_k: int | None,
        top_p: float | None,
        batch_size: int,
        decode: bool = True,
        edit: KeptCodes | None = None,
    ) -> tuple[Tensor, Tensor]:
        options: dict[str, Any] = {
            "cfg": self.defaults["cfg"] if cfg is None else cfg,
            "top_k": self.defaults["top_k"] if top_k is None else top_k,
            "top_p": self.defaults["top_p"] if top_p is None else top_p,
        }
        _check_batch_size(batch_size)
        pairs = self._pairs(labels, seeds)
        side = self.image_size
        images = [torch.empty(0, 3, side, side)] if decode else []
        tokens = [torch.empty(0, self.var.L, dtype=torch.int64)]
        # calls are cheaper in inference mode than under no_grad; what leaves it is copied into ordinary tensors
        with torch.inference_mode():
            for start in range(0, len(pairs[0]), batch_size):
                rows = slice(start, start + batch_size)
                label, seed = (t[rows].to(self.device) for t in pairs)
                hook = None if edit is None else edit[rows]
                f_hat, drawn = self._draw_batch(label, seed, **options, edit=hook)
                tokens.append(drawn)
                if decode:
                    f_hat = f_hat.to(self.vae.post_quant_conv.weight.dtype)
                    images.append(self.vae.fhat_to_img(f_hat).float().add(1).mul(0.5))
        return torch.cat([t.to(self.device) for t in images]) if decode else tokens[0], torch.cat(
            [t.to(self.device) for t in tokens]
        )

    def _draw_batch(
        self,
        labels: Tensor,
        seeds: Tensor,
        cfg: float,
        top_k: int,
        top_p: float,
        edit: Callable[[Tensor, int], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        drawn: list[Tensor] = []

        def choose(logits: Tensor, k: int) -> Tensor:
            t = cfg * self.var.schedule.ratio(k)
            drawn.append(ops.sample_tokens(logits, seeds, scale_index=k, cfg=t, top_k=top_k, top_p=top_p))
            codes = self.vae.quantize.embedding(drawn[-1])  # (B, l, Cvae)
            return codes if edit is None else edit(codes, k)

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


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")


def _row(name: str, values: int | Sequence[int] | Tensor) -> Tensor:
    """`values` as (N,) int64, N = 1 for a single one."""
    tensor = _integers(name, values)
    if tensor.ndim > 1:
        raise ValueError(f"{name} must be one integer or (N,), got shape {tuple(tensor.shape)}")
    return tensor.reshape(-1)


def _integers(name: str, values: int | Sequence[int] | Tensor) -> Tensor:
    """`values` as int64; nothing is rounded or wrapped on the way."""
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be integers of 64 bits, got {values!r}: {error}") from error
    if tensor.numel() and (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool):
        raise TypeError(f"{name} must be integers, got {str(tensor.dtype).removeprefix('torch.')}")
    return tensor.to(torch.int64)
