"""Images as pictures: `to_pil`, `show` and what notebooks and files are given; stages, coarse to fine."""

from __future__ import annotations

import io
from base64 import b64decode
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.test_cli import NAMES, run
from tests.tiny import SCALES, tiny
from var_ext import Grid, Sampler, save_model, show, to_pil
from var_ext.grid import labelled_grid


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    return Sampler(*tiny(), class_names=NAMES, precision="fp32")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tmp_path_factory.mktemp("models") / "tiny", *tiny(), class_names=NAMES))


def test_to_pil_rounds_and_clips() -> None:
    images = torch.tensor([-1.0, 0.0, 0.499 / 255, 0.501 / 255, 1.0, 2.0]).expand(2, 3, 1, 6)
    first, second = to_pil(images)
    assert first.mode == "RGB" and first.size == (6, 1)
    assert np.asarray(first)[0, :, 0].tolist() == [0, 0, 0, 1, 255, 255]
    assert first.tobytes() == second.tobytes()


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 1, 8, 8), (8, 8)])
def test_to_pil_refuses(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^images must have shape \(N, 3, H, W\), got \("):
        to_pil(torch.zeros(shape))


def test_stages_are_those_of_scales_and_end_at_the_image(sampler: Sampler) -> None:
    labels, seeds = [1, 2], [3, 4]
    stages = list(sampler.stages(labels, seeds, cfg=1.5))
    assert len(stages) == len(SCALES) and not stages[0].is_inference()
    assert torch.equal(torch.stack(stages), sampler.scales(labels, seeds, cfg=1.5))
    assert torch.equal(stages[-1], sampler(labels, seeds, cfg=1.5))


def test_stages_check_before_they_draw(sampler: Sampler) -> None:
    with pytest.raises(ValueError, match="top_p"):
        sampler.stages([0], [0], top_p=2)


def test_stages_drawn_in_turns_are_those_drawn_alone(sampler: Sampler) -> None:
    alone = [sampler.scales(label, 4) for label in (1, 2)]
    both = [[], []]
    for pair in zip(sampler.stages(1, 4), sampler.stages(2, 4), strict=True):
        for seen, stage in zip(both, pair, strict=True):
            seen.append(stage)
        sampler([3], [5])  # a whole call between two scales
    assert all(torch.equal(torch.stack(mine), wanted) for mine, wanted in zip(both, alone, strict=True))


def test_stages_can_be_left(sampler: Sampler) -> None:
    """A generator that is closed in the middle leaves nothing behind that changes the next image."""
    wanted = sampler([1], [2])
    left = sampler.stages([3], [4])
    next(left)
    left.close()  # type: ignore[attr-defined]
    assert torch.equal(sampler([1], [2]), wanted)


@pytest.mark.parametrize("paste", [False, True])
def test_stages_of_an_edit_end_at_the_edit(sampler: Sampler, paste: bool) -> None:
    image, mask = sampler([1], [2])[0], torch.zeros(8, 8, dtype=torch.bool)
    mask[:4] = True
    stages = list(sampler.edit_stages(image, mask, 3, [5, 6], paste=paste))
    assert len(stages) == len(SCALES)
    assert torch.equal(stages[-1], sampler.edit(image, mask, 3, [5, 6], paste=paste))
    assert not paste or all(
        torch.equal(stage[:, :, 4:], image[:, 4:].expand(2, -1, -1, -1)) for stage in stages
    )


def test_a_picture_for_notebooks_and_files(sampler: Sampler, tmp_path: Path) -> None:
    images = sampler([1, 5], [3, 4])
    grid = show(images, [1, 5], names=sampler.class_names)
    assert isinstance(grid, Grid) and not grid.frames
    html = grid._repr_html_()
    shown = Image.open(io.BytesIO(b64decode(html.split("base64,")[1].split('"')[0])))
    grid.save(tmp_path / "grid.png")
    for picture in (shown, Image.open(io.BytesIO(grid._repr_png_())), Image.open(tmp_path / "grid.png")):
        assert picture.format == "PNG" and picture.convert("RGB").tobytes() == grid.to_pil().tobytes()
    assert grid.to_pil().tobytes() != show(images, [1, 2], names=sampler.class_names).to_pil().tobytes()
    assert type(images) is torch.Tensor  # as ever


def test_pixels_of_a_picture_are_those_of_the_images() -> None:
    images = torch.rand(3, 3, 64, 70)
    picture = np.asarray(show(images, columns=2).to_pil())
    for image, (row, column) in zip(to_pil(images), [(0, 0), (0, 1), (1, 0)], strict=True):
        top, left = 4 + row * 68, 4 + column * 74
        assert (picture[top : top + 64, left : left + 70] == np.asarray(image)).all()


def test_a_long_name_stays_above_its_image() -> None:
    """What lies left and right of the image's columns stays white."""
    picture = np.asarray(show(torch.zeros(1, 3, 64, 64), "a name that is much longer than an image").to_pil())
    assert (picture[:, :4] == 255).all() and (picture[:, -4:] == 255).all()
    assert (picture[:18] < 128).any()


def test_stages_are_animated_and_laid_out(sampler: Sampler, tmp_path: Path) -> None:
    stages = sampler.scales([1, 2], [3, 4])
    grid = show(stages, [1, 2], names=NAMES, scales=SCALES)
    grid.save(tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as animation:
        assert animation.n_frames == len(SCALES) and animation.info["loop"] == 0  # type: ignore[attr-defined]
        assert animation.size == grid.frames[0].size
    assert "data:image/gif" in grid._repr_html_()
    columns = [f"{side} x {side}" for side in SCALES]
    wanted = labelled_grid(stages.transpose(0, 1).flatten(0, 1), [NAMES[1], NAMES[2]], columns)
    assert grid.to_pil().tobytes() == wanted.tobytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": torch.zeros(0, 3, 8, 8)}, "at least one, got"),
        ({"images": torch.zeros(2, 1, 8, 8)}, "images must have shape"),
        ({"labels": [1, 2, 3]}, "labels must be one or 2, one an image, got 3"),
        ({"labels": 6, "names": NAMES}, r"labels must be in 0\.\.5, got 6"),
        ({"columns": 0}, "columns must be at least 1, got 0"),
        ({"images": torch.zeros(3, 2, 3, 8, 8), "scales": [1, 2]}, "scales must be 3, one a stage, got 2"),
    ],
)
def test_show_refuses(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        show(**{"images": torch.zeros(2, 3, 8, 8), **arguments})  # type: ignore[arg-type]


def test_one_picture_is_no_animation(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"animation of stages, as Sampler\.scales gives them, got one"):
        show(torch.zeros(2, 3, 8, 8)).save(tmp_path / "a.gif")


def test_sample_writes_stages(model: str, tmp_path: Path) -> None:
    """Beside the same grid as without them, in batches of any size."""
    words = ("sample", "--model", model, "--labels", "1,3", "--count", 2, "--seed", 5)
    run(*words, "--out", tmp_path / "plain.png")
    for name, batch in (("a.gif", 3), ("b.gif", 1), ("c.png", 4)):
        more = ("--stages", tmp_path / name, "--batch-size", batch, "--out", tmp_path / "grid.png")
        assert f"coarse to fine: {tmp_path / name}" in run(*words, *more).output
        assert (tmp_path / "grid.png").read_bytes() == (tmp_path / "plain.png").read_bytes()
    assert (tmp_path / "a.gif").read_bytes() == (tmp_path / "b.gif").read_bytes()
    with Image.open(tmp_path / "a.gif") as animation:
        assert animation.n_frames == len(SCALES)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--stages", "a.jpg"), "must be NAME.gif, animated, or NAME.png"),
        (("--stages", "a.gif", "--out", "a.npz"), "--stages shows how the images of a grid come about"),
        (("--stages", "a.gif", "--candidates", 9, "--score", "likelihood"), "come about, got candidates"),
    ],
)
def test_sample_refuses_stages(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[object, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in run("sample", "--model", model, *more, code=2).output
