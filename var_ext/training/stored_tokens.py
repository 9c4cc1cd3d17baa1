"""Tokens as a data set of their own: made once, trained on by many runs, without pictures.

`store_tokens` writes a folder, tokens.json beside shards and labels; "tokens:FOLDER" is then DATA for `train_var`, with
the tokenizer that made it. Whoever has tokens of another source writes such a folder with `write_token_set`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from var_ext.arrays import map_array
from var_ext.checkpoints import CheckpointError, atomic_write, load_tokenizer, read_json, write_json
from var_ext.data import TOKENS, DataError, ImageDataset, load_dataset
from var_ext.models import VQVAE
from var_ext.paths import is_file_name, user_path
from var_ext.training.ranks import join
from var_ext.training.recipes import VARRecipe
from var_ext.training.tokens import BATCH, CachedTokens, OnlineTokens, Shards, Tokens, digest_of

NAME = "tokens.json"
FORMAT = 1


@dataclass(frozen=True)
class TokenSplit:
    """Tokens of a split.

    Attributes:
        shards: files in the folder, each (n, copies, L) int16 or int32, in order.
        labels: (N,) int64, N the sum of all n.
        made: what is said of their making, for the record: JSON values.
    """

    shards: Sequence[Path]
    labels: Tensor
    made: Mapping[str, Any]


def write_token_set(
    folder: Path, vae: VQVAE, class_names: Sequence[str], splits: Mapping[str, TokenSplit]
) -> Path:
    """Makes a folder of shards a data set: labels and tokens.json, the latter last.

    Args:
        vae: the tokenizer that made the tokens.
        class_names: K names; labels are 0..K-1.
        splits: "train" and "val".

    Raises:
        CheckpointError: a file cannot be written, or a shard is none.
        DataError: other numbers of images and labels, or a token or a label is out of range.
    """
    found: dict[str, Any] = {}
    for name, split in splits.items():
        shards = Shards(split.shards)
        _check(name, shards, split.labels, vae, len(class_names))
        with atomic_write(folder / f"labels-{name}.npy") as handle:
            np.save(handle, split.labels.numpy().astype(np.int32))
        found[name] = {
            "images": len(shards),
            "copies": shards.copies,
            "shards": [path.name for path in split.shards],
            "digests": [hashlib.sha256(path.read_bytes()).hexdigest() for path in split.shards],
            "made": dict(split.made),
        }
    about = {
        "format": FORMAT,
        "class_names": list(class_names),
        "patch_nums": list(vae.schedule.patch_nums),
        "vocab_size": vae.vocab_size,
        "tokenizer": digest_of(vae),
        "splits": found,
    }
    write_json(folder / NAME, about)
    return folder


def _check(name: str, shards: Shards, labels: Tensor, vae: VQVAE, classes: int) -> None:
    tokens, length = shards.parts[0].shape[2], vae.schedule.num_tokens
    if (len(shards), tokens) != (len(labels), length):
        raise DataError(
            f"{name} must have {length} tokens and a label for each image, got {tokens} tokens of {len(shards)} images "
            f"and {len(labels)} labels"
        )
    for what, end, parts in (("tokens", vae.vocab_size, shards.parts), ("labels", classes, [labels.numpy()])):
        low, high = min(int(part.min()) for part in parts), max(int(part.max()) for part in parts)
        if not 0 <= low <= high < end:
            raise DataError(f"{what} of {name} must be in 0..{end - 1}, got {low} to {high}")


def store_tokens(
    data: str | Path,
    tokenizer: str | Path,
    out: str | Path,
    recipe: VARRecipe | None = None,
    *,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> Path:
    """Writes the tokens of a data set's training and validation images; a stopped call goes on, ranks share the work.

    Args:
        data: as in `load_dataset`.
        tokenizer: name or folder.
        out: the folder.
        recipe: how images are read and augmented, and in how many copies; a training on these tokens must say the same.
            None: as they are, once.

    Raises:
        ValueError: the recipe encodes images online.
        DataError, CheckpointError: data or tokenizer cannot be used, or `out` cannot be written.
    """
    out, recipe = user_path(out), recipe or VARRecipe()
    if recipe.tokens != "cached" or str(data).startswith(TOKENS):
        raise ValueError(f"images are stored as tokens = cached, got {recipe.tokens} and the data {data}")
    with join(device, recipe.rank_timeout) as (ranks, device):
        vae = load_tokenizer(tokenizer).to(device).eval()
        splits = {}
        for images in open_splits(data, vae, recipe):
            cached = open_tokens(vae, images, recipe, out, progress=progress)
            assert isinstance(cached, CachedTokens)
            made = {
                "data": images.spec, "images": images.fingerprint(), "augment": images.augment, "seed": images.seed,
                "geometry": recipe.geometry, "decode": recipe.decode,
            }  # fmt: skip
            splits[images.split] = TokenSplit(cached.paths, images.labels, made)
        if ranks.rank == 0:
            write_token_set(out, vae, images.class_names, splits)
        ranks.wait()
    return out


def _in_range(spec: str, what: str, values: Tensor, end: int) -> None:
    low, high = int(values.min()), int(values.max())
    if not 0 <= low <= high < end:
        raise DataError(f"{what} of {spec} must be in 0..{end - 1}, got {low} to {high}: it is damaged")


def _labels(path: Path) -> np.ndarray:
    labels = map_array(path)
    if labels.ndim != 1 or labels.dtype != np.int32:
        raise ValueError(f"{path} must hold labels (N,) int32, got {labels.shape} {labels.dtype}")
    return labels.copy()


class TokenData(ImageDataset):
    """A split of stored tokens, as the images that they are of: labels and names, but no pixels.

    Args:
        spec: "tokens:FOLDER".
        vae: the tokenizer that made them.

    Raises:
        DataError: the folder holds no tokens, lacks the split, or another tokenizer made them.
    """

    def __init__(self, spec: str, split: str, vae: VQVAE) -> None:
        folder = user_path(spec.removeprefix(TOKENS))
        try:
            about: dict[str, Any] = read_json(folder / NAME)
            names = about["class_names"]
            if about["format"] != FORMAT:
                raise DataError(f"{folder / NAME} must be of format {FORMAT}, got {about['format']!r}")
            if about["tokenizer"] != digest_of(vae):
                raise DataError(
                    f"{spec} must be made by the tokenizer of the training, got other weights or scales: give the one "
                    "that made it, or make it anew with `var-ext tokens`"
                )
            mine = about["splits"][split]
            match names, mine:
                case [str(), *_], {"shards": list(), "copies": int(), "images": int(), "made": dict()}:
                    pass
                case _:
                    raise TypeError(
                        "class_names, shards, copies, images and made are lists, numbers and an object"
                    )
            foreign = [name for name in mine["shards"] if not is_file_name(name)]
            if foreign:
                raise DataError(f"{folder / NAME} must name shards in its folder, got {foreign[0]!r}")
            self.paths = [folder / name for name in mine["shards"]]
            self.copies, self.augment = int(mine["copies"]), float(mine["made"].get("augment", 0))
            self.labels = torch.from_numpy(_labels(folder / f"labels-{split}.npy")).long()
        except (CheckpointError, KeyError, TypeError, AttributeError, OSError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            lacking = "the split " + repr(split) if error.args == (split,) else str(error)
            raise DataError(
                f"{spec} must be tokens: and a folder that `var-ext tokens` wrote, but: {lacking}"
            ) from error
        self.made: dict[str, Any] = mine["made"]
        self.spec, self.split, self.class_names = spec, split, list(names)
        self.image_size = vae.schedule.side * vae.downsample
        self.about = json.dumps([names, mine, about["tokenizer"]], sort_keys=True)
        if len(self.labels) != mine["images"] or not len(self.labels):
            raise DataError(
                f"{spec} must have a label for each of its {mine['images']} images, got {len(self.labels)}"
            )
        _in_range(spec, "labels", self.labels, len(names))

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, index: int, epochs: Sequence[int]) -> Tensor:
        raise DataError(f"{self.spec} holds tokens, not images")

    def describe(self) -> Iterable[str]:
        return [self.about]


class StoredTokens(Tokens):
    """Tokens of a `TokenData`, mapped into memory; epoch e takes version (i + e) modulo copies of image i.

    Args:
        vae: of whose device batches are.

    Raises:
        CheckpointError: a shard is missing or broken.
        DataError: there are other numbers of images than labels, or, in `feed`, a token is out of range.
    """

    def __init__(self, vae: VQVAE, data: TokenData) -> None:
        self.data, self.device, self.vocab_size = data, next(vae.parameters()).device, vae.vocab_size
        self.shards = Shards(data.paths)
        if (len(self.shards), self.shards.copies) != (len(data), data.copies):
            raise DataError(
                f"{data.spec} must hold {len(data)} images in {data.copies} versions, got {len(self.shards)} in "
                f"{self.shards.copies}"
            )

    def feed(self, epoch: int, batches: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        for indices in batches:
            tokens = self.shards.rows(indices, (indices + epoch) % self.shards.copies)
            _in_range(self.data.spec, "tokens", tokens, self.vocab_size)
            yield tokens.to(self.device).long(), self.data.labels[indices].to(self.device)


def open_splits(data: str | Path, vae: VQVAE, recipe: VARRecipe) -> tuple[ImageDataset, ImageDataset]:
    """Images to train and to validate on, or stored tokens of such.

    Raises:
        DataError: they cannot be used.
        ValueError: stored tokens were made in another way than the recipe asks for.
    """
    side = vae.schedule.side * vae.downsample
    if not str(data).startswith(TOKENS):
        read: dict[str, Any] = {"geometry": recipe.geometry, "decode": recipe.decode}
        train = load_dataset(data, "train", side, augment=recipe.augment, seed=recipe.seed, **read)
        return train, load_dataset(data, "val", side, **read)
    stored = TokenData(str(data), "train", vae)
    asked = {
        "tokens": recipe.tokens, "copies": recipe.copies if recipe.augment else 1, "augment": recipe.augment,
        "geometry": recipe.geometry, "decode": recipe.decode,
    }  # fmt: skip
    found = {"tokens": "cached", "copies": stored.copies, **stored.made}
    for name, value in asked.items():
        if found.get(name, value) != value:
            raise ValueError(
                f"{data} was made with {name} {found[name]}: give --{name} {found[name]}, got {value}, or make other "
                "tokens with `var-ext tokens`"
            )
    return stored, TokenData(str(data), "val", vae)


def open_tokens(
    vae: VQVAE, data: ImageDataset, recipe: VARRecipe, cache: Path, *, progress: bool = True
) -> Tokens:
    """Tokens of one of `open_splits`: stored ones; or made on the way, online if the recipe says so of training images,
    else once, in `cache`.

    Raises:
        DataError, CheckpointError: see `StoredTokens` and `CachedTokens`.
    """
    if isinstance(data, TokenData):
        return StoredTokens(vae, data)
    batch = min(BATCH, recipe.micro_batch or recipe.batch_size)
    if recipe.tokens == "online" and data.split == "train":
        return OnlineTokens(vae, data, batch_size=batch, workers=recipe.workers)
    copies = recipe.copies if data.augment > 0 else 1
    return CachedTokens(
        vae, data, cache, copies=copies, batch_size=batch, workers=recipe.workers, progress=progress
    )
