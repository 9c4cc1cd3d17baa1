"""The program that draws avatars: which ones it asks for, what it refuses, and, where node is, what it draws."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from tests.programs import program_at

FOLDER = Path(__file__).resolve().parent.parent / "python" / "avatars"
PACKAGES = FOLDER / "node_modules" / "@dicebear"


@pytest.fixture(scope="module")
def render() -> Iterator[ModuleType]:
    with program_at("avatars/render.py") as module:
        yield module


def test_splits_and_later_parts_of_a_set_are_apart(render: ModuleType) -> None:
    whole = render.avatars("train", render.STYLES, 0, 6)
    assert len(set(whole)) == 6 * 15
    assert whole == render.avatars("train", render.STYLES, 0, 4) + render.avatars(
        "train", render.STYLES, 4, 2
    )
    assert not set(whole) & set(render.avatars("val", render.STYLES, 0, 6))
    assert [each.style for each in whole[:15]] == list(render.STYLES)  # any prefix is balanced


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--out x", "one of the first two above it, got 0, 0, 0"),
        ("--out x --train -1", "must be at least 0, .* got -1, 0, 0"),
        ("--out x --train 2 --size 4", r"--size must be in \[8, 1024\] and --jobs at least 1, got 4"),
        ("--out x --train 2 --jobs 0", "--jobs at least 1, got 64 and 0"),
        ("--out x --val 2 --styles thumbs,bottts", "different ones of adventurer, .*, got thumbs,bottts"),
        ("--out x --val 2 --styles thumbs,thumbs", "different ones of .*, got thumbs,thumbs"),
        ("--out x.png --train 2 --val 2", "a sheet shows --train or --val, got both"),
        ("--train 2", "required: --out"),
    ],
)
def test_bad_arguments_are_refused(
    render: ModuleType, capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    with pytest.raises(SystemExit):
        render.parsed(arguments.split())
    assert re.search(message, capsys.readouterr().err)


def test_a_machine_without_node_or_packages_is_told(
    render: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(render, "HERE", tmp_path)
    monkeypatch.setattr(shutil, "which", lambda _: "/bin/node")
    with pytest.raises(SystemExit, match="got none: npm ci --prefix"):
        render.main(["--out", str(tmp_path / "x"), "--val", "1"])
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(SystemExit, match="wanted node"):
        render.main(["--out", str(tmp_path / "x"), "--val", "1"])
    assert not (tmp_path / "x").exists()


def test_versions_are_pinned_and_every_style_has_its_licence(render: ModuleType) -> None:
    wanted = json.loads((FOLDER / "package.json").read_text())["dependencies"]
    locked = json.loads((FOLDER / "package-lock.json").read_text())["packages"]
    assert len(wanted) == 3
    for name, version in wanted.items():
        assert version[0].isdigit() and locked[f"node_modules/{name}"]["version"] == version
    assert all("integrity" in entry for name, entry in locked.items() if name)
    notice = (FOLDER / "NOTICE").read_text(encoding="utf-8")
    for style in render.STYLES:
        assert re.search(rf'^{style}: ".+" \(http\S+\) by .+, CC(0 1| BY 4)\.0 \(http\S+\)$', notice, re.M)


@pytest.mark.skipif(
    shutil.which("node") is None or not PACKAGES.is_dir(),
    reason="needs node and: npm ci --prefix python/avatars",
)
def test_what_is_drawn(render: ModuleType, tmp_path: Path) -> None:
    """The same pixels from any number of processes, as files and as arrays; splits that share no picture."""
    counts = ["--train", "9", "--val", "3", "--size", "24", "--styles", "fun-emoji,thumbs"]
    render.main([*counts, "--out", str(tmp_path / "set"), "--jobs", "2"])
    render.main([*counts, "--out", str(tmp_path / "set.npz"), "--jobs", "1"])
    with np.load(tmp_path / "set.npz") as arrays:
        held = {name: arrays[name] for name in arrays.files}
    assert held["class_names"].tolist() == ["fun-emoji", "thumbs"]
    assert held["train_labels"].tolist() == [0, 1] * 9 and held["val_images"].shape == (6, 24, 24, 3)
    seen: dict[str, set[bytes]] = {"train": set(), "val": set()}
    for split, count in (("train", 9), ("val", 3)):
        for label, style in enumerate(("fun-emoji", "thumbs")):
            paths = sorted((tmp_path / "set" / split / style).iterdir())
            assert [path.name for path in paths] == [f"{i:07d}.png" for i in range(count)]
            for i, path in enumerate(paths):
                pixels = np.asarray(Image.open(path))
                assert np.array_equal(pixels, held[f"{split}_images"][2 * i + label])
                seen[split].add(pixels.tobytes())
    assert len(seen["val"]) == 6 and not seen["train"] & seen["val"]
    assert (tmp_path / "set" / "NOTICE").read_bytes() == (FOLDER / "NOTICE").read_bytes()

    render.main(
        ["--val", "3", "--size", "24", "--styles", "fun-emoji,thumbs", "--out", str(tmp_path / "s.png")]
    )
    sheet = np.asarray(Image.open(tmp_path / "s.png"))
    assert sheet.shape == (48, 72, 3) and np.array_equal(sheet[24:, 48:], held["val_images"][5])

    render.main([*counts[:2], "--first", "9", *counts[4:], "--out", str(tmp_path / "more.npz")])
    with np.load(tmp_path / "more.npz") as arrays:
        assert len(arrays["train_images"]) == 18 and not np.array_equal(
            arrays["train_images"], held["train_images"]
        )
    for style in render.STYLES:
        text = (PACKAGES / style / "LICENSE").read_text(encoding="utf-8")
        (artist,) = re.findall(r"Designer: (.+) \(", text)
        (licence,) = re.findall(r"License: (CC.*) \(", text)
        assert re.search(
            f"^{style}: .* by {re.escape(artist)} .* {licence}", (FOLDER / "NOTICE").read_text(), re.M
        )
