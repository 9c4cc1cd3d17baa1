"""The digits: a split that never moves, images in range, augmentation as a pure function."""

import hashlib
import sys

import pytest
import torch

from var_ext.data import SPLITS, DataError, digits, digits_split, load_dataset


def test_the_split_is_pinned_forever() -> None:
    text = ";".join(f"{split}:" + ",".join(map(str, digits_split(split))) for split in SPLITS)
    # Changing this digest makes every published figure on the test split incomparable.
    assert (
        hashlib.sha256(text.encode()).hexdigest()
        == "32b3387c0531bdceb8b68fd1b47fe5017ad83dbe803b1460ac029df7c10903a6"
    )


def test_the_splits_are_disjoint_complete_and_stratified() -> None:
    parts = {split: digits_split(split) for split in SPLITS}
    assert {split: len(part) for split, part in parts.items()} == {"train": 1197, "val": 200, "test": 400}
    assert sorted(i for part in parts.values() for i in part) == list(range(1797))
    for split, count in (("val", 20), ("test", 40)):
        assert load_dataset("digits", split, 8).labels.bincount().tolist() == [count] * 10


def test_labels_belong_to_the_images() -> None:
    from sklearn.datasets import load_digits

    data, bunch = load_dataset("digits", "test", 8), load_digits()
    image, label = data[5]
    original = digits_split("test")[5]
    # at 8 px the enlargement is the identity up to rounding of the bicubic weights
    torch.testing.assert_close(image[0], torch.tensor(bunch.images[original], dtype=torch.float32) / 8 - 1)
    assert label == bunch.target[original]


@pytest.mark.parametrize("augment", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("size", [8, 32, 33])
def test_images_have_three_equal_channels_in_range(size: int, augment: float) -> None:
    images, labels = load_dataset("digits", "train", size, augment=augment).batch(range(20))
    assert (
        images.shape == (20, 3, size, size) and images.dtype == torch.float32 and labels.dtype == torch.int64
    )
    assert images.min() >= -1 and images.max() <= 1 and images.std() > 0.3
    assert torch.equal(images[:, 0], images[:, 1]) and torch.equal(images[:, 0], images[:, 2])


def test_augmentation_is_a_pure_function_of_seed_epoch_and_index() -> None:
    data = load_dataset("digits", "train", 16, augment=1.0, seed=3)
    again = load_dataset("digits", "train", 16, augment=1.0, seed=3)
    torch.rand(7)  # the global generator plays no part
    assert torch.equal(data.with_epoch(4)[9][0], again.with_epoch(4)[9][0])
    assert torch.equal(data[9][0], data.with_epoch(0)[9][0])
    others = [data.with_epoch(5), load_dataset("digits", "train", 16, augment=1.0, seed=4).with_epoch(4)]
    for other in others:
        assert not torch.equal(data.with_epoch(4)[9][0], other[9][0])


def test_a_batch_holds_the_same_images_as_single_items() -> None:
    data = load_dataset("digits", "train", 16, augment=1.0).with_epoch(2)
    images, labels = data.batch(torch.tensor([7, 3]))
    for row, index in enumerate((7, 3)):
        # the resampling of a batch may round differently from that of one image
        torch.testing.assert_close(images[row], data[index][0], atol=1e-5, rtol=0)
        assert labels[row] == data[index][1]


def test_augmentation_is_the_plain_image_where_nothing_moves() -> None:
    originals = load_dataset("digits", "train", 8).originals[:4]  # type: ignore[attr-defined]
    still = torch.eye(2, 3).expand(4, 2, 3)
    # two implementations of the same bicubic sum in fp32
    torch.testing.assert_close(
        digits.enlarge(originals, 32, still), digits.enlarge(originals, 32), atol=1e-5, rtol=0
    )


def test_augmentation_is_small() -> None:
    plain = load_dataset("digits", "train", 32).batch(range(100))[0]
    moved = load_dataset("digits", "train", 32, augment=1.0).batch(range(100))[0]
    shuffled = plain.roll(1, 0)
    # an augmented digit stays far nearer to its original than to another digit
    assert (moved - plain).square().mean() < 0.5 * (moved - shuffled).square().mean()


def test_missing_scikit_learn_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    digits._read.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"pip install 'var_ext\[digits\]'"):
        load_dataset("digits", "train", 8)


@pytest.mark.parametrize(
    ("split", "size", "message"), [("valid", 8, "one of train, val, test"), ("val", 0, "got 0")]
)
def test_bad_arguments(split: str, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_dataset("digits", split, size)


def test_an_index_out_of_range_is_named() -> None:
    with pytest.raises(IndexError, match=r"0\.\.199, got 200"):
        load_dataset("digits", "val", 8)[200]
