"""Labelled images for training and evaluation: `load_dataset("digits", a folder, ..., split, image_size)`."""

from pathlib import Path
from typing import Any

from var_ext.data.dataset import SPLITS, DataError, ImageDataset, normalized
from var_ext.data.digits import DigitsDataset, digits_split
from var_ext.data.framing import DECODES, GEOMETRIES, check_choices
from var_ext.data.hub_dataset import HubDataset
from var_ext.data.image_folder import FolderDataset
from var_ext.data.loader import ImageLoader
from var_ext.data.shards import ShardDataset

TOKENS = (
    "tokens:"  # what DATA begins with where it is no pictures but their tokens, see `training.stored_tokens`
)

__all__ = [
    "DECODES",
    "GEOMETRIES",
    "SPLITS",
    "TOKENS",
    "DataError",
    "DigitsDataset",
    "FolderDataset",
    "HubDataset",
    "ImageDataset",
    "ImageLoader",
    "ShardDataset",
    "digits_split",
    "load_dataset",
    "normalized",
]


def load_dataset(
    spec: str | Path,
    split: str,
    image_size: int,
    *,
    augment: float = 0.0,
    seed: int = 0,
    geometry: str = "published",
    decode: str = "exact",
) -> ImageDataset:
    """Open one split of a data set.

    Args:
        spec: "digits" (the handwritten digits of scikit-learn), a folder of class folders of images, "wds:PATTERN" for
            tar shards (see `ShardDataset`) or "hf:NAME" for a Hugging Face data set or a folder of one (see
            `HubDataset`).
        split: "train", "val" or "test"; a folder has a test split only if it contains a folder named test.
        image_size: side of the images in pixels.
        augment: strength of the augmentation: 0 none; digits: at 1 up to 8 degrees, 1/16 of the side and 6 %
            of size; pictures: any value above 0 means a random crop.
        seed: seed of the augmentation, a pure function of (seed, epoch, index).
        geometry: how pictures are read: "published", or "upright" (see `var_ext.data.framing`).
        decode: "exact" or "fast", likewise.

    Returns:
        `ImageDataset`: `[i]` gives (image (3, S, S) float32 in [-1, 1], label int).

    Raises:
        DataError: the data set is missing or not laid out as expected, or a picture is broken.
        ValueError: unknown split, geometry or decode, or a size below 1.
    """
    if image_size < 1:
        raise ValueError(f"image_size must be at least 1, got {image_size}")
    check_choices(geometry, decode)
    name = str(spec)
    if name.startswith(TOKENS):
        raise DataError(
            f"images are wanted, and {name} holds their tokens, of which only a transformer learns"
        )
    if name == "digits":
        if (geometry, decode) != ("published", "exact"):
            raise ValueError(
                f"geometry and decode are for picture files; digits has none, got {geometry!r} and {decode!r}"
            )
        return DigitsDataset(split, image_size, augment=augment, seed=seed)
    options: dict[str, Any] = dict(augment=augment, seed=seed, geometry=geometry, decode=decode)
    for prefix, source in (("wds:", ShardDataset), ("hf:", HubDataset)):
        if name.startswith(prefix):
            return source(name.removeprefix(prefix), split, image_size, **options)
    return FolderDataset(spec, split, image_size, **options)
