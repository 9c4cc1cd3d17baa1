"""Images that are measured come in blocks whose memory is bounded."""

from __future__ import annotations

from pathlib import Path

import pytest

from var_ext.evaluation import image_sources
from var_ext.evaluation.image_sources import BLOCK, MOST, Images


@pytest.mark.parametrize(
    ("side", "wanted"), [(256, BLOCK), (1024, BLOCK), (4096, MOST // (3 * 4096**2)), (60_000, 1)]
)
def test_blocks_of_large_images_are_smaller(monkeypatch: pytest.MonkeyPatch, side: int, wanted: int) -> None:
    class Some(Images):
        name, count, size, order, key, path = "some", 600, (side, side), "", "", Path()

        def load(self, block: range) -> image_sources.np.ndarray:
            pytest.fail("no image is to be loaded")

    blocks = Some().blocks
    assert len(blocks[0]) == wanted and [i for block in blocks for i in block] == list(range(600))
