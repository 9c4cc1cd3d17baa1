"""What samples are compared with: ADM's reference file, or images; and writing such a file of a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from var_ext.checkpoints import atomic_write, check_writable
from var_ext.data import DataError
from var_ext.evaluation.feature_store import BATCH, PATIENCE, FeatureStore
from var_ext.evaluation.features import Extractor
from var_ext.evaluation.image_sources import Images, open_images
from var_ext.evaluation.moments import Moments
from var_ext.evaluation.npz import Parts, comment, members, whole, write_npz
from var_ext.export import is_npz, rank_and_world
from var_ext.paths import user_path

# of Inception's fields in ADM's files: mean and covariance
STATISTICS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
ROUNDING = 1e-6  # of what is largest: so far a covariance may be from symmetric, and its eigenvalues below 0
KEPT = 10_000  # images that ADM's reference files hold, for precision and recall

Gaussian = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Reference:
    """Real images.

    Attributes:
        name: of the file or folder.
        statistics: mean (D,) and covariance (D, D) in float64 of Inception's fields, of all images; empty where they
            are to be computed from `images`.
        images: those that are there, or None.
    """

    name: str
    statistics: dict[str, Gaussian]
    images: Images | None


def read_reference(path: str | os.PathLike[str], side: int | None = None) -> Reference:
    """ADM's .npz (mu, sigma, mu_s, sigma_s, arr_0), another .npz of images (arr_0), or a folder of pictures.

    As in ADM's evaluator, statistics are used if they are in the file, whatever its images are.

    Args:
        side: see `open_images`.

    Raises:
        DataError: the file is damaged, or has neither statistics nor images, or statistics that are none.
    """
    file = user_path(path)
    if not is_npz(file):
        return Reference(file.name, {}, open_images(file, side))
    there = members(file)
    if "mu" not in there and "arr_0" not in there:
        raise DataError(
            f"{file} must have images (arr_0) or statistics (mu, sigma, mu_s, sigma_s), got "
            f"{', '.join(there) or 'nothing'}"
        )
    images = open_images(file, side) if "arr_0" in there else None
    statistics = {}
    for field, names in STATISTICS.items() if "mu" in there else ():
        lacking = [name for name in names if name not in there]
        if lacking and field == "pool":
            raise DataError(f"{file} must have {' and '.join(names)}, got no {' and no '.join(lacking)}")
        if not lacking:
            statistics[field] = _gaussian(file, *names)
    return Reference(file.name, statistics, images)


def _gaussian(file: Path, mean_name: str, covariance_name: str) -> Gaussian:
    mean, covariance = whole(file, mean_name), whole(file, covariance_name)
    floats = mean.dtype.kind == covariance.dtype.kind == "f"
    if mean.ndim != 1 or covariance.shape != 2 * mean.shape or not floats:
        raise DataError(
            f"{mean_name} and {covariance_name} of {file} must be floats (D,) and (D, D), got {mean.shape} "
            f"{mean.dtype} and {covariance.shape} {covariance.dtype}"
        )
    found = torch.from_numpy(mean).double(), torch.from_numpy(covariance).double()
    if not all(torch.isfinite(each).all() for each in found):
        raise DataError(f"{mean_name} and {covariance_name} of {file} must be finite, got NaN or infinity")
    covariances = found[1]
    if float((covariances - covariances.T).abs().max()) > ROUNDING * float(covariances.abs().max()):
        raise DataError(f"{covariance_name} of {file} must be a covariance, but is not symmetric")
    values = torch.linalg.eigvalsh(covariances)
    if float(values[0]) < -ROUNDING * float(values.abs().max()):
        raise DataError(
            f"{covariance_name} of {file} must be a covariance, but has the eigenvalue {float(values[0]):.3g}"
        )
    return found


def gaussians(store: FeatureStore) -> dict[str, Gaussian]:
    """Mean and unbiased covariance of each field of a store.

    Raises:
        ValueError: fewer than two images.
    """
    moments = {name: Moments() for name in store.extractor.fields}
    for _, rows in store.rows():
        for name, each in moments.items():
            each.add(torch.from_numpy(np.array(rows[name])))
    return {name: each.gaussian() for name, each in moments.items()}


def check_covariance(images: Images) -> None:
    """Raises ValueError for too few images, before hours of features."""
    if images.count < 2:
        raise ValueError(f"a covariance needs at least 2 images, got {images.count} of {images.name}")


def write_reference(
    images: Images,
    extractor: Extractor,
    out: str | os.PathLike[str],
    cache: Path,
    *,
    kept: int = KEPT,
    batch_size: int = BATCH,
    progress: bool = False,
    patience: float = PATIENCE,
) -> Path | None:
    """Write a reference file in ADM's layout: statistics of all images, and evenly spaced ones of them for the rest.

    The file says in the comment of its archive what it was made of, and is not made anew: neither by the same command
    again, nor by a rank that comes late, when the features may have been removed already.

    Args:
        images: real ones.
        extractor: Inception's, see `features.inception`.
        out: NAME.npz.
        cache: folder of features, which ranks share and a stopped run goes on from.
        kept: images in the file, for precision, recall and kernel distance.

    Returns:
        the path, on rank 0.

    Raises:
        ValueError: the extractor is not Inception's, the name does not end with .npz or is that of the images, or fewer
            than two images.
        CheckpointError: the file cannot be written, or another rank is lost.
        DataError: an image cannot be read.
    """
    path = user_path(out)
    if not is_npz(path):
        raise ValueError(f"a reference must be written to NAME.npz, got {path}")
    if set(extractor.fields) != set(STATISTICS):
        raise ValueError(
            f"ADM's layout is of Inception's features, got {extractor.weights}{extractor.suffix}"
        )
    if images.path is not None and path.exists() and path.samefile(images.path):
        raise ValueError(
            f"a reference must not replace the images it is of, got {path} for both: name another file"
        )
    check_covariance(images)
    check_writable(path)
    store = FeatureStore(cache, images, extractor, batch_size=batch_size)
    made_of, rank = f"var_ext reference {store.key} {kept}".encode(), rank_and_world()[0]
    # in this order, and once: features are removed as soon as the file is whole
    if store.missing():
        if path.exists() and comment(path) == made_of:
            return None if rank else path
    elif rank:
        return None
    store.fill("features of the reference", progress=progress, patience=patience)
    if rank:
        return None
    arrays: dict[str, np.ndarray | Parts] = {}
    for field, found in gaussians(store).items():
        arrays |= {name: each.numpy() for name, each in zip(STATISTICS[field], found, strict=True)}
    count = min(kept, images.count)
    places = np.arange(count) * images.count // count

    def parts() -> Iterator[np.ndarray]:
        for block in images.blocks:
            here = places[(places >= block.start) & (places < block.stop)]
            if len(here):
                yield images.load(block)[here - block.start]

    arrays["arr_0"] = Parts((count, *images.size, 3), np.dtype(np.uint8), parts())
    with atomic_write(path) as handle:
        write_npz(handle, arrays, made_of)
    return path
