"""Where the tokens of a training come from: `CachedTokens`, made once, or `OnlineTokens`, of fresh crops each epoch.

The cache is a row of shards on disk, each with the tokens of some images in all their augmented copies. Ranks share the
work a shard at a time, a killed run keeps the finished ones, and training maps them into memory, once for all ranks.
The name of a shard is a digest of everything the tokens depend on (weights of the tokenizer, images, split,
augmentation, copies), so a stale one is never read; its bytes do not depend on the number of ranks.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from var_ext.arrays import map_array
from var_ext.checkpoints import CheckpointError, atomic_write
from var_ext.data import ImageDataset, ImageLoader
from var_ext.export import rank_and_world, wait_for_files
from var_ext.models import VAR, VQVAE

BATCH = 64  # images encoded at once, unless the caller wants fewer
SHARD = 16_384  # augmented images of a shard: 22 MB at 256 px
PATIENCE = 3600.0  # seconds without a new shard of another rank
LOOK_EVERY = 0.5  # seconds


def digest_of(model: VQVAE | VAR) -> str:
    """Hex digest of constructor arguments and weights."""
    digest = hashlib.sha256(repr(sorted(model.config.items())).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if name == "quantize.ema_vocab_hit_SV":
            continue  # a training statistic, does not affect tokens
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def digests_of(train: ImageDataset, val: ImageDataset) -> dict[str, str]:
    """The data that a checkpoint pins; validation images too, since they select the best weights."""
    return {"training images": train.fingerprint(), "validation images": val.fingerprint()}


class Tokens(ABC):
    """Tokens of the images of a data set, for a training.

    Attributes:
        data: the images.
    """

    data: ImageDataset

    def __len__(self) -> int:
        return len(self.data)

    @abstractmethod
    def feed(self, epoch: int, batches: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over tokens (B, L) int64 and labels (B,) int64, on the device of the tokenizer.

        Args:
            epoch: which augmented version of each image.
            batches: indices (B,) int64 of each batch.

        Raises:
            DataError: an image is broken.
        """


class OnlineTokens(Tokens):
    """Each batch is read and encoded when it is needed: a fresh crop of an image in each epoch, as published.

    Args:
        vae: trained tokenizer in eval mode; its device does the work.
        data: the images; the version of epoch e is `data.with_epoch(e)`.
        batch_size: images encoded at once.
        workers: processes that read images.
    """

    def __init__(self, vae: VQVAE, data: ImageDataset, *, batch_size: int = BATCH, workers: int = 0) -> None:
        self.vae, self.data, self.batch_size = vae, data, batch_size
        self.device = next(vae.parameters()).device
        self.loader = ImageLoader(data, workers=workers, device=self.device)

    def feed(self, epoch: int, batches: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self.loader.batches(batches, [epoch]):
            yield encode(self.vae, images[:, 0], self.batch_size), labels


class Shards:
    """Files of tokens (n, copies, L), mapped into memory as one array.

    Args:
        paths: in order.
        shapes, dtype: what they must hold; None: any integers, of as many copies and tokens each.

    Attributes:
        copies: versions of each image.

    Raises:
        CheckpointError: a file is missing, broken, or holds something else.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        shapes: Sequence[tuple[int, int, int]] | None = None,
        dtype: np.dtype | None = None,
    ) -> None:
        self.parts = [
            self._read(path, shape, dtype)
            for path, shape in zip(paths, shapes if shapes else repeat(None, len(paths)), strict=True)
        ]
        kinds = {(part.shape[1:], part.dtype) for part in self.parts}
        if len(kinds) != 1:
            raise CheckpointError(
                f"shards of tokens must be of one shape, got {sorted(map(str, kinds)) or 'none'}"
            )
        self.copies = self.parts[0].shape[1]
        self.ends = np.cumsum([len(part) for part in self.parts])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def rows(self, indices: Tensor, versions: Tensor | int) -> Tensor:
        """Tokens (B, L) of one version of each image, on the CPU."""
        where = np.searchsorted(self.ends, indices.numpy(), side="right")
        chosen = torch.as_tensor(versions).expand(len(indices)).tolist()
        rows = zip(where.tolist(), indices.tolist(), chosen, strict=True)
        return torch.from_numpy(
            np.stack([self.parts[p][i - self.ends[p], version] for p, i, version in rows])
        )

    def _read(self, path: Path, shape: tuple[int, int, int] | None, dtype: np.dtype | None) -> np.ndarray:
        try:
            tokens = map_array(path)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{path} must be a shard of tokens, but: {error}; delete the file"
            ) from error
        fits = tokens.ndim == 3 and tokens.dtype in (np.int16, np.int32) and min(tokens.shape) > 0
        if shape is not None:
            fits = tokens.shape == shape and tokens.dtype == dtype
        if not fits:
            wanted = "int16 or int32 (n, copies, L)" if shape is None else f"{dtype} {shape}"
            came = f"{tokens.dtype} {tokens.shape}"
            raise CheckpointError(f"wanted tokens {wanted} in {path}, got {came}; delete the file")
        return tokens


class CachedTokens(Tokens):
    """Tokens of `copies` augmented versions of every image, from the shards in a folder, made where they are missing.

    With ranks (`rank_and_world`), each makes its share of the missing shards and waits for the others'. Epoch e takes
    version (i + e) modulo `copies` of image i.

    Args:
        vae: trained tokenizer in eval mode; its device does the work.
        data: the images; version c is `data.with_epoch(c)`.
        folder: of the shards, written atomically and shared by the ranks.
        copies: versions of each image.
        batch_size: images encoded at once.
        workers: processes that read images.
        progress: show a progress bar, on rank 0.
        patience: seconds to wait for the next shard of another rank.

    Raises:
        DataError: an image is broken.
        CheckpointError: a shard is broken (delete the file named in the message) or cannot be written, or a rank gave
            up.
    """

    def __init__(
        self,
        vae: VQVAE,
        data: ImageDataset,
        folder: Path,
        *,
        copies: int = 1,
        batch_size: int = BATCH,
        workers: int = 0,
        progress: bool = True,
        patience: float = PATIENCE,
    ) -> None:
        self.data, self.copies, self.device = data, copies, next(vae.parameters()).device
        self.per_shard = max(1, SHARD // copies)
        self.dtype = np.dtype(np.int16 if vae.vocab_size <= 2**15 else np.int32)
        key = hashlib.sha256(
            f"{digest_of(vae)} {data.fingerprint()} {copies} {self.per_shard}".encode()
        ).hexdigest()
        parts = torch.arange(len(data)).split(self.per_shard)
        paths = [folder / f"tokens-{data.split}-{key[:16]}-{i:05d}.npy" for i in range(len(parts))]
        rank, world = rank_and_world()
        missing = [i for i in range(rank, len(parts), world) if not paths[i].exists()]
        with tqdm(
            total=copies * sum(len(parts[i]) for i in missing),
            disable=not progress or rank > 0, unit="img", desc=f"tokens of {data.split}",
        ) as bar:  # fmt: skip
            # one loader for all shards, whose workers read ahead into the next
            rows = max(1, batch_size // copies)
            loader = ImageLoader(data, workers=workers if missing else 0, device=self.device)
            batches = loader.batches([each for i in missing for each in parts[i].split(rows)], range(copies))
            for i in missing:
                self._write(paths[i], len(parts[i]), vae, batches, batch_size, bar)
        wait_for_files(paths, world, patience, what="shards", every=LOOK_EVERY)
        self.paths, length = paths, vae.schedule.num_tokens
        self.shards = Shards(paths, [(len(part), copies, length) for part in parts], self.dtype)

    def rows(self, indices: Tensor, versions: Tensor | int) -> Tensor:
        """Tokens (B, L) of one version of each image, int16 or int32, on the CPU."""
        return self.shards.rows(indices, versions)

    def feed(self, epoch: int, batches: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        for indices in batches:
            tokens = self.rows(indices, (indices + epoch) % self.copies)
            yield tokens.to(self.device).long(), self.data.labels[indices].to(self.device)

    def _write(
        self, path: Path, count: int, vae: VQVAE, batches: Iterator[Any], batch_size: int, bar: Any
    ) -> None:
        """A shard, batch by batch: a rank holds no more than one batch of it."""
        shape = (count, self.copies, vae.schedule.num_tokens)
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": shape}
        with atomic_write(path) as handle:
            np.lib.format.write_array_header_1_0(handle, header)
            while count:
                images = next(batches)[0]  # (B, copies, 3, S, S)
                tokens = encode(vae, images.flatten(0, 1), batch_size).cpu().numpy().astype(self.dtype)
                handle.write(tokens.tobytes())
                count -= len(images)
                bar.update(len(tokens))


@torch.no_grad()
def encode(vae: VQVAE, images: Tensor, batch_size: int = BATCH) -> Tensor:
    """Tokens of images, `batch_size` at once: (B, 3, S, S) in [-1, 1] -> (B, L) int64."""
    return torch.cat([torch.cat(vae.img_to_idxBl(part), dim=1) for part in images.split(batch_size)])
