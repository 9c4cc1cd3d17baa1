"""The command line on a tiny model: what it prints and writes, and one clear line for every bad input."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image, ImageDraw, ImageFont

import var_ext
from tests.tiny import SCALES, tiny
from var_ext import backend, evaluation, ops
from var_ext.bench import measure
from var_ext.checkpoints import load_tokenizer, save_model
from var_ext.cli import main
from var_ext.grid import GAP, labelled_grid
from var_ext.training import TokenizerRecipe, VARRecipe

NAMES = ["ant", "bee", "cat", "dog", "eel"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    sampling = {"cfg": 1.5, "top_k": 8, "top_p": 0.9}
    return str(save_model(folder, *tiny(), sampling=sampling, class_names=NAMES))


def run(*args: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert result.exit_code == code, result.output
    if code:  # a message and nothing else: click turns it into SystemExit, a traceback is another exception
        assert isinstance(result.exception, SystemExit)
        assert "Error: " in result.output and "Traceback" not in result.output
    return result


def commands(group: click.Group = main, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every group and command as the words that call it."""
    found = [path]
    for name, command in group.commands.items():
        inner = (*path, name)
        found += commands(command, inner) if isinstance(command, click.Group) else [inner]
    return found


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_help_has_an_example(words: tuple[str, ...]) -> None:
    assert f"Example: var-ext {' '.join(words)}".rstrip() in run(*words, "--help").output


def test_all_commands_are_there() -> None:
    wanted = {
        "sample",
        "edit",
        "train",
        "tokens",
        "eval",
        "reference",
        "report",
        "scaling",
        "convert",
        "info",
        "bench",
        "web",
    }
    assert set(main.commands) == wanted
    assert run("--version").output.split()[-1] == var_ext.__version__


# ---------------------------------------------------------------------- sample


def test_sample_draws_a_labelled_grid(model: str, tmp_path: Path) -> None:
    out = tmp_path / "new" / "grid.png"
    output = run("sample", "--model", model, "--count", 4, "--seed", 3, "--out", out).output
    assert f"20 images of {model} in" in output and "images/s" in output
    assert "seeds 3-6" in output and str(out) in output
    image = Image.open(out)
    # 8 px images are shown at 64 px, four in a row of five rows; names and seeds take the rest
    assert image.format == "PNG"
    assert image.width > 4 * (64 + GAP) and image.height > 5 * (64 + GAP)


@pytest.mark.parametrize(
    ("suffix", "kind"),
    [
        (".PNG", "PNG"),
        (".jpg", "JPEG"),
        (".jpeg", "JPEG"),
        (".webp", "WEBP"),
        (".bmp", "BMP"),
        (".tif", "TIFF"),
        (".ppm", "PPM"),
    ],
)
def test_a_file_holds_what_its_name_says(model: str, tmp_path: Path, suffix: str, kind: str) -> None:
    box = ("--box", "0,0,1,0.5", "--model", model)
    for name, words in (
        ("a", ("sample", "--model", model, "--count", 1)),
        ("b", ("edit", tmp_path / "a.png", *box)),
    ):
        for each in dict.fromkeys((".png", suffix)):
            run(*words, "--out", f"{tmp_path}/{name}{each}")
        image, wanted = Image.open(f"{tmp_path}/{name}{suffix}"), Image.open(f"{tmp_path}/{name}.png")
        assert image.format == kind
        off = np.abs(np.asarray(image.convert("RGB")).astype(int) - np.asarray(wanted))
        assert off.mean() < 4 if kind == "JPEG" else off.max() == 0  # noise is what JPEG renders worst


def test_an_archive_may_be_called_in_capitals(model: str, tmp_path: Path) -> None:
    run("sample", "--model", model, "--count", 1, "--labels", 1, "--out", tmp_path / "a.NPZ")
    assert np.load(tmp_path / "a.NPZ")["arr_0"].shape == (1, 8, 8, 3)


def test_home_is_found(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shells leave the ~ of --out=~/x alone."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(shutil.copytree(model, tmp_path / "work" / "model").parent)
    for out in ("~/a.png", "~/a.npz", "~/pngs/"):
        run("sample", "--model", "~/work/model", "--count", 1, f"--out={out}")
    drawn(tmp_path / "mask.png")
    run("edit", "~/a.png", "--box=0,0,1,.5", "--model", model, "--out=~/b.png")
    run("edit", "~/b.png", "--mask=~/mask.png", "--model", model, "--out=~/c.png")
    image_folder(tmp_path / "data")
    small = ["--vocab-size", 16, "--z-channels", 8, "--ch", 32, "--ch-mult", "1,2", "--patch-nums", "1,2,4"]
    shared = ["--preset=digits", "--epochs", 1, "--quiet"]
    run("train", "tokenizer", "~/data", "--out=~/tok", *shared, *small)
    sampler = var_ext.load(model)
    torch.save({**sampler.vae.state_dict()}, tmp_path / "vae.pth")
    run("convert", "~/vae.pth", "--out=~/converted", "--patch-nums=1,2,4")
    assert os.listdir(".") == ["model"]  # and no folder ~
    assert {"a.png", "a.npz", "pngs", "b.png", "c.png", "tok", "converted"} <= set(os.listdir(tmp_path))


def test_names_that_are_not_utf8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As old archives have them: data, class, model and picture, where output is UTF-8 alone."""
    monkeypatch.chdir(tmp_path)
    odd = os.fsdecode(b"caf\xe9")
    data = image_folder(tmp_path / odd)
    (data / "train" / "dark").rename(data / "train" / odd)
    (data / "val" / "dark").rename(data / "val" / odd)
    small = [
        "--vocab-size=16",
        "--z-channels=8",
        "--ch=32",
        "--ch-mult=1,2",
        "--patch-nums=1,2,4",
        "--epochs=1",
    ]
    tiny_var = ["--depth=1", "--embed-dim=64", "--num-heads=1", "--copies=1", "--epochs=1"]
    model, picture = f"{odd}-var", f"{odd}.png"
    for words in (
        ["train", "tokenizer", odd, "--preset=digits", "--out", f"{odd}-tok", *small],
        ["train", "var", odd, "--preset=digits", "--tokenizer", f"{odd}-tok", "--out", model, *tiny_var],
        ["sample", "--model", model, "--count=1", "--out", picture],
        ["sample", "--model", model, "--count=1", "--out", f"{odd}.npz"],
        ["edit", picture, "--model", model, "--box=0,0,1,0.5", "--out", f"{odd}-edited.png"],
    ):
        run(*words)
    done = subprocess.run(
        [sys.executable, "-m", "var_ext", "info", model],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
    )
    assert done.returncode == 0, done.stderr
    assert rb"bright, caf\xe9" in done.stdout
    failed = subprocess.run(
        [sys.executable, "-m", "var_ext", "edit", f"{odd}-none.png", "--box=0,0,1,1"],
        capture_output=True,
    )
    assert failed.returncode == 1 and rb"wanted a readable image, got caf\udce9-none.png" in failed.stderr


def test_sample_needs_no_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "80 images of digits in" in run("sample").output
    assert (tmp_path / "samples.png").is_file()


def test_sample_is_the_same_again_and_in_part(model: str, tmp_path: Path) -> None:
    def pixels(*args: object) -> np.ndarray:
        run("sample", "--model", model, "--out", tmp_path / "a.png", *args)
        return np.asarray(Image.open(tmp_path / "a.png"))

    whole = pixels("--labels", "0-2", "--count", 3)
    assert np.array_equal(whole, pixels("--labels", "0,1,2", "--count", 3, "--batch-size", 2))
    # the last cell of the grid: class 2, seed 2
    assert np.array_equal(
        whole[-68:-4, -68:-4], pixels("--labels", "2", "--seed", 2, "--count", 1)[-68:-4, -68:-4]
    )
    assert not np.array_equal(whole, pixels("--labels", "0-2", "--count", 3, "--seed", 9))


def test_sample_options_reach_the_sampler(model: str, tmp_path: Path) -> None:
    out = tmp_path / "a.png"
    run(
        "sample",
        "--model",
        model,
        "--labels",
        1,
        "--count",
        1,
        "--cfg",
        3,
        "--top-k",
        2,
        "--top-p",
        0.5,
        "--out",
        out,
    )
    drawn = var_ext.load(model)([1], [0], cfg=3.0, top_k=2, top_p=0.5)
    cell = (drawn[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy().repeat(8, 0).repeat(8, 1)
    assert np.array_equal(np.asarray(Image.open(out))[-68:-4, -68:-4], cell)


def test_sample_without_a_class(model: str, tmp_path: Path) -> None:
    run(
        "sample", "--model", model, "--labels", 3, "--count", 1, "--out", tmp_path / "a.png"
    )  # 3 is "no class"


def test_sample_writes_images_one_by_one(model: str, tmp_path: Path) -> None:
    options = ("--model", model, "--count", 3, "--seed", 7, "--labels", "4,1", "--batch-size", 4, "--cfg", 2)
    (tmp_path / "there").mkdir()
    for out in ("a.npz", "pngs/", "there"):
        result = run("sample", *options, "--out", f"{tmp_path}/{out}")
        assert f"6 images of {model}, seeds 7-12: {tmp_path / out}" in result.stdout
        assert "6/6" in result.stderr
    images = np.load(tmp_path / "a.npz")["arr_0"]
    drawn = var_ext.load(model)([4, 1, 4, 1, 4, 1], range(7, 13), cfg=2.0, top_k=8, top_p=0.9, batch_size=4)
    assert np.array_equal(images, (drawn * 255).byte().permute(0, 2, 3, 1).numpy())
    for folder in ("pngs", "there"):
        pngs = [tmp_path / folder / f"{i:06d}.png" for i in range(6)]
        assert np.array_equal(images, np.stack([np.asarray(Image.open(path)) for path in pngs]))
    before = (tmp_path / "a.npz").stat().st_mtime_ns
    assert not run("sample", *options, "--quiet", "--out", tmp_path / "a.npz").stderr  # all there
    assert (tmp_path / "a.npz").stat().st_mtime_ns == before
    output = run("sample", *options, "--cfg", 3, "--out", f"{tmp_path}/pngs", code=1).output
    assert "options.cfg: 2.0 there, 3.0 now. Write to another place" in output


def test_images_one_by_one_are_of_all_classes(model: str, tmp_path: Path) -> None:
    run("sample", "--model", model, "--count", 2, "--out", tmp_path / "a.npz")
    plan = json.loads((tmp_path / "a.npz.plan.json").read_text())
    assert plan["labels"] == [0, 1, 2, 3, 4] * 2 and plan["seeds"] == list(range(10))
    assert plan["options"].items() >= {"cfg": 1.5, "top_k": 8, "top_p": 0.9}.items()


def test_threads(model: str, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        run("sample", "--model", model, "--count", 1, "--threads", 2, "--out", tmp_path / "a.png")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--labels", "0-9"], 1, "labels must be in 0..5"),
        (["--labels", "x"], 2, "must be whole numbers and ranges such as 3,5,8 or 0-9, got 'x'"),
        (["--labels", "3, 9-5"], 2, "must have ranges that go up, such as 0-9, got '9-5'"),
        (["--cfg", "nan"], 2, "'--cfg': must be a finite number in "),
        (["--top-p", "nan"], 2, "'--top-p': must be a finite number in "),
        (["--seed", str(2**63 - 1)], 2, "'--seed'"),
        (["--out", "."], 1, ". must be empty or hold images of an earlier run with their plan.json"),
        (["--out", "/dev/null/a.npz"], 1, "could not write /dev/null/a.npz: Not a directory"),
        (["--out", "/dev/null/"], 1, "could not write /dev/null/plan.json: Not a directory"),
        (["--out", ""], 1, "could not write .: it must be a file"),
        (
            ["--out", "OUT/a.gif"],
            2,
            "must end with one of .png, .jpg, .jpeg, .webp, .bmp, .tif, .tiff, .ppm, got",
        ),
        (["--out", "OUT/pngs"], 2, "OUT/pngs'; NAME.npz or FOLDER/ take the images one by one"),
        (["--count", "0"], 2, "'--count'"),
        (["--seed", "-1"], 2, "'--seed'"),
        (["--top-p", "1.5"], 2, "'--top-p'"),
        (["--threads", "0"], 2, "'--threads'"),
        (["--device", "toaster"], 2, "must be one such as 'cpu'"),
        (["--colour"], 2, "--colour"),
        (["--model", "var-d17"], 1, "must be one of"),
        (["--out", "/dev/null/a.png"], 1, "could not write /dev/null/a.png: Not a directory"),
    ],
)
def test_bad_input_to_sample(model: str, tmp_path: Path, args: list[str], code: int, message: str) -> None:
    defaults = ["--model", model, "--count", "1", "--out", str(tmp_path / "a.png")]
    args = [arg.replace("OUT", str(tmp_path)) for arg in args]
    assert message.replace("OUT", str(tmp_path)) in run("sample", *defaults, *args, code=code).output
    assert not os.listdir(tmp_path)


def test_file_that_cannot_be_written_is_named_before_the_work(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for words in (("sample", "--out"), ("eval", "digits", "--json")):
        # were the model looked up first, the message would be about that
        output = run(*words, tmp_path / "pipe", "--model", "nothing", code=1).output
        assert "pipe: it must be a file" in output
    assert (tmp_path / "pipe").is_fifo()


def test_grid_checks_its_images() -> None:
    with pytest.raises(
        ValueError, match=r"images must have shape \(6, 3, H, W\) for 2 rows of 3, got \(5, 3, 8, 8\)"
    ):
        labelled_grid(torch.zeros(5, 3, 8, 8), ["a", "b"], ["1", "2", "3"])


# ---------------------------------------------------------------------- edit


def drawn(path: Path, size: tuple[int, int] = (8, 8), text: str = "7") -> np.ndarray:
    """Writes a picture of a digit, gray on black; returns its pixels."""
    picture = Image.new("RGB", size)
    font = ImageFont.load_default(min(size))
    ImageDraw.Draw(picture).text((size[0] / 2, size[1] / 2), text, "silver", font, anchor="mm")
    picture.save(path)
    return np.asarray(picture)


def test_edit_a_drawn_digit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = drawn(Path("seven.png"), (32, 32))
    output = run("edit", "seven.png", "--box", "0,0.5,1,1", "--paste").output
    assert "50% of the finest tokens drawn anew" in output and str(tmp_path / "edited.png") in output
    after = np.asarray(Image.open("edited.png"))
    assert np.array_equal(after[:16], before[:16]) and not np.array_equal(after[16:], before[16:])
    sheet = Image.open("edited-sheet.png")  # before, mask and after, 64 pixels each
    cells = [
        np.asarray(sheet)[-68:-4, x - 64 : x] for x in (sheet.width - 140, sheet.width - 72, sheet.width - 4)
    ]
    masked = before.copy()
    masked[16:] = 128
    for cell, picture in zip(cells, (before, masked, after), strict=True):
        assert np.array_equal(cell[::2, ::2], picture)


def test_edit_options_reach_the_sampler(model: str, tmp_path: Path) -> None:
    before, mask = drawn(tmp_path / "a.png"), np.zeros((8, 8), np.uint8)
    mask[3:5, 1] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    args = ["--mask", tmp_path / "mask.png", "--outside", "--label", 2, "--seed", 4, "--count", 2]
    args += ["--cfg", 1, "--top-k", 3, "--top-p", 0.9, "--batch-size", 1, "--out", tmp_path / "b.png"]
    run("edit", tmp_path / "a.png", "--model", model, *args)
    image = torch.from_numpy(before.transpose(2, 0, 1) / np.float32(255))
    edited = var_ext.load(model).edit(
        image, torch.from_numpy(mask == 0), 2, [4, 5], cfg=1.0, top_k=3, top_p=0.9, batch_size=1
    )
    for seed, pixels in zip((4, 5), edited, strict=True):
        wanted = (pixels * 255).round().byte().permute(1, 2, 0).numpy()
        assert np.array_equal(np.asarray(Image.open(tmp_path / f"b-{seed}.png")), wanted)
    assert (tmp_path / "b-sheet.png").is_file() and not (tmp_path / "b.png").exists()


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ([], 2, "wanted either --mask or --box, got neither"),
        (["--box", "0,0,1,1", "--mask", "IMAGE"], 2, "wanted either --mask or --box, got both"),
        (["--box", "0,0,1"], 2, "must be four numbers such as 0.2,0.2,0.8,0.8, got '0,0,1'"),
        (["--box", "a,b,c,d"], 2, "must be four numbers"),
        (["--box", "0,0,2,1"], 1, "a box must be four numbers (x0, y0, x1, y1) in [0, 1]"),
        (["--box", "0,0,1,1", "--outside"], 2, "wanted something to replace"),
        (["--box", "0,0,1,1", "--label", "9"], 1, "labels must be in 0..5"),
        (["--mask", "nothing.png"], 1, "wanted a readable image, got nothing.png"),
        (["--mask", "OTHER"], 1, "must have the picture's size, 8 x 8, got 9 x 8"),
        (["--box", "0,0,1,1", "--out", "."], 1, "could not write ."),
        (["--box", "0,0,1,1", "--out", "OUT/a.npz"], 2, "must end with one of .png"),
        (["--mask", "HOLE"], 1, "hole.png has transparent parts, which are kept, but the others are neither"),
    ],
)
def test_bad_input_to_edit(model: str, tmp_path: Path, args: list[str], code: int, message: str) -> None:
    files = {"IMAGE": tmp_path / "a.png", "OTHER": tmp_path / "other.png"}
    drawn(files["IMAGE"])
    drawn(files["OTHER"], (9, 8))
    files["HOLE"] = tmp_path / "hole.png"
    hole = Image.new("RGBA", (8, 8), "gray")
    hole.paste((0, 0, 0, 0), (2, 2, 6, 6))
    hole.save(files["HOLE"])
    words = [str(files.get(arg, arg)).replace("OUT", str(tmp_path)) for arg in args]
    defaults = ["--model", model, "--out", str(tmp_path / "out.png")]
    assert message in run("edit", files["IMAGE"], *defaults, *words, code=code).output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "hole.png", "other.png"]


# ---------------------------------------------------------------------- train


def image_folder(root: Path) -> Path:
    """Two classes of 8 px images, dark and bright, for training and for validation."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2)):
        for name, level in (("dark", 40), ("bright", 200)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(level - 30, level + 30, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def test_train_both_then_sample(tmp_path: Path) -> None:
    data = image_folder(tmp_path / "data")
    shared = ["--preset", "digits", "--epochs", 1, "--batch-size", 4, "--quiet", "--validate-every", 1]
    small = ["--vocab-size", 16, "--z-channels", 8, "--ch", 32, "--ch-mult", "1,2", "--patch-nums", "1,2,4"]
    output = run("train", "tokenizer", data, "--out", tmp_path / "tok", *shared, *small).output
    assert str(tmp_path / "tok") in output
    assert load_tokenizer(tmp_path / "tok").schedule.patch_nums == SCALES

    small = ["--depth", 1, "--embed-dim", 64, "--num-heads", 1, "--no-half", "--copies", 1, "--cfg", 0.5]
    output = run(
        "train", "var", data, "--tokenizer", tmp_path / "tok", "--out", tmp_path / "var", *shared, *small
    ).output
    assert f"var-ext sample --model {tmp_path / 'var'}" in output
    sampler = var_ext.load(tmp_path / "var")
    assert sampler.defaults["cfg"] == 0.5 and sampler.class_names == ["bright", "dark"]
    run("sample", "--model", tmp_path / "var", "--count", 1, "--out", tmp_path / "a.png")


@pytest.mark.parametrize(("command", "recipe"), [("tokenizer", TokenizerRecipe), ("var", VARRecipe)])
def test_every_field_of_a_recipe_is_an_option(command: str, recipe: type) -> None:
    output = run("train", command, "--help").output
    for field in dataclasses.fields(recipe):
        assert f"--{field.name.replace('_', '-')}" in output, field.name


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["nowhere", "--out", "OUT"], 1, "nowhere"),
        (
            ["nowhere", "--out", "OUT", "--preset", "paper"],
            1,
            "weight_perceptual = 1 needs a loss, got none: --lpips FILE",
        ),
        (["digits"], 2, "'--out'"),
        (["digits", "--out", "OUT", "--epochs", "many"], 2, "'--epochs'"),
        (["digits", "--out", "OUT", "--epochs", "0"], 1, "epochs must be at least 1, got 0"),
        (["digits", "--out", "OUT", "--patch-nums", "1,two"], 1, "patch_nums"),
        (["digits", "--out", "OUT", "--preset", "huge"], 2, "'--preset'"),
    ],
)
def test_bad_input_to_train(tmp_path: Path, args: list[str], code: int, message: str) -> None:
    args = [str(tmp_path / "out") if arg == "OUT" else arg for arg in args]
    assert message in run("train", "tokenizer", *args, "--quiet", code=code).output


def test_ranks_say_once_what_they_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("var_ext.training.train_var", lambda *_, **__: tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, said in (("0", f"model: {tmp_path}"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        output = run("train", "var", "digits", "--tokenizer", "tok", "--out", tmp_path).output
        assert output.startswith(said) and bool(output) == bool(said)


def test_preset_of_a_depth(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    taken: list[Any] = []

    def fake(*args: Any, **_: Any) -> Path:
        taken.extend(args)
        return tmp_path

    monkeypatch.setattr("var_ext.training.train_var", fake)
    shared = ("--tokenizer", "tok", "--out", tmp_path)
    run("train", "var", "photos", *shared, "--depth", 30, "--batch-size", 8)  # no digits: the paper's recipe
    run("train", "var", "digits", *shared)
    run("train", "var", "digits", *shared, "--preset", "paper")
    run("train", "var", "digits", *shared, "--preset", "paper", "--depth", 4)
    assert taken[:3] == ["photos", "tok", tmp_path]
    recipes = [dataclasses.replace(VARRecipe.paper(30), batch_size=8), VARRecipe.digits(), VARRecipe.paper()]
    assert taken[3::4] == [*recipes, VARRecipe.paper(4)]
    assert (
        "--tokenizer or --init-from must name the tokenizer"
        in run("train", "var", "photos", "--out", tmp_path, code=2).output
    )


# ---------------------------------------------------------------------- eval, convert, info, bench


def test_eval_prints_and_writes_the_report(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def fake(
        sampler: var_ext.Sampler, **options: Any
    ) -> SimpleNamespace:  # the real one trains a judge first
        asked.update(options, classes=sampler.num_classes)
        return SimpleNamespace(as_markdown=lambda: "# report", as_dict=lambda: {"accuracy": 0.5})

    monkeypatch.setattr(evaluation, "evaluate_digits", fake)
    out = tmp_path / "quality.json"
    args = ["--images-per-class", 7, "--seed", 5, "--cfg", 2, "--quiet", "--json", out]
    assert run("eval", "digits", "--model", model, *args).output == "# report\n"
    assert json.loads(out.read_text()) == {"accuracy": 0.5}
    assert asked == {
        "images_per_class": 7,
        "seed": 5,
        "cfg": 2.0,
        "top_k": None,
        "top_p": None,
        "progress": False,
        "classes": 5,
    }


def test_eval_of_a_model_without_ten_classes(model: str) -> None:
    assert "10" in run("eval", "digits", "--model", model, "--quiet", code=1).output


def test_convert(model: str, tmp_path: Path) -> None:
    sampler = var_ext.load(model)
    torch.save(sampler.vae.state_dict(), tmp_path / "vae.pth")
    torch.save(sampler.var.state_dict(), tmp_path / "var.pth")
    output = run(
        "convert", tmp_path / "vae.pth", tmp_path / "var.pth", "--out", tmp_path / "out", "--half"
    ).output
    assert "depth 2, width 64, 5 classes" in output
    assert var_ext.load(tmp_path / "out").defaults == {"cfg": 1.5, "top_k": 900, "top_p": 0.96}
    size = (tmp_path / "out" / "var.safetensors").stat().st_size
    assert size < 0.6 * (Path(model) / "var.safetensors").stat().st_size

    (tmp_path / "cut.pth").write_bytes((tmp_path / "vae.pth").read_bytes()[:999])
    for files, code, message in (
        (["nothing.pth"], 2, "nothing.pth"),
        (["cut.pth", "var.pth"], 1, "cut short or damaged"),
        (["var.pth", "vae.pth"], 1, "must hold a transformer"),
        (["vae.pth", "var.pth", "vae.pth"], 2, "FILES must be one or two, got 3"),
    ):
        paths = [tmp_path / file for file in files]
        assert message in run("convert", *paths, "--out", tmp_path / "b", code=code).output
    assert not (tmp_path / "b").exists()


def test_info_of_the_installation_is_that_of_the_module() -> None:
    output = run("info").output
    for word in (var_ext.__version__, torch.__version__, "build", "cpu", "gpu", backend.current(), "var-d36"):
        assert word in output
    rows = [line.split() for line in output.splitlines()]
    for op in ops.__all__:
        on_cuda = "native" if backend.use_native(op, "cuda") else "reference"
        assert [op, backend.current(), on_cuda] in rows
    module = subprocess.run([sys.executable, "-m", "var_ext"], capture_output=True, text=True, check=True)

    def steady(text: str) -> list[str]:  # the number of threads is a process's own
        return [line for line in text.splitlines() if not line.startswith("torch ")]

    assert steady(module.stdout) == steady(output)


def test_info_of_models(model: str, tmp_path: Path) -> None:
    output = run("info", model).output
    for words in (
        "8 x 8 pixels",
        "1, 2, 4: 21 tokens",
        "16 codes of 8 channels",
        "5 classes",
        "top_k 8",
        "ant, bee",
    ):
        assert words in output
    output = run("info", "var-d36").output
    for words in ("512 x 512", "2240 tokens", "108.9M parameters", "depth 36", "1000 classes"):
        assert words in output
    folder = tmp_path / "defaults"
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    del config["var"]["depth"], config["var"]["embed_dim"], config["var"]["num_heads"]
    (folder / "config.json").write_text(json.dumps(config))
    assert "depth 16, width 1024" in run("info", folder).output
    alone = save_model(tmp_path / "alone", load_tokenizer(model))
    assert "transformer" not in run("info", alone).output
    assert "must be one of" in run("info", "nothing", code=1).output


def test_bench_times_whole_and_parts(model: str) -> None:
    output = run("bench", model, "--batch-sizes", "1,3", "--repeats", 1, "--precisions", "fp32,int8").output
    for words in (
        "batch 1, fp32:",
        "batch 3, int8:",
        "images/s",
        "scale  4 x 4",
        "drawing tokens",
        "decoder",
    ):
        assert words in output
    # the exact mode is its own measure
    for words in ("fp32: logits off by 0.00%", "100.0% of tokens equal, images of the same tokens inf dB"):
        assert words in output
    timing = measure(var_ext.load(model), 2, repeats=1)
    assert timing.images_per_second == 2 / timing.total
    parts = [*timing.scales, *timing.draws, *timing.steps, timing.decoder]
    assert len(parts) == 3 * len(SCALES) + 1 and min(parts) > 0
