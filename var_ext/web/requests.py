"""Requests of the page, checked: what came is what was wanted, or a ValueError says what to mend."""

from __future__ import annotations

import binascii
import io
from base64 import b64decode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from var_ext.data.raster import open_raster
from var_ext.sampling import Sampler
from var_ext.web.limits import Limits

OPTIONS = ("cfg", "top_k", "top_p", "temperature")
LARGEST_SEED = 2**63 - 1


@dataclass(frozen=True)
class Request:
    """One image: class, seed and the options of a call that were given."""

    label: int
    seed: int
    options: Mapping[str, Any]


@dataclass(frozen=True)
class EditRequest(Request):
    """An image (3, S, S) float32 in [0, 1] with a mask (S, S) bool, True where it is redrawn."""

    image: Tensor = field(default_factory=lambda: torch.empty(0))
    mask: Tensor = field(default_factory=lambda: torch.empty(0))
    paste: bool = False


@dataclass(frozen=True)
class CompareRequest(Request):
    """One image in several precisions."""

    precisions: Sequence[str] = ()


@dataclass(frozen=True)
class BatchRequest:
    """Rows of classes, columns of seeds."""

    labels: Sequence[int]
    seeds: Sequence[int]
    options: Mapping[str, Any]


class Reader:
    """Reads requests for a model.

    Args:
        sampler: the model.
        precisions: those that can be compared.
        limits: bounds.

    Raises, from each method:
        ValueError: a field is missing, unknown, of another type or out of range.
    """

    def __init__(self, sampler: Sampler, precisions: Sequence[str], limits: Limits) -> None:
        self.classes, self.side = sampler.num_classes, sampler.image_size
        self.codes = sampler.vae.vocab_size
        self.precisions, self.limits = list(precisions), limits

    def draw(self, body: Any) -> Request:
        """label, seed and options."""
        body = _object(body, ("label", "seed", *OPTIONS))
        return Request(**self._image(body))

    def edit(self, body: Any) -> EditRequest:
        """The same with image and mask, PNGs in base64, and paste."""
        body = _object(body, ("label", "seed", *OPTIONS, "image", "mask", "paste"))
        paste = body.get("paste", False)
        if not isinstance(paste, bool):
            raise ValueError(f"paste must be true or false, got {_short(paste)}")
        image = np.asarray(self._picture("image", body).convert("RGB"), dtype=np.float32) / np.float32(255)
        mask = torch.from_numpy(np.asarray(self._picture("mask", body).convert("L")) >= 128)
        if not mask.any():
            raise ValueError("mask must be white where to redraw, got none: paint on the picture first")
        pixels = torch.from_numpy(image.transpose(2, 0, 1).copy())
        return EditRequest(**self._image(body), image=pixels, mask=mask, paste=paste)

    def compare(self, body: Any) -> CompareRequest:
        """The same as to draw, and precisions."""
        body = _object(body, ("label", "seed", *OPTIONS, "precisions"))
        asked = body.get("precisions")
        known = isinstance(asked, list) and all(isinstance(p, str) and p in self.precisions for p in asked)
        if not asked or not known or len(set(asked)) < len(asked):
            wanted = f"precisions must be a list of different ones of {', '.join(self.precisions)}"
            raise ValueError(f"{wanted}, got {_short(asked)}")
        return CompareRequest(**self._image(body), precisions=asked)

    def batch(self, body: Any) -> BatchRequest:
        """labels, the first seed, count of each label, and options."""
        body = _object(body, ("labels", "seed", "count", *OPTIONS))
        labels = body.get("labels")
        if not isinstance(labels, list) or not 1 <= len(labels) <= self.limits.images:
            raise ValueError(f"labels must be a list of 1 to {self.limits.images}, got {_short(labels)}")
        labels = [_whole("labels", label, 0, self.classes) for label in labels]
        count = _whole("count", body.get("count"), 1, self.limits.images)
        if len(labels) * count > self.limits.images:
            wanted = f"a batch must be at most {self.limits.images} images"
            raise ValueError(f"{wanted}, got {len(labels)} classes of {count}: take fewer of either")
        seed = _whole("seed", body.get("seed"), 0, LARGEST_SEED - count)
        return BatchRequest(labels, range(seed, seed + count), self._options(body))

    def _image(self, body: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "label": _whole("label", body.get("label"), 0, self.classes),
            "seed": _whole("seed", body.get("seed"), 0, LARGEST_SEED),
            "options": self._options(body),
        }

    def _options(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Those that were given; null is as good as left out."""
        given = {name: body[name] for name in OPTIONS if body.get(name) is not None}
        ranges = {"cfg": self.limits.cfg, "top_p": (0.0, 1.0), "temperature": self.limits.temperature}
        return {
            name: _whole(name, value, 0, self.codes)
            if name == "top_k"
            else _number(name, value, *ranges[name])
            for name, value in given.items()
        }

    def _picture(self, name: str, body: Mapping[str, Any]) -> Image.Image:
        wanted = f"{name} must be a PNG of {self.side} x {self.side} pixels in base64"
        text, most = body.get(name), self.limits.picture_bytes(self.side)
        if not isinstance(text, str):
            raise ValueError(f"{wanted}, got {_short(text)}")
        try:
            content = b64decode(text.removeprefix("data:image/png;base64,"), validate=True)
        except (binascii.Error, ValueError) as error:
            raise ValueError(f"{wanted}, got other text") from error
        if len(content) > most:
            raise ValueError(f"{wanted}, at most {most} bytes, got {len(content)}")
        try:
            picture = open_raster(io.BytesIO(content), ("PNG",))
            fits = picture.size == (self.side, self.side)
            if fits:
                picture.load()
        # Pillow raises many classes for broken files
        except Exception as error:
            raise ValueError(f"{wanted}, got a file that is none") from error
        if not fits:
            raise ValueError(f"{wanted}, got {picture.width} x {picture.height}")
        return picture


def _object(body: Any, fields: Sequence[str]) -> Mapping[str, Any]:
    if not isinstance(body, dict):
        raise ValueError(f"the request must be a JSON object, got {_short(body)}")
    if unknown := sorted(set(body) - set(fields)):
        raise ValueError(f"the request may have {', '.join(fields)}, got {_short(', '.join(unknown))}")
    return body


def _whole(name: str, value: Any, low: int, high: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name} must be a whole number in {low}..{high}, got {_short(value)}")
    return value


def _number(name: str, value: Any, low: float, high: float) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not low <= value <= high:  # NaN fails too
        raise ValueError(f"{name} must be a number in [{low:g}, {high:g}], got {_short(value)}")
    return float(value)


def _short(value: Any) -> str:
    """A value as a message shows it, never all of a long one."""
    if value is None:
        return "nothing"
    if isinstance(value, int) and abs(value) > 2**64:
        return "a huge number"
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
