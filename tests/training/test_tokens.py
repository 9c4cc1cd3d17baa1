"""The token cache: right tokens, read back, and never stale."""

from pathlib import Path
from typing import Any

import pytest
import torch

from var_ext.checkpoints import CheckpointError, load_tokenizer, save_tensors
from var_ext.data import load_dataset
from var_ext.models import VQVAE
from var_ext.training.tokens import cached_tokens, digest_of


@pytest.fixture
def vae(tokenizer: Path) -> VQVAE:
    return load_tokenizer(tokenizer)


def test_tokens_are_those_of_the_augmented_images(vae: VQVAE, images: Path, tmp_path: Path) -> None:
    data = load_dataset(images, "train", 8, augment=1)
    tokens, labels = cached_tokens(vae, data, tmp_path, copies=3, progress=False)
    assert tokens.shape == (3, 36, 21) and tokens.dtype == torch.int16 and torch.equal(labels, data.labels)
    for copy in range(3):
        wanted = torch.cat(vae.img_to_idxBl(data.with_epoch(copy).batch(range(36))[0]), dim=1)
        assert torch.equal(tokens[copy].long(), wanted)
    assert not torch.equal(tokens[0], tokens[1])


def test_the_cache_is_read_and_not_made_again(
    vae: VQVAE, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load_dataset(images, "val", 8)
    first, _ = cached_tokens(vae, data, tmp_path, progress=False)
    monkeypatch.setattr(VQVAE, "img_to_idxBl", None)
    assert torch.equal(cached_tokens(vae, data, tmp_path, progress=False)[0], first)


def test_a_killed_tokenization_keeps_its_copies(
    vae: VQVAE, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load_dataset(images, "val", 8, augment=1)
    encode, seen = VQVAE.img_to_idxBl, 0

    def killed(*args: Any) -> list[torch.Tensor]:
        nonlocal seen
        seen += 1
        if seen == 3:
            raise KeyboardInterrupt
        return encode(*args)

    monkeypatch.setattr(VQVAE, "img_to_idxBl", killed)
    with pytest.raises(KeyboardInterrupt):
        cached_tokens(vae, data, tmp_path, copies=3, progress=False)
    assert len(list(tmp_path.iterdir())) == 2
    again = cached_tokens(vae, data, tmp_path, copies=3, progress=False)[0]
    assert seen == 4 and torch.equal(
        again, cached_tokens(vae, data, tmp_path / "whole", copies=3, progress=False)[0]
    )


def test_batches_are_as_small_as_wanted(
    vae: VQVAE, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, encode, sizes = load_dataset(images, "train", 8), VQVAE.img_to_idxBl, []

    def counting(model: VQVAE, batch: torch.Tensor) -> list[torch.Tensor]:
        sizes.append(len(batch))
        return encode(model, batch)

    monkeypatch.setattr(VQVAE, "img_to_idxBl", counting)
    cached_tokens(vae, data, tmp_path, batch_size=16, progress=False)
    assert sizes == [16, 16, 4]


def test_whatever_tokens_depend_on_makes_another_cache(vae: VQVAE, images: Path, tmp_path: Path) -> None:
    def files() -> int:
        return len(list(tmp_path.iterdir()))

    data = load_dataset(images, "val", 8)
    cached_tokens(vae, data, tmp_path, progress=False)
    assert files() == 1
    variants = [load_dataset(images, "val", 8, augment=1), load_dataset(images, "val", 8, augment=1, seed=1)]
    for count, other in enumerate(variants, start=2):
        cached_tokens(vae, other, tmp_path, progress=False)
        assert files() == count
    cached_tokens(vae, data, tmp_path, copies=2, progress=False)  # a file a copy, of which the first is there
    assert files() == 4
    with torch.no_grad():
        vae.quantize.embedding.weight[0] += 1
    cached_tokens(vae, data, tmp_path, progress=False)
    assert files() == 5


def test_the_digest_ignores_usage_statistics(vae: VQVAE) -> None:
    before = digest_of(vae)
    vae.quantize.ema_vocab_hit_SV += 1
    assert digest_of(vae) == before
    with torch.no_grad():
        next(vae.parameters()).view(-1)[0] += 1
    assert digest_of(vae) != before


def test_workers_read_the_same_images(vae: VQVAE, images: Path, tmp_path: Path) -> None:
    data = load_dataset(images, "val", 8, augment=1)
    alone, _ = cached_tokens(vae, data, tmp_path / "a", progress=False)
    helped, _ = cached_tokens(vae, data, tmp_path / "b", workers=1, progress=False)
    assert torch.equal(alone, helped)


def test_a_broken_cache_is_named(vae: VQVAE, images: Path, tmp_path: Path) -> None:
    data = load_dataset(images, "val", 8)
    cached_tokens(vae, data, tmp_path, progress=False)
    (path,) = tmp_path.iterdir()
    save_tensors(path, {"tokens": torch.zeros(1, 2, 3)})
    with pytest.raises(CheckpointError, match=r"wanted tokens of shape \(4, 21\).*got .*delete the file"):
        cached_tokens(vae, data, tmp_path, progress=False)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(CheckpointError, match=path.name):
        cached_tokens(vae, data, tmp_path, progress=False)
