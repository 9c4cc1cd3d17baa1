"""Tokens: the right ones, cached or online; shards that ranks share, that are read back, and never stale."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed

from var_ext.checkpoints import CheckpointError, load_tokenizer
from var_ext.data import ImageDataset, load_dataset
from var_ext.data.picture_dataset import PictureDataset
from var_ext.models import VQVAE
from var_ext.training import VARRecipe
from var_ext.training import tokens as module
from var_ext.training.stored_tokens import open_splits, open_tokens
from var_ext.training.tokens import CachedTokens, OnlineTokens, digest_of


@pytest.fixture
def vae(tokenizer: Path) -> VQVAE:
    return load_tokenizer(tokenizer)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD", 30)


def cached(vae: VQVAE, data: ImageDataset, folder: Path, **options: Any) -> CachedTokens:
    return CachedTokens(vae, data, folder, progress=False, **options)


def wanted(vae: VQVAE, data: ImageDataset, epoch: int, rows: Sequence[int] | torch.Tensor) -> torch.Tensor:
    return torch.cat(vae.img_to_idxBl(data.with_epoch(epoch).batch(rows)[0]), dim=1)


def test_tokens_are_those_of_the_augmented_images(vae: VQVAE, images: Path, tmp_path: Path) -> None:
    data = load_dataset(images, "train", 8, augment=1)
    tokens = cached(vae, data, tmp_path, copies=3)
    assert len(list(tmp_path.iterdir())) == 4  # 36 images, 10 a shard
    whole = [tokens.rows(torch.arange(36), copy) for copy in range(3)]
    for copy, found in enumerate(whole):
        assert found.shape == (36, 21) and found.dtype == torch.int16
        assert torch.equal(found.long(), wanted(vae, data, copy, range(36)))
    assert not torch.equal(whole[0], whole[1])
    rows = torch.tensor([35, 9, 10, 0])
    ((found, labels),) = tokens.feed(4, [rows])
    assert torch.equal(found, torch.stack([whole[(i + 4) % 3][i] for i in rows.tolist()]).long())
    assert torch.equal(labels, data.labels[rows])


@pytest.mark.parametrize("workers", [0, 1])
def test_online_tokens_are_those_of_the_epoch(vae: VQVAE, images: Path, workers: int) -> None:
    data = load_dataset(images, "train", 8, augment=1)
    tokens = OnlineTokens(vae, data, batch_size=5, workers=workers)
    batches = torch.randperm(36).split(12)
    for epoch in (0, 7):
        for rows, (found, labels) in zip(batches, tokens.feed(epoch, batches), strict=True):
            assert torch.equal(found, wanted(vae, data, epoch, rows)) and torch.equal(
                labels, data.labels[rows]
            )


def test_an_image_is_decoded_once_for_all_its_copies(
    vae: VQVAE, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, seen = PictureDataset.load, []

    def counted(self: PictureDataset, index: int, epochs: Sequence[int]) -> torch.Tensor:
        seen.append((index, tuple(epochs)))
        return read(self, index, epochs)

    monkeypatch.setattr(PictureDataset, "load", counted)
    cached(vae, load_dataset(images, "train", 8, augment=1), tmp_path, copies=3)
    assert seen == [(i, (0, 1, 2)) for i in range(36)]


def test_the_cache_is_read_and_not_made_again(
    vae: VQVAE, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load_dataset(images, "train", 8)
    first = cached(vae, data, tmp_path).rows(torch.arange(36), 0)
    monkeypatch.setattr(VQVAE, "img_to_idxBl", None)
    assert torch.equal(cached(vae, data, tmp_path).rows(torch.arange(36), 0), first)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_killed_tokenization_keeps_its_shards(
    vae: VQVAE, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load_dataset(images, "train", 8, augment=1)
    encode, seen = VQVAE.img_to_idxBl, 0

    def killed(*args: Any) -> list[torch.Tensor]:
        nonlocal seen
        seen += 1
        if seen == 6:
            raise KeyboardInterrupt
        return encode(*args)

    monkeypatch.setattr(VQVAE, "img_to_idxBl", killed)
    with pytest.raises(KeyboardInterrupt):
        cached(vae, data, tmp_path / "cut", copies=3, batch_size=15)  # a shard is two batches
    assert len(content(tmp_path / "cut")) == 2
    cached(vae, data, tmp_path / "cut", copies=3, batch_size=15)
    assert seen == 6 + 4  # 10 and 6 images were left, in batches of 5
    cached(vae, data, tmp_path / "whole", copies=3, batch_size=15)
    assert content(tmp_path / "cut") == content(tmp_path / "whole")


def rank_of_two(rank: int, vae: VQVAE, images: Path, out: Path) -> None:
    distributed.init_process_group("gloo", f"file://{out}-store", rank=rank, world_size=2)
    tokens = cached(vae, load_dataset(images, "train", 8, augment=1), out, copies=3, batch_size=15)
    assert tokens.rows(torch.arange(36), 2).shape == (36, 21)  # those of the other rank too
    distributed.destroy_process_group()


def test_ranks_write_the_same_bytes_as_one_process(vae: VQVAE, images: Path, tmp_path: Path) -> None:
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    context = torch.multiprocessing.get_context("fork")
    ranks = [context.Process(target=rank_of_two, args=(rank, vae, images, shared)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0, 0]
    cached(vae, load_dataset(images, "train", 8, augment=1), alone, copies=3, batch_size=15)
    assert content(shared) == content(alone)


def test_a_rank_makes_its_share_and_says_for_whom_it_waited(
    vae: VQVAE, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "rank_and_world", lambda: (1, 3))
    monkeypatch.setattr(module, "LOOK_EVERY", 0.01)
    data = load_dataset(images, "train", 8)
    monkeypatch.setattr(module, "SHARD", 6)  # six shards
    with pytest.raises(CheckpointError, match=r"lacks 4 of 6 shards, of rank 0, 2 of 3, and none came"):
        cached(vae, data, tmp_path, patience=0.02)
    assert sorted(path.stem[-1] for path in tmp_path.iterdir()) == ["1", "4"]


def test_batches_are_as_small_as_wanted(
    vae: VQVAE, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, encode, sizes = load_dataset(images, "train", 8, augment=1), VQVAE.img_to_idxBl, []

    def counting(model: VQVAE, batch: torch.Tensor) -> list[torch.Tensor]:
        sizes.append(len(batch))
        return encode(model, batch)

    monkeypatch.setattr(VQVAE, "img_to_idxBl", counting)
    cached(vae, data, tmp_path, copies=3, batch_size=16)
    assert sizes == 3 * [15, 15] + [15, 3]
    sizes.clear()
    cached(vae, data, tmp_path, copies=5, batch_size=4)  # fewer than the copies of an image
    assert set(sizes) == {4, 1}


def test_whatever_tokens_depend_on_makes_another_cache(vae: VQVAE, images: Path, tmp_path: Path) -> None:
    def files() -> int:
        return len(list(tmp_path.iterdir()))

    options: list[dict[str, Any]] = [
        {}, {"augment": 1}, {"augment": 1, "seed": 1}, {"geometry": "upright"}, {"decode": "fast"}
    ]  # fmt: skip
    for count, given in enumerate(options, start=1):
        cached(vae, load_dataset(images, "val", 8, **given), tmp_path)
        assert files() == count
    data = load_dataset(images, "val", 8)
    cached(vae, data, tmp_path, copies=2)
    assert files() == 6
    with torch.no_grad():
        vae.quantize.embedding.weight[0] += 1
    cached(vae, data, tmp_path)
    assert files() == 7


def test_the_digest_ignores_usage_statistics(vae: VQVAE) -> None:
    before = digest_of(vae)
    vae.quantize.ema_vocab_hit_SV += 1
    assert digest_of(vae) == before
    with torch.no_grad():
        next(vae.parameters()).view(-1)[0] += 1
    assert digest_of(vae) != before


def test_workers_read_the_same_images(vae: VQVAE, images: Path, tmp_path: Path) -> None:
    data = load_dataset(images, "train", 8, augment=1)
    cached(vae, data, tmp_path / "a", copies=2)
    cached(vae, data, tmp_path / "b", copies=2, workers=1)
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_a_broken_cache_is_named(vae: VQVAE, images: Path, tmp_path: Path) -> None:
    data = load_dataset(images, "val", 8)
    cached(vae, data, tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    np.save(path, np.zeros((1, 2, 3), np.int16))
    with pytest.raises(
        CheckpointError, match=r"wanted tokens int16 \(4, 1, 21\) in .*, got int16 .*delete the file"
    ):
        cached(vae, data, tmp_path)
    for cut in (whole[:-4], whole[:20], b""):
        path.write_bytes(cut)
        with pytest.raises(
            CheckpointError, match=f"{path.name} must be a shard of tokens, but: .*; delete the file"
        ):
            cached(vae, data, tmp_path)


def test_the_recipe_says_where_tokens_come_from(
    vae: VQVAE, images: Path, var_recipe: VARRecipe, tmp_path: Path
) -> None:
    train, val = open_splits(images, vae, var_recipe.with_options(tokens="online"))
    online = var_recipe.with_options(tokens="online")
    assert isinstance(open_tokens(vae, train, online, tmp_path), OnlineTokens)
    found = open_tokens(vae, val, online, tmp_path, progress=False)
    assert isinstance(found, CachedTokens) and len(found) == 4
    assert isinstance(open_tokens(vae, train, var_recipe, tmp_path, progress=False), CachedTokens)
