"""The page in headless Chromium: draws, redraws a painted part, compares, makes batches, refuses bad input; then many
users at once for a minute, with the server's memory. Writes the screens of docs/web.md.

    pip install -e '.[web,browser]' && apt-get install chromium
    python tests/web/browser.py                      # --users 20 --seconds 60 --screens docs/web

Not a test of `make test`: it needs a Chromium of the system. It ends with an error if anything is not as it should be.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import shutil
import subprocess
import sys
import time
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

import var_ext
from var_ext import to_pil
from var_ext.grid import labelled_grid

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("chromium", "chromium-browser", "google-chrome")
LARGEST_SCREEN = 150_000  # bytes
STEADY = 1.05  # memory at the end beside that after a third of the time: caches are full by then
PATIENCE = 120_000  # milliseconds, of a machine that is busy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--users", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--screens", type=Path, help="folder for the screens of the docs")
    parser.add_argument("--chromium", default=next(filter(None, map(shutil.which, NAMES)), None))
    arguments = parser.parse_args()
    if arguments.chromium is None:
        sys.exit(f"a Chromium must be on the PATH, one of {', '.join(NAMES)}, or name it with --chromium")
    with served() as (address, process), sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=arguments.chromium, args=["--no-sandbox"] if os.geteuid() == 0 else []
        )
        screens = arguments.screens
        if screens:
            screens.mkdir(parents=True, exist_ok=True)
        page = opened(browser, address)
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda text: problems.append(text.text) if text.type == "error" else None)
        for check in (draws, edits, compares, makes_batches):
            check(page, screens)
            print(f"{check.__name__}: ok", flush=True)
        assert not problems, problems
        refuses(page, screens)  # the browser writes refused requests to its console
        print("refuses: ok", flush=True)
        page.close()
        crowd(browser, address, process.pid, arguments.users, arguments.seconds)
        browser.close()


@contextmanager
def served() -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`var-ext web` in fp32 on a free port."""
    words = [sys.executable, "-m", "var_ext", "web", "--port", "0", "--precision", "fp32"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout
        found = re.search(r"http://\S+", process.stdout.readline())
        assert found, "the server did not start"
        try:
            yield found[0], process
        finally:
            process.terminate()


def opened(browser: Browser, address: str) -> Page:
    page = browser.new_page(viewport={"width": 1000, "height": 760})
    page.set_default_timeout(PATIENCE)
    expect.set_options(timeout=PATIENCE)
    page.goto(address)
    expect(page.locator("#status")).to_have_text("ready")
    return page


def screen(page: Page, folder: Path | None, name: str) -> None:
    if folder is None:
        return
    path = folder / f"{name}.png"
    with Image.open(io.BytesIO(page.screenshot())) as taken:
        taken.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
    assert path.stat().st_size < LARGEST_SCREEN, path


def pixels(page: Page) -> np.ndarray:
    """What the canvas of the picture holds, (S, S, 3) uint8."""
    return decoded(page.evaluate("document.getElementById('picture').toDataURL()"))


def decoded(url: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(b64decode(url.split(",")[1]))).convert("RGB"))


def done(page: Page) -> None:
    expect(page.locator("#status")).to_have_text(re.compile("^done"))


def draw(page: Page, label: int, seed: int) -> None:
    page.select_option("#label", str(label))
    page.fill("#seed", str(seed))
    page.click("#draw")
    done(page)


def draws(page: Page, screens: Path | None) -> None:
    """Scale by scale, and in the end the sampler's own pixels."""
    sampler = var_ext.load("digits", precision="fp32")
    draw(page, 3, 7)
    assert page.locator("#stages img").count() == len(sampler.vae.schedule.patch_nums)
    assert (pixels(page) == np.asarray(to_pil(sampler(3, 7))[0])).all()
    page.fill("#cfg", "4")
    page.fill("#top_p", "0.5")
    draw(page, 3, 8)
    assert (pixels(page) == np.asarray(to_pil(sampler(3, 8, cfg=4, top_p=0.5))[0])).all()
    page.fill("#cfg", "")
    page.fill("#top_p", "")
    draw(page, 3, 7)
    screen(page, screens, "draw")


def edits(page: Page, screens: Path | None) -> None:
    """A stroke over the upper half: only its pixels change, to what `edit` draws, and undo brings them back."""
    before = pixels(page)
    box = page.locator("#mask").bounding_box()
    assert box
    x, y, side = box["x"], box["y"], box["width"]
    page.fill("#brush", "50")
    page.mouse.move(x + 0.1 * side, y + 0.2 * side)
    page.mouse.down()
    for step in range(1, 21):
        page.mouse.move(x + (0.1 + 0.04 * step) * side, y + 0.2 * side)
    page.mouse.up()
    mask = decoded(page.evaluate("painted()"))[..., 0] == 255
    assert mask[4, 4] and mask[5, 16] and not mask[16:].any()
    screen(page, screens, "mask")
    page.check("#paste")
    page.select_option("#label", "8")
    page.fill("#seed", "5")
    page.click("#redraw")
    done(page)
    after = pixels(page)
    sampler = var_ext.load("digits", precision="fp32")
    given = torch.from_numpy(before / np.float32(255)).permute(2, 0, 1)
    wanted = to_pil(sampler.edit(given, torch.from_numpy(mask), 8, 5, paste=True))[0]
    assert (after == np.asarray(wanted)).all() and (after != before).any()
    assert (after[~mask] == before[~mask]).all()
    page.click("#clear")
    assert not decoded(page.evaluate("painted()")).any()
    screen(page, screens, "redrawn")
    old = page.evaluate("now()")
    page.click("#undo")
    page.wait_for_function("old => now() !== old", arg=old)
    assert (pixels(page) == before).all()


def compares(page: Page, screens: Path | None) -> None:
    page.click("#compare")
    done(page)
    texts = page.locator("#compared figcaption").all_inner_texts()
    print("  " + "; ".join(texts))
    assert len(texts) == page.locator("#precisions input").count() > 1
    assert all(re.match(r"\w+: \d+ ms", text) for text in texts)
    page.locator("#compared").scroll_into_view_if_needed()
    screen(page, screens, "compare")


def makes_batches(page: Page, screens: Path | None) -> None:
    page.select_option("#labels", ["1", "4", "10"])
    page.fill("#seed", "20")
    page.click("#batch")
    done(page)
    assert page.locator("#drawn img").count() == 12
    with page.expect_download() as download:
        page.click("#sheet")
    sampler = var_ext.load("digits", precision="fp32")
    images = sampler([1] * 4 + [4] * 4 + [10] * 4, [20, 21, 22, 23] * 3)
    wanted = labelled_grid(images, ["1", "4", "no class"], ["20", "21", "22", "23"])
    with Image.open(download.value.path()) as sheet:
        assert sheet.format == "PNG" and sheet.tobytes() == wanted.tobytes()
    page.locator("#drawn").scroll_into_view_if_needed()
    screen(page, screens, "batch")


def refuses(page: Page, screens: Path | None) -> None:
    """The server's message is shown in red, and the page goes on."""
    for field, value, message in (
        ("#cfg", "99", "cfg must be a number in [0, 20], got 99"),
        ("#top_p", "2", "top_p must be a number in [0, 1], got 2"),
        ("#seed", "-1", "seed must be a whole number"),
    ):
        before = page.input_value(field)
        page.fill(field, value)
        page.click("#draw")
        expect(page.locator("#status.error")).to_contain_text(message)
        page.evaluate("scrollTo(0, 0)")
        screen(page, screens, "refused")
        page.fill(field, before)
    page.click("#redraw")  # nothing is painted
    expect(page.locator("#status.error")).to_contain_text("paint on the picture first")
    draw(page, 1, 1)


def crowd(browser: Browser, address: str, pid: int, users: int, seconds: float) -> None:
    """Users in tabs of their own who ask again as soon as they are answered: pictures, edits, precisions, batches."""
    pages = [opened(browser, address) for _ in range(users)]
    play = """async (user) => {
        window.drawn = 0; window.errors = []; window.over = false; window.longest = 0;
        mask.fillRect(0, 0, model.side, model.side / 2);
        window.half = painted();
        const status = document.getElementById("status");
        for (let seed = user * 100000; !window.over; seed++) {
            document.getElementById("label").value = seed % 11;
            document.getElementById("seed").value = seed;
            const start = performance.now();
            const others = () => {};
            const [what, body, shows] = [
                ["draw", asked(), stage],
                ["edit", { ...asked(), image: now(), mask: window.half, paste: false }, stage],
                ["draw", asked(), stage],
                ["compare", { ...asked(), precisions: model.precisions }, others],
                ["draw", asked(), stage],
                ["batch", { labels: [seed % 11], seed, count: 4 }, others],
            ][seed % 6];
            await request(what, body, shows);
            window.longest = Math.max(window.longest, performance.now() - start);
            if (status.textContent.startsWith("done")) window.drawn++;
            else window.errors.push(status.textContent);
        }
    }"""
    for i, page in enumerate(pages):
        page.evaluate(f"user => {{ window.playing = ({play})(user); }}", i)
    start, memory = time.monotonic(), []
    while time.monotonic() - start < seconds:
        time.sleep(1)
        memory.append(resident(pid))
    for page in pages:
        page.evaluate("window.over = true")
    for page in pages:
        page.evaluate("window.playing")  # a promise
    took = time.monotonic() - start
    drawn = [page.evaluate("window.drawn") for page in pages]
    errors = [error for page in pages for error in page.evaluate("window.errors")]
    longest = max(page.evaluate("window.longest") for page in pages) / 1000
    early, late = memory[len(memory) // 3], memory[-1]
    print(
        f"crowd: {users} users, {took:.0f} s: {sum(drawn)} requests ({min(drawn)} to {max(drawn)} each), "
        f"{len(errors)} errors, the longest wait {longest:.1f} s"
    )
    print(
        f"memory: {memory[0]} MB at first, {early} MB after a third, {late} MB at the end, most {max(memory)} MB"
    )
    assert not errors, errors[:3]
    assert min(drawn) > 0
    assert late <= STEADY * early, "memory grows"


def resident(pid: int) -> int:
    """MB of a process."""
    (kilobytes,) = re.findall(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(encoding="utf-8"))
    return int(kilobytes) // 1024


if __name__ == "__main__":
    main()
