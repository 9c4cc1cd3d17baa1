"""Labelled images for training and evaluation: `load_dataset("digits" or a folder, split, image_size)`."""

from pathlib import Path

from var_ext.data.dataset import SPLITS, DataError, ImageDataset
from var_ext.data.digits import DigitsDataset, digits_split
from var_ext.data.image_folder import FolderDataset

__all__ = [
    "SPLITS",
    "DataError",
    "DigitsDataset",
    "FolderDataset",
    "ImageDataset",
    "digits_split",
    "load_dataset",
]


def load_dataset(
    spec: str | Path, split: str, image_size: int, *, augment: float = 0.0, seed: int = 0
) -> ImageDataset:
    """Open one split of a data set.

    Args:
        spec: "digits" (the handwritten digits of scikit-learn) or a folder of class folders of images.
        split: "train", "val" or "test"; a folder has a test split only if it contains a folder named test.
        image_size: side of the images in pixels.
        augment: strength of the augmentation: 0 none; digits: at 1 up to 8 degrees, 1/16 of the side and 6 %
            of size; folders: any value above 0 means a random crop.
        seed: seed of the augmentation, a pure function of (seed, epoch, index).

    Returns:
        `ImageDataset`: `[i]` gives (image (3, S, S) float32 in [-1, 1], label int).

    Raises:
        DataError: the data set is missing or not laid out as expected.
        ValueError: unknown split or a size below 1.
    """
    if image_size < 1:
        raise ValueError(f"image_size must be at least 1, got {image_size}")
    if str(spec) == "digits":
        return DigitsDataset(split, image_size, augment=augment, seed=seed)
    return FolderDataset(spec, split, image_size, augment=augment, seed=seed)
