"""From checked requests to events: pictures as they come about."""

from __future__ import annotations

import time
from base64 import b64encode
from collections.abc import Generator, Iterator

import torch
from PIL import Image
from torch import Tensor

from var_ext.engine import named_precision
from var_ext.engine.precision import NAMES
from var_ext.grid import labelled_grid, to_pil
from var_ext.sampling import Sampler
from var_ext.show import class_name, png
from var_ext.web.queue import Event
from var_ext.web.requests import BatchRequest, CompareRequest, EditRequest, Request

AT_ONCE = 8  # images of a batch between two looks at whether its client is still there
Events = Generator[Event, None, None]


class Drawing:
    """A model as the page uses it; to be called from one thread at a time.

    Args:
        sampler: the model. Its weights are shared by one more engine a precision, built when it is first compared.
    """

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler
        self.precisions = [name for name in NAMES if _runs(name, sampler.device)]
        self._samplers = {sampler.precision.name: sampler}

    def draw(self, request: Request) -> Events:
        """An event a scale, then the end."""
        start = time.perf_counter()
        stages = self.sampler.stages(request.label, request.seed, **request.options)
        yield from self._shown(stages, start)

    def edit(self, request: EditRequest) -> Events:
        """The same for a picture that is partly redrawn."""
        start = time.perf_counter()
        stages = self.sampler.edit_stages(
            request.image, request.mask, request.label, request.seed, paste=request.paste, **request.options
        )
        yield from self._shown(stages, start)

    def _shown(self, stages: Iterator[Tensor], start: float) -> Events:
        sides = self.sampler.vae.schedule.patch_nums
        for k, (side, images) in enumerate(zip(sides, stages, strict=True)):
            shown = {"scale": k + 1, "scales": len(sides), "side": side, "image": _url(to_pil(images)[0])}
            yield {"event": "stage", **shown}
        yield {"event": "done", "seconds": time.perf_counter() - start}

    def compare(self, request: CompareRequest) -> Events:
        """An event a precision with its time and, beside the first, how far its picture is off."""
        first = None
        for name in request.precisions:
            sampler = self._of(name)
            start = time.perf_counter()
            images = sampler(request.label, request.seed, **request.options).cpu()
            seconds = time.perf_counter() - start
            first = images if first is None else first
            off = (images - first).abs().mean().item() * 255
            event = {"event": "compared", "precision": name, "seconds": seconds, "off": off}
            yield {**event, "image": _url(to_pil(images)[0])}
        yield {"event": "done"}

    def batch(self, request: BatchRequest) -> Events:
        """An event an image, then all of them as one picture with names and seeds."""
        labels = [label for label in request.labels for _ in request.seeds]
        seeds = list(request.seeds) * len(request.labels)
        parts, start = [], time.perf_counter()
        for at, images in self.sampler.stream(labels, seeds, batch_size=AT_ONCE, **request.options):
            parts.append(images.cpu())
            for i, picture in enumerate(to_pil(images), at):
                image = {"label": labels[i], "seed": seeds[i], "image": _url(picture)}
                yield {"event": "image", "index": i, "images": len(labels), **image}
        seconds = time.perf_counter() - start
        names = [class_name(self.sampler.class_names, label) for label in request.labels]
        sheet = labelled_grid(torch.cat(parts), names, [str(seed) for seed in request.seeds])
        yield {"event": "sheet", "image": _url(sheet)}
        yield {"event": "done", "seconds": seconds}

    def _of(self, name: str) -> Sampler:
        """The sampler of a precision, with its weights packed and its kernels chosen: neither is part of a time."""
        if name not in self._samplers:
            of = self.sampler
            self._samplers[name] = Sampler(
                of.vae, of.var, class_names=of.class_names, defaults=of.defaults, precision=name
            )
            self._samplers[name](0, 0)
        return self._samplers[name]


def _runs(name: str, device: torch.device) -> bool:
    try:
        named_precision(name, device)
    except ValueError:
        return False
    return True


def _url(picture: Image.Image) -> str:
    return f"data:image/png;base64,{b64encode(png(picture)).decode()}"
