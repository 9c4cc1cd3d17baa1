"""The data of the ladder: tokens of avatars, no two images alike, held-out ones included."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from filelock import FileLock
from tqdm import tqdm

from var_ext.checkpoints import atomic_write, load_tokenizer
from var_ext.models import VQVAE
from var_ext.training.stored_tokens import NAME, TokenSplit, write_token_set
from var_ext.training.tokens import encode

RENDER = Path(__file__).resolve().parents[1] / "avatars" / "render.py"
# fun-emoji has about 900 portraits and dylan repeats them: neither can be drawn a hundred thousand times
STYLES = (
    "adventurer", "big-ears", "big-smile", "croodles", "lorelei", "micah", "miniavs", "notionists", "open-peeps",
    "personas", "pixel-art", "thumbs", "toon-head",
)  # fmt: skip
PART = 1260  # portraits of each style that are drawn at once: 16,380 images


def make_tokens(folder: Path, tokenizer: str, counts: dict[str, int], *, part: int = PART) -> Path:
    """Draws and encodes until there are as many different images as wanted; what is there is kept.

    Two images with equal tokens count as equal, whatever their pixels: a transformer could not tell them apart.

    Args:
        counts: images by split; "val" is made first, and "train" shares none with it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "making.lock"):
        if (folder / NAME).exists():
            return folder
        vae, seen, splits = load_tokenizer(tokenizer).eval(), set[bytes](), {}
        for split in ("val", "train"):
            splits[split] = _make_split(folder, vae, split, counts[split], seen, part)
        return write_token_set(folder, vae, STYLES, splits)


def first_of(folder: Path, whole: Path, tokenizer: str, images: int) -> Path:
    """A data set of the first images of another, with the same held-out ones."""
    if (folder / NAME).exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    splits, vae = {}, load_tokenizer(tokenizer)
    for split, most in (("train", images), ("val", sys.maxsize)):
        rows = np.concatenate([np.load(path) for path in _shards(whole, split)])[:most]
        labels = np.load(whole / f"labels-{split}.npy")[:most]
        splits[split] = _whole(folder, split, rows, labels, {"part of": whole.name})
    return write_token_set(folder, vae, STYLES, splits)


def random_tokens(folder: Path, tokenizer: str, images: int) -> Path:
    """Tokens of nothing, to measure how fast a training is."""
    folder.mkdir(parents=True, exist_ok=True)
    vae, generator = load_tokenizer(tokenizer), np.random.default_rng(0)
    splits = {}
    for split, count in (("train", images), ("val", 1)):
        rows = generator.integers(0, vae.vocab_size, (count, 1, vae.schedule.num_tokens), np.int32)
        splits[split] = _whole(
            folder, split, rows, generator.integers(0, len(STYLES), count), {"random": True}
        )
    return write_token_set(folder, vae, STYLES, splits)


def _whole(
    folder: Path, split: str, rows: np.ndarray, labels: np.ndarray, made: dict[str, Any]
) -> TokenSplit:
    path = folder / f"tokens-{split}-00000.npy"
    with atomic_write(path) as handle:
        np.save(handle, rows)
    return TokenSplit([path], torch.from_numpy(labels).long(), made)


def _shards(folder: Path, split: str) -> list[Path]:
    return sorted(folder.glob(f"tokens-{split}-*.npy"))


def _make_split(folder: Path, vae: VQVAE, split: str, wanted: int, seen: set[bytes], part: int) -> TokenSplit:
    """A split's shards, of at most a part each; `seen` has what came before, and gets what comes."""
    paths, labels, count, repeated = [], [], 0, 0
    with tqdm(total=wanted, desc=f"tokens of {split}", unit="img") as bar:
        for k in range(10 * wanted):
            shard, beside = (folder / f"{what}-{split}-{k:05d}.npy" for what in ("tokens", "labels"))
            if not shard.exists():
                _write(shard, beside, vae, split, k, part, seen, wanted - count)
            tokens, mine = np.load(shard)[:, 0], np.load(beside)
            seen.update(map(_key, tokens))  # of a shard that was there
            repeated += part * len(STYLES) - len(tokens)
            if len(tokens):
                paths.append(shard)
                labels.append(mine)
            count += len(tokens)
            bar.update(len(tokens))
            if count >= wanted:
                break
    made = {"styles": ",".join(STYLES), "left out as repeated, or not needed": repeated}
    return TokenSplit(paths, torch.from_numpy(np.concatenate(labels)).long(), made)


def _write(
    shard: Path, beside: Path, vae: VQVAE, split: str, k: int, part: int, seen: set[bytes], most: int
) -> None:
    tokens: list[np.ndarray] = []
    labels = []
    for row, label in _drawn(shard.parent, vae, split, k * part, part):
        key = _key(row)
        if key not in seen and len(tokens) < most:
            seen.add(key)
            tokens.append(row)
            labels.append(label)
    kind = np.int16 if vae.vocab_size <= 2**15 else np.int32
    rows = np.array(tokens, kind).reshape(len(tokens), 1, vae.schedule.num_tokens)
    for path, array in ((beside, np.array(labels, np.int32)), (shard, rows)):  # the shard last
        with atomic_write(path) as handle:
            np.save(handle, array)


def _drawn(folder: Path, vae: VQVAE, split: str, first: int, count: int) -> Iterator[tuple[np.ndarray, int]]:
    """Tokens (L,) and label of each of `count` portraits of each style, from index `first` on; styles take turns."""
    file = folder / f"drawn-{split}.npz"
    side = vae.schedule.side * vae.downsample
    words = [
        f"--{split}",
        str(count),
        "--first",
        str(first),
        "--size",
        str(side),
        "--styles",
        ",".join(STYLES),
    ]
    if subprocess.run(
        [sys.executable, str(RENDER), "--out", str(file), *words], stdout=subprocess.DEVNULL
    ).returncode:
        raise click.ClickException("the pictures could not be drawn; what is lacking is said above")
    with np.load(file) as arrays:
        pixels, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
    file.unlink()
    for start in range(0, len(pixels), 256):
        images = torch.from_numpy(pixels[start : start + 256]).permute(0, 3, 1, 2).float() / 127.5 - 1
        tokens = encode(vae, images).numpy()
        yield from zip(tokens, labels[start : start + 256].tolist(), strict=True)


def _key(row: np.ndarray) -> bytes:
    return hashlib.blake2b(row.astype(np.int32).tobytes(), digest_size=12).digest()
