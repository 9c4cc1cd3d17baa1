"""A data set and recipes so small that a whole training takes a second."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.threads import threads
from var_ext.training import TokenizerRecipe, VARRecipe, train_tokenizer, train_var


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small are slower on more threads, and sums keep one order."""
    with threads(1):
        yield


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of twenty 12 x 12 images: bright above or below a random row, with noise."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for label in range(2):
        (root / f"class{label}").mkdir()
        for i in range(20):
            above = (np.arange(12) < rng.integers(3, 9))[:, None, None] ^ bool(label)
            pixels = 200 * above + rng.integers(0, 40, (12, 12, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(root / f"class{label}" / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def tokenizer_recipe() -> TokenizerRecipe:
    return TokenizerRecipe(
        epochs=6, batch_size=12, augment=1.0, ema=0.9, vocab_size=16, z_channels=4, ch=32, ch_mult=(1, 1),
        patch_nums=(1, 2, 4), share_quant_resi=2, lr=1e-3, restart_every=4, checkpoint_every=2, log_every=1,
        weight_perceptual=0.0,
    )  # fmt: skip


@pytest.fixture(scope="session")
def var_recipe() -> VARRecipe:
    return VARRecipe(
        epochs=6, batch_size=12, augment=1.0, copies=2, ema=0.9, select="best",
        depth=2, embed_dim=32, num_heads=2, drop_rate=0.1, drop_path_rate=0.1, base_lr=0.1,
        checkpoint_every=2, log_every=1,
    )  # fmt: skip


@pytest.fixture(scope="session")
def tokenizer(
    images: Path, tokenizer_recipe: TokenizerRecipe, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Folder of a trained tokenizer."""
    return train_tokenizer(images, tmp_path_factory.mktemp("tokenizer"), tokenizer_recipe, progress=False)


@pytest.fixture(scope="session")
def trained(
    images: Path, tokenizer: Path, var_recipe: VARRecipe, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return train_var(images, tokenizer, tmp_path_factory.mktemp("var"), var_recipe, progress=False)


@pytest.fixture(scope="session")
def other_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of stripes, of other widths each."""
    root = tmp_path_factory.mktemp("stripes")
    for label in range(3):
        (root / f"stripes{label}").mkdir()
        for i in range(12):
            bright = (np.arange(12) + i) // (label + 1) % 2
            pixels = np.broadcast_to(np.uint8(200 * bright)[:, None, None], (12, 12, 3))
            Image.fromarray(np.ascontiguousarray(pixels)).save(root / f"stripes{label}" / f"{i}.png")
    return root
