"""Draw portraits in fifteen styles, a class each: any number, each from its own seed (see README.md).

npm ci --prefix python/avatars
python python/avatars/render.py --out avatars/ --train 1500 --val 300
python python/avatars/render.py --out avatars.npz --train 100000 --val 4000 --size 32
python python/avatars/render.py --out sheet.png --val 12 --size 48
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
SPLITS = ("train", "val")
STYLES = (
    "adventurer", "big-ears", "big-smile", "croodles", "dylan", "fun-emoji", "lorelei", "micah", "miniavs",
    "notionists", "open-peeps", "personas", "pixel-art", "thumbs", "toon-head",
)  # fmt: skip
CHUNK = 64  # avatars that a renderer is asked for at once


class Refused(SystemExit):
    """Ends the program with one line."""


@dataclass(frozen=True)
class Avatar:
    """One portrait: its seed is the first of SPLIT-INDEX-0, -1, ... whose portrait belongs to the split."""

    split: str
    style: str
    index: int


def avatars(split: str, styles: Sequence[str], first: int, count: int) -> list[Avatar]:
    """Those of a split, `count` a style from index `first` on; styles take turns."""
    return [Avatar(split, style, index) for index in range(first, first + count) for style in styles]


class Renderer:
    """A node process that draws; `--jobs` of them work side by side."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.process = subprocess.Popen(
            ["node", str(HERE / "render.mjs"), str(size)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def draw(self, wanted: Sequence[Avatar]) -> np.ndarray:
        """(N, S, S, 3) uint8."""
        assert self.process.stdin is not None and self.process.stdout is not None
        count = len(wanted) * self.size**2 * 3
        try:
            self.process.stdin.write(
                "".join(f"{each.style} {each.split} {each.index}\n" for each in wanted).encode()
            )
            self.process.stdin.flush()
            pixels = self.process.stdout.read(count)
        except BrokenPipeError:
            pixels = b""
        if len(pixels) < count:
            raise Refused(
                f"node ended while it drew {wanted[0]} and those after it; its own message is above"
            )
        return np.frombuffer(pixels, np.uint8).reshape(-1, self.size, self.size, 3)

    def close(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait()


def drawn(wanted: Sequence[Avatar], size: int, jobs: int) -> Iterator[tuple[Avatar, np.ndarray]]:
    """Each avatar and its picture (S, S, 3) uint8, in the order of `wanted`, whatever the number of jobs."""
    mine, renderers = threading.local(), []

    def draw(chunk: Sequence[Avatar]) -> np.ndarray:
        if not hasattr(mine, "renderer"):
            mine.renderer = Renderer(size)
            renderers.append(mine.renderer)
        return mine.renderer.draw(chunk)

    chunks = iter([wanted[i : i + CHUNK] for i in range(0, len(wanted), CHUNK)])
    with ThreadPoolExecutor(jobs) as pool:
        try:
            # a few chunks ahead: memory holds those alone
            ahead = [(chunk, pool.submit(draw, chunk)) for chunk in islice(chunks, 4 * jobs)]
            while ahead:
                chunk, pictures = ahead.pop(0)
                yield from zip(chunk, pictures.result(), strict=True)
                ahead += [(more, pool.submit(draw, more)) for more in islice(chunks, 1)]
        finally:
            pool.shutdown(cancel_futures=True)
            for renderer in renderers:
                renderer.close()


def write_folder(out: Path, wanted: Sequence[Avatar], size: int, jobs: int) -> None:
    """OUT/SPLIT/STYLE/INDEX.png, and the licences."""
    for split, style in sorted({(each.split, each.style) for each in wanted}):
        (out / split / style).mkdir(parents=True, exist_ok=True)
    for each, pixels in drawn(wanted, size, jobs):
        Image.fromarray(pixels).save(
            out / each.split / each.style / f"{each.index:07d}.png", compress_level=1
        )
    shutil.copyfile(HERE / "NOTICE", out / "NOTICE")


def write_npz(
    out: Path, wanted: Sequence[Avatar], size: int, jobs: int, styles: Sequence[str], notice: str
) -> None:
    """SPLIT_images (N, S, S, 3) uint8 and SPLIT_labels (N,) int64 of each split, class_names, notice."""
    arrays: dict[str, np.ndarray] = {"class_names": np.array(styles), "notice": np.array(notice)}
    for split in SPLITS:
        part = [each for each in wanted if each.split == split]
        images = np.empty((len(part), size, size, 3), np.uint8)
        for i, (_, pixels) in enumerate(drawn(part, size, jobs)):
            images[i] = pixels
        arrays[f"{split}_images"] = images
        arrays[f"{split}_labels"] = np.array([styles.index(each.style) for each in part], np.int64)
    np.savez_compressed(out, **arrays)


def write_sheet(out: Path, wanted: Sequence[Avatar], size: int, jobs: int, styles: Sequence[str]) -> None:
    """One picture, a row a style."""
    columns = len(wanted) // len(styles)
    sheet = Image.new("RGB", (columns * size, len(styles) * size))
    for i, (each, pixels) in enumerate(drawn(wanted, size, jobs)):
        sheet.paste(Image.fromarray(pixels), (i // len(styles) * size, styles.index(each.style) * size))
    sheet.save(out, optimize=True)


def check_machine() -> None:
    """Refuses where node or its packages are missing."""
    if shutil.which("node") is None:
        raise Refused(
            "wanted node (18 or newer) on the PATH, got none: install it from nodejs.org or your system"
        )
    missing = [
        name for name in ("core", "collection") if not (HERE / "node_modules" / "@dicebear" / name).is_dir()
    ]
    if missing or not (HERE / "node_modules" / "@resvg" / "resvg-js").is_dir():
        raise Refused(f"wanted the packages of package-lock.json, got none: npm ci --prefix {HERE}")


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; a value that cannot be is refused with the option's name."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder, NAME.npz, or NAME.png: a sheet")
    parser.add_argument("--train", type=int, default=0, help="training images of each style")
    parser.add_argument("--val", type=int, default=0, help="held-out images of each style")
    parser.add_argument("--first", type=int, default=0, help="index of the first, to go on with a set")
    parser.add_argument("--size", type=int, default=64, help="side in pixels [64]")
    parser.add_argument("--styles", default=",".join(STYLES), help="of them [all]")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes [one a core]")
    options = parser.parse_args(arguments)
    options.styles = options.styles.split(",")
    unknown = sorted(set(options.styles) - set(STYLES))
    if unknown or len(set(options.styles)) < len(options.styles):
        parser.error(
            f"--styles must be different ones of {', '.join(STYLES)}, got {','.join(options.styles)}"
        )
    if min(options.train, options.val, options.first) < 0 or options.train + options.val == 0:
        parser.error(
            "--train, --val and --first must be at least 0, and one of the first two above it, "
            f"got {options.train}, {options.val}, {options.first}"
        )
    if not 8 <= options.size <= 1024 or options.jobs < 1:
        parser.error(
            f"--size must be in [8, 1024] and --jobs at least 1, got {options.size} and {options.jobs}"
        )
    if options.out.suffix == ".png" and (options.train and options.val):
        parser.error("a sheet shows --train or --val, got both")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parsed(arguments)
    check_machine()
    wanted = [
        each
        for split in SPLITS
        for each in avatars(split, options.styles, options.first, getattr(options, split))
    ]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    common = options.out, wanted, options.size, options.jobs
    if options.out.suffix == ".npz":
        write_npz(*common, options.styles, (HERE / "NOTICE").read_text(encoding="utf-8"))
    elif options.out.suffix == ".png":
        write_sheet(*common, options.styles)
    else:
        write_folder(*common)
    print(
        f"{len(wanted)} avatars of {len(options.styles)} styles, {options.size} px: {options.out.resolve()}"
    )


if __name__ == "__main__":
    main()
