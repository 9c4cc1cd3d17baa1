"""The tokens of a data set, computed once with a trained tokenizer and kept on disk.

Each augmented copy has its own file, so a killed run keeps finished copies. The name is a digest of everything
the tokens depend on (weights of the tokenizer, images, split, augmentation) and the copy, so a
stale file is never read. Layout: `tokens` (N, L), int16 where the codes fit and int32 otherwise.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from var_ext.checkpoints import CheckpointError, load_tensors, save_tensors
from var_ext.data import DataError, ImageDataset
from var_ext.models import VQVAE

BATCH = 64  # images encoded at once, unless the caller wants fewer


def digest_of(vae: VQVAE) -> str:
    """Hex digest of constructor arguments and weights."""
    digest = hashlib.sha256(repr(sorted(vae.config.items())).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        if name == "quantize.ema_vocab_hit_SV":
            continue  # a training statistic, does not affect tokens
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def digests_of(train: ImageDataset, val: ImageDataset) -> dict[str, str]:
    """The data that a checkpoint pins; validation images too, since they select the best weights."""
    return {"training images": train.fingerprint(), "validation images": val.fingerprint()}


def cached_tokens(
    vae: VQVAE,
    data: ImageDataset,
    folder: Path,
    *,
    copies: int = 1,
    batch_size: int = BATCH,
    workers: int = 0,
    progress: bool = True,
) -> tuple[Tensor, Tensor]:
    """Tokens of `copies` augmented versions of every image, from the cache in `folder` where present.

    Args:
        vae: trained tokenizer in eval mode; its device does the work.
        data: the images; version c is `data.with_epoch(c)`.
        folder: of the cache files, written atomically.
        batch_size: images encoded at once.

    Returns:
        tokens (copies, N, L) int16 or int32 and labels (N,) int64, on the CPU.

    Raises:
        DataError: an image is broken.
        CheckpointError: the cache is broken (delete the file named in the message) or cannot be written.
    """
    key = hashlib.sha256(f"{digest_of(vae)} {data.fingerprint()}".encode()).hexdigest()
    bar = tqdm(total=copies * len(data), disable=not progress, unit="img", desc=f"tokens of {data.split}")
    found = []
    with bar:
        for copy in range(copies):
            path = folder / f"tokens-{data.split}-{key[:16]}-{copy}.safetensors"
            if not path.exists():
                version = data.with_epoch(copy)
                save_tensors(path, {"tokens": _encode(vae, version, batch_size, workers, bar)})
            found.append(_read(path, (len(data), vae.schedule.num_tokens)))
    return torch.stack(found), data.labels


@torch.no_grad()
def _encode(vae: VQVAE, data: ImageDataset, batch_size: int, workers: int, bar: Any) -> Tensor:
    dtype = torch.int16 if vae.vocab_size <= 2**15 else torch.int32
    device = next(vae.parameters()).device
    parts = []
    for images, _ in batches(data, torch.arange(len(data)).split(batch_size), workers):
        parts.append(torch.cat(vae.img_to_idxBl(images.to(device)), dim=1).to("cpu", dtype))  # (B, L)
        bar.update(len(images))
    return torch.cat(parts)


def _read(path: Path, shape: tuple[int, int]) -> Tensor:
    content = load_tensors(path)
    tokens = content.get("tokens")
    if tokens is None or tuple(tokens.shape) != shape:
        came = {name: tuple(tensor.shape) for name, tensor in content.items()}
        raise CheckpointError(f"wanted tokens of shape {shape} in {path}, got {came}; delete the file")
    return tokens


class _Batches(torch.utils.data.Dataset[tuple[Tensor, Tensor] | DataError]):
    """Whole batches as the items of a torch data set, so that workers collate them too."""

    def __init__(self, data: ImageDataset, chunks: Any) -> None:
        self.data, self.chunks = data, list(chunks)

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor] | DataError:
        try:
            return self.data.batch(self.chunks[i])
        except DataError as error:
            return error  # raised in a worker, it would reach the user as traceback text


def batches(data: ImageDataset, chunks: Any, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate over images (B, 3, S, S) and labels (B,) of the index tensors `chunks`, read by `workers`.

    Raises:
        DataError: an image is broken.
    """
    for batch in torch.utils.data.DataLoader(_Batches(data, chunks), batch_size=None, num_workers=workers):
        if isinstance(batch, DataError):
            raise batch
        yield batch
