"""From weights to images: one call, one random stream per image."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from var_ext import editing
from var_ext.checkpoints.released import EVALUATION
from var_ext.editing import KeptCodes, Region
from var_ext.engine import Call, Engine, Options, default_precision, named_precision, options_for
from var_ext.engine.call import Integers, as_int64
from var_ext.engine.draw import draw_from
from var_ext.engine.engine import check_drawn
from var_ext.engine.memory import batch_for, out_of_memory
from var_ext.models import VAR, VQVAE
from var_ext.selection import Best, Keeper, Score, scores_of

log = logging.getLogger(__name__)

DEFAULTS = EVALUATION


class Sampler:
    """A tokenizer and a transformer, ready to draw images.

    Each image has its own seed: the same (label, seed) gets the same random numbers in any batch, at any position in
    it, on any device and with any number of threads. On the CPU sums have a fixed order too: tokens are the same in any
    batch and with any number of threads, and so is the image, bit for bit, with the same number; torch's convolutions,
    in the decoder, round otherwise with another. Elsewhere logits differ by rounding between batch sizes, which can
    change a drawn token.

    Args:
        vae, var: the two models, `var` built on `vae`; switched to evaluation mode.
        class_names: name of each class, for show.
        defaults: recommended cfg, top_k and top_p; missing ones are those of the published evaluation.
        precision: "fp32", which gives the published results, "bf16", "fp16" or "int8" (linear layers, CPU);
            None: "bf16" where the device supports it, else "fp32". The models' own weights are not changed.
        memory: budget in bytes for what grows with the batch, if batch_size is not given; None: half of the free
            memory.
        release: free the models' own weights as they are packed, which halves the memory of "bf16" and more; `vae` and
            `var` are unusable for anything else then.
        graph: on a GPU sample by one captured CUDA graph, from the second call of a batch size on.

    Raises:
        ValueError: `var` was built on another tokenizer, names do not match classes, a default is unknown, or the
            device does not support the precision.
    """

    def __init__(
        self,
        vae: VQVAE,
        var: VAR,
        *,
        class_names: Sequence[str] | None = None,
        defaults: Mapping[str, Any] | None = None,
        precision: str | torch.dtype | None = None,
        memory: int | None = None,
        graph: bool = True,
        release: bool = False,
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
        self.memory, self._asked, self._graph, self._release = memory, precision, graph, release
        self._make_engine()

    def _make_engine(self) -> None:
        asked = default_precision(self.device) if self._asked is None else self._asked
        self.precision = named_precision(asked, self.device)
        self.engine = Engine(self.var, self.precision, pack=True, release=self._release, graph=self._graph)

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
        return self.var.pos_1LC.device

    def to(self, device: torch.device | str) -> Sampler:
        """Move both models; returns self.

        Raises:
            RuntimeError: their weights were released.
        """
        if self.engine.released:
            raise RuntimeError("the models' weights were released and cannot be moved: load them again")
        self.vae.to(device)
        self.var.to(device)
        self._make_engine()
        return self

    def refresh(self) -> None:
        """Reread the weights at the next call: only needed after changes that torch does not record, such as writes
        through `.data`; see `engine.watch.Watch`."""
        self.engine.refresh()

    def __call__(
        self,
        labels: Integers,
        seeds: Integers | None = None,
        *,
        cfg: float | Sequence[float] | None = None,
        top_k: int | Sequence[int] | None = None,
        top_p: float | Sequence[float] | None = None,
        temperature: float | Sequence[float] = 1.0,
        cfg_until: int | None = None,
        more_smooth: bool = False,
        batch_size: int | None = None,
        conditions: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Draw one image for each (label, seed).

        Args:
            labels: (N,) classes in 0..num_classes, or one for all seeds.
            seeds: (N,) integers of 64 bits, or one for all labels; None draws them from torch's global generator. An
                unsigned seed from 2^63 on equals the negative one with the same bits.
            cfg: guidance. One value is the published ramp, cfg * k / (K - 1) at scale k of K; K values are taken as
                they are. 0: none.
            top_k, top_p: see `ops.sample_tokens`; one value or one per scale; 0 keeps all. None, here and for cfg:
                the recommended value.
            temperature: logits are divided by it after guidance; one value or one per scale.
            cfg_until: no guidance from this scale on, and no work for the unconditional half; None: on all scales.
            more_smooth: mix codes by a Gumbel-softmax instead of drawing one; for show, not for evaluation.
            batch_size: how many images to draw at once; None: as many as the memory budget allows, 64 at most.
            conditions: further arguments of a subclass's `condition`, (N, ...) each.

        Returns:
            (N, 3, S, S) float32 in [0, 1].

        Raises:
            ValueError: a label, a seed or an option is out of range, labels and seeds differ in number, or the memory
                budget is too small for one image.
            TypeError: labels, seeds or batch_size are not integers.
            torch.OutOfMemoryError: a batch does not fit; the message says what to do.
        """
        options = self.options(
            cfg=cfg,
            top_k=top_k,
            top_p=top_p,
            temperature=temperature,
            cfg_until=cfg_until,
            more_smooth=more_smooth,
        )
        call = self._call(labels, seeds, options, conditions)
        return torch.cat([self._no_images(), *(images for _, images, _ in self._batches(call, batch_size))])

    def tokens(
        self,
        labels: Integers,
        seeds: Integers | None = None,
        *,
        batch_size: int | None = None,
        conditions: Mapping[str, Tensor] | None = None,
        **options: Any,
    ) -> Tensor:
        """As a call, but returns the drawn tokens instead of images: (N, L) int64."""
        call = replace(self._call(labels, seeds, self.options(**options), conditions), decode=False)
        empty = torch.empty(0, self.var.L, dtype=torch.int64, device=self.device)
        return torch.cat([empty, *(tokens for _, _, tokens in self._batches(call, batch_size))])

    def edit(
        self,
        image: Tensor,
        mask: Tensor | Sequence[float],
        label: Integers | None = None,
        seed: Integers | None = None,
        *,
        outside: bool = False,
        paste: bool = False,
        batch_size: int | None = None,
        conditions: Mapping[str, Tensor] | None = None,
        **options: Any,
    ) -> Tensor:
        """Redraw a part of given images (paper, section 4.4): in-painting, out-painting, class-conditional editing.

        What the mask covers is replaced. The rest is kept as tokens: it comes back as the tokenizer renders it,
        slightly changed near the mask, unless it is pasted. Image, mask, label and seed are each one for all N, or N.

        Args:
            image: (3, S, S) or (N, 3, S, S) floating point in [0, 1].
            mask: True or at least 0.5 where to replace: (S, S), (N, S, S) or (N, 1, S, S) bool or floating point, or
                the same in tokens of the last scale. A token stays only if none of its pixels is to be replaced. Or
                a box (x0, y0, x1, y1) as fractions of the side, rounded to whole tokens; see `editing.Region`.
            label: class to draw, (N,) in 0..num_classes; None: no class, whatever fits the kept part.
            seed: (N,) integers of 64 bits; None draws one per image from torch's global generator.
            outside: replace what is outside the mask or box: out-painting.
            paste: put the given pixels back where the mask does not cover them.
            batch_size: how many images to tokenize and draw at once; None: as in a call.
            conditions: as in a call, (N, ...) each.
            options: as in a call; cfg, top_k and top_p default to 3, 900, 0.95, as in the published demo.

        Returns:
            (N, 3, S, S) float32 in [0, 1].

        Raises:
            ValueError: wrong shape or range of image, mask, box, label, seed or an option, or their numbers differ.
            TypeError: image or mask is not of floats (a mask: or bools), or label or seed not of integers.
        """
        size = self.batch_size(batch_size)
        call, images, region = self._edit(image, mask, label, seed, outside, size, conditions, options)
        edited = torch.cat([images[:0], *(part for _, part, _ in self._batches(call, size))])
        return torch.where(region.replace.to(self.device)[:, None], edited, images) if paste else edited

    def edit_stages(
        self,
        image: Tensor,
        mask: Tensor | Sequence[float],
        label: Integers | None = None,
        seed: Integers | None = None,
        *,
        outside: bool = False,
        paste: bool = False,
        conditions: Mapping[str, Tensor] | None = None,
        **options: Any,
    ) -> Iterator[Tensor]:
        """As `edit`, scale by scale: what `stages` is to a call. The last of the K is what `edit` returns."""
        size = self.batch_size(None)
        call, images, region = self._edit(image, mask, label, seed, outside, size, conditions, options)
        replaced = region.replace.to(self.device)[:, None]
        return (torch.where(replaced, each, images) if paste else each for each in self._stages(call))

    def _edit(
        self,
        image: Tensor,
        mask: Tensor | Sequence[float],
        label: Integers | None,
        seed: Integers | None,
        outside: bool,
        size: int,
        conditions: Mapping[str, Tensor] | None,
        options: Mapping[str, Any],
    ) -> tuple[Call, Tensor, Region]:
        """The checked request of an edit, its images tokenized `size` at once; and images and region as read."""
        images = editing.checked_images(image, self.image_size).to(self.device)
        region = Region.of(mask, image_size=self.image_size, grid=self.vae.schedule.side, outside=outside)
        labels = _row("label", self.num_classes if label is None else label)
        seeds = None if seed is None else _row("seed", seed, bits=True)
        counts = {} if seeds is None else {"seed": len(seeds)}
        count = editing.common_count(image=len(images), mask=len(region.keep), label=len(labels), **counts)
        kept = KeptCodes.of(self.vae, images, region.keep, count=count, batch_size=size)
        seeds = None if seeds is None else seeds.expand(count)
        given = {name: value for name, value in options.items() if value is not None}
        chosen = self.options(**{**editing.DEFAULTS, **given})
        return (
            replace(self._call(labels.expand(count), seeds, chosen, conditions), edit=kept),
            images,
            region,
        )

    def stream(
        self,
        labels: Integers,
        seeds: Integers | None = None,
        *,
        batch_size: int | None = None,
        progress: bool = False,
        conditions: Mapping[str, Tensor] | None = None,
        **options: Any,
    ) -> Iterator[tuple[int, Tensor]]:
        """Images as they finish: (index of the first, images (b, 3, S, S)) for each batch.

        Args:
            labels, seeds, batch_size, conditions, options: as in a call; checked before the first batch is drawn.
            progress: show a bar; else log a line per batch.
        """
        call = self._call(labels, seeds, self.options(**options), conditions)
        return ((start, images) for start, images, _ in self._shown(call, batch_size, progress))

    def scored(
        self,
        labels: Integers,
        seeds: Integers | None,
        score: Score,
        *,
        batch_size: int | None = None,
        progress: bool = False,
        conditions: Mapping[str, Tensor] | None = None,
        **options: Any,
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """As `stream`, with what a score says of each image: (index of the first, images (b, 3, S, S), scores (b,)
        float64 on the CPU). The score is as in `best_of`.

        Raises:
            ValueError: the score did not return a finite number for each image; or it reads tokens, and codes are
                mixed (`more_smooth`) or there are conditions that it does not know.
            TypeError: the score returned no numbers.
        """
        label, seed = self._pairs(labels, seeds)
        call = self._call(label, seed, self.options(**options), conditions)
        reads_tokens = getattr(score, "reads_tokens", False)
        if reads_tokens and (call.options.more_smooth or conditions):
            came = "more_smooth, which mixes codes" if call.options.more_smooth else "conditions"
            raise ValueError(
                f"a score of tokens knows them and the label alone, got {came}: take one of images"
            )
        batches = self._shown(call, batch_size, progress)

        def scored() -> Iterator[tuple[int, Tensor, Tensor]]:
            for start, images, tokens in batches:
                rows = slice(start, start + len(tokens))
                given = tokens if reads_tokens else images
                yield start, images, scores_of(score, given, label[rows].to(self.device), seed[rows])

        return scored()

    def best_of(
        self,
        labels: Integers,
        seeds: Integers | None,
        score: Score,
        keep: float | int = 0.05,
        *,
        batch_size: int | None = None,
        progress: bool = False,
        conditions: Mapping[str, Tensor] | None = None,
        **options: Any,
    ) -> Best:
        """Rejection sampling: draw candidates and keep the best of each label; see `selection` for what is published.

        The candidates are the pairs (label, seed) of a call, and the images those that a call would draw. Memory holds
        a batch and what is kept. Where an image and its score do not depend on the batch (on a CPU, with the scores of
        `evaluation.scoring`), the result does not either, bit for bit.

        Args:
            labels, seeds: as in a call, all pairs different: `best_of(3, range(1000), score)` is the best of a
                thousand of class 3.
            score: called with images (b, 3, S, S) float32 in [0, 1] and labels (b,) int64, returns (b,) finite
                numbers: higher is better. With an attribute `reads_tokens` that is true, it is called with the drawn
                tokens (b, L) int64 instead of the images.
            keep: a float in (0, 1], the share of the candidates of each label, rounded down; or an int, their number.
            batch_size, conditions, options: as in a call.
            progress: show a bar; else log a line per batch.

        Returns:
            the kept images with labels, seeds and scores: labels in the order in which they first came, the best
            first; of equal scores the lower seed.

        Raises:
            ValueError: `keep` is out of range, less than one image, or more than a label's candidates; a pair came
                twice; as in a call or `scored`.
            TypeError: `keep` is neither float nor int; as in a call or `scored`.
        """
        label, seed = self._pairs(labels, seeds)
        pairs = list(zip(label.tolist(), seed.tolist(), strict=True))
        keeper: Keeper[Tensor] = Keeper(label.tolist(), seed.tolist(), keep)
        batches = self.scored(
            label, seed, score, batch_size=batch_size, progress=progress, conditions=conditions, **options
        )
        for start, images, scores in batches:
            for i, value in enumerate(scores.tolist()):
                keeper.offer(*pairs[start + i], value, images[i].clone)  # a view would keep its batch
        return Best.of(keeper, self._no_images())

    def scales(
        self,
        labels: Integers,
        seeds: Integers | None = None,
        *,
        conditions: Mapping[str, Tensor] | None = None,
        **options: Any,
    ) -> Tensor:
        """What each scale adds: the decoded f_hat after it, (K, N, 3, S, S) float32 in [0, 1].

        Arguments are as in a call, but all N are drawn as one batch. The last of the K is what a call returns.
        """
        return torch.stack(list(self.stages(labels, seeds, conditions=conditions, **options)))

    def stages(
        self,
        labels: Integers,
        seeds: Integers | None = None,
        *,
        conditions: Mapping[str, Tensor] | None = None,
        **options: Any,
    ) -> Iterator[Tensor]:
        """As `scales`, each when it is drawn: (N, 3, S, S) float32 in [0, 1], K times.

        Arguments are checked before the first scale is drawn. An iterator that is closed draws no more.
        """
        return self._stages(self._call(labels, seeds, self.options(**options), conditions))

    def _stages(self, call: Call) -> Iterator[Tensor]:
        call, engine = call.batch(slice(None), self.device), self.engine
        with torch.inference_mode():
            draw = draw_from(call.randomness, call.options, engine.codebook)
        maps = engine.generate(call, draw)
        for _ in self.var.schedule.patch_nums:
            with torch.inference_mode():  # not around the yield, where the caller's mode applies
                images = engine.decode(next(maps))
                check_drawn(draw.tokens[-1])
            yield images.clone()
        next(maps, None)  # its end returns the cache

    def options(self, **options: Any) -> Options:
        """Options of a call, per scale, with recommended values for those that are None or missing."""
        given = {name: value for name, value in options.items() if value is not None}
        return options_for(self.var.schedule, **{**self.defaults, **given})

    def _call(
        self,
        labels: Integers,
        seeds: Integers | None,
        options: Options,
        conditions: Mapping[str, Tensor] | None = None,
    ) -> Call:
        """The checked request."""
        label, seed = self._pairs(labels, seeds)
        for name, value in (conditions or {}).items():
            if len(value) != len(label):
                raise ValueError(
                    f"{name} must be ({len(label)}, ...), one for each image, got {tuple(value.shape)}"
                )
        return Call(label, seed, options, conditions=conditions or {})

    def batch_size(self, given: int | None = None) -> int:
        """How many images a call draws at once if it is given this `batch_size`.

        Raises:
            ValueError: it is below 1, or the memory budget is too small for one image.
            TypeError: it is not an integer.
        """
        size = batch_for(self.var, self.precision, self.device, self.memory) if given is None else given
        if not isinstance(size, int | np.integer):
            raise TypeError(f"batch_size must be a whole number, got {size!r}")
        if size < 1:
            raise ValueError(f"batch_size must be at least 1, got {size}")
        return int(size)

    def _batches(self, call: Call, batch_size: int | None) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(index of the first, images, tokens) of each batch."""
        size = self.batch_size(batch_size)

        def drawn() -> Iterator[tuple[int, Tensor, Tensor]]:
            for start in range(0, len(call), size):
                batch = call.batch(slice(start, start + size), self.device)
                try:
                    images, tokens = self.engine.draw(batch)
                except RuntimeError as error:
                    if not out_of_memory(error):
                        raise
                    raise torch.OutOfMemoryError(
                        f"drawing {len(batch)} images at once ran out of memory ({str(error).splitlines()[0]}): give "
                        "a smaller batch_size, or Sampler a smaller memory budget"
                    ) from error
                yield start, images, tokens

        return drawn()

    def _shown(
        self, call: Call, batch_size: int | None, progress: bool
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """The same with a bar, or a line in the log."""
        batches = self._batches(call, batch_size)

        def drawn() -> Iterator[tuple[int, Tensor, Tensor]]:
            with tqdm(total=len(call), unit="image", disable=not progress) as bar:
                for start, images, tokens in batches:
                    bar.update(len(images))
                    if not progress:
                        log.info("%d of %d images", start + len(images), len(call))
                    yield start, images, tokens

        return drawn()

    def _no_images(self) -> Tensor:
        side = self.image_size
        return torch.empty(0, 3, side, side, dtype=torch.float32, device=self.device)

    def _pairs(self, labels: Integers, seeds: Integers | None) -> tuple[Tensor, Tensor]:
        """Labels and seeds as two (N,) int64 tensors."""
        label = as_int64("labels", labels)
        if seeds is None:
            seed = torch.randint(2**63 - 1, label.shape, device=label.device)
        else:
            seed = as_int64("seeds", seeds, bits=True).to(label.device)
        if label.ndim > 1 or seed.ndim > 1 or (label.ndim == seed.ndim == 1 and len(label) != len(seed)):
            raise ValueError(
                "labels and seeds must be one each or two lists of one length, "
                f"got shapes {tuple(label.shape)} and {tuple(seed.shape)}"
            )
        label, seed = torch.broadcast_tensors(label, seed)
        return self.var.checked_labels(label.reshape(-1)), seed.reshape(-1)


def _row(name: str, values: Integers, *, bits: bool = False) -> Tensor:
    """`values` as (N,) int64, N = 1 for a single one."""
    tensor = as_int64(name, values, bits=bits)
    if tensor.ndim > 1:
        raise ValueError(f"{name} must be one integer or (N,), got shape {tuple(tensor.shape)}")
    return tensor.reshape(-1)
