"""The tokens of a data set, computed once with a trained tokenizer and kept on disk.

The name of a cache file is a digest of everything its tokens depend on (weights of the tokenizer, images,
split, augmentation, copies), so a stale cache is never read. Layout: `tokens` (copies, N, L) int32 and
`labels` (N,) int64.
"""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from var_ext.data import ImageDataset
from var_ext.files import CheckpointError, load_tensors, save_tensors
from var_ext.models import VQVAE

BATCH = 64


def digest_of(vae: VQVAE) -> str:
    """Hex digest of constructor arguments and weights."""
    digest = hashlib.sha256(repr(sorted(vae.config.items())).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        if name == "quantize.ema_vocab_hit_SV":
            continue  # a statistic of its training, without influence on tokens
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def cached_tokens(
    vae: VQVAE, data: ImageDataset, folder: Path, *, copies: int = 1, workers: int = 0, progress: bool = True
) -> tuple[Tensor, Tensor]:
    """Tokens of `copies` augmented versions of every image, from the cache in `folder` if it is there.

    Args:
        vae: trained tokenizer in eval mode; its device does the work.
        data: the images; version c is `data.with_epoch(c)`.
        folder: where the cache file lies or is written, atomically.

    Returns:
        tokens (copies, N, L) int32 and labels (N,) int64, on the CPU.

    Raises:
        CheckpointError: the cache is broken (delete the file that the message names) or cannot be written.
    """
    key = hashlib.sha256(f"{digest_of(vae)} {data.fingerprint()} {copies}".encode()).hexdigest()
    path = folder / f"tokens-{data.split}-{key[:16]}.safetensors"
    if not path.exists():
        _write(path, key, vae, data, copies, workers, progress)
    content = load_tensors(path)
    shape = (copies, len(data), vae.schedule.num_tokens)
    tokens, labels = content.get("tokens"), content.get("labels")
    if tokens is None or labels is None or tuple(tokens.shape) != shape:
        came = {name: tuple(tensor.shape) for name, tensor in content.items()}
        raise CheckpointError(
            f"wanted tokens of shape {shape} and labels in {path}, got {came}; delete the file"
        )
    return tokens, labels


def _write(
    path: Path, key: str, vae: VQVAE, data: ImageDataset, copies: int, workers: int, progress: bool
) -> None:
    tokens = torch.empty(copies, len(data), vae.schedule.num_tokens, dtype=torch.int32)
    bar = tqdm(total=copies * len(data), disable=not progress, unit="img", desc=f"tokens of {data.split}")
    with bar, torch.no_grad():
        for copy in range(copies):
            chunks = torch.arange(len(data)).split(BATCH)
            for where, (images, _) in zip(
                chunks, batches(data.with_epoch(copy), chunks, workers), strict=True
            ):
                found = vae.img_to_idxBl(images.to(next(vae.parameters()).device))
                tokens[copy, where] = torch.cat(found, dim=1).to("cpu", torch.int32)  # (B, L)
                bar.update(len(where))
    save_tensors(path, {"tokens": tokens, "labels": data.labels.clone()}, {"key": key})


class _Batches(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Whole batches as the items of a torch data set, so that workers collate them too."""

    def __init__(self, data: ImageDataset, chunks: Any) -> None:
        self.data, self.chunks = data, list(chunks)

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.data.batch(self.chunks[i])


def batches(data: ImageDataset, chunks: Any, workers: int) -> Any:
    """Iterate over images (B, 3, S, S) and labels (B,) of the index tensors `chunks`, read by `workers`."""
    return torch.utils.data.DataLoader(_Batches(data, chunks), batch_size=None, num_workers=workers)
