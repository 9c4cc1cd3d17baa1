"""The evaluation of a tokenizer: its figures by hand, its page, the command, and what is refused."""

from __future__ import annotations

import builtins
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor

from tests.evaluation.inception import random_inception
from tests.threads import threads
from var_ext.checkpoints import load_tokenizer, save_model, write_json
from var_ext.cli import main
from var_ext.data import load_dataset
from var_ext.evaluation import Space, evaluate_tokenizer, frechet_distance, psnr, ssim
from var_ext.evaluation.features import of_inception
from var_ext.evaluation.tokenizer_report import Distance, TokenizerReport
from var_ext.export import to_uint8
from var_ext.models import VQVAE
from var_ext.training.losses import LPIPS
from var_ext.training.usage import allowed

pytest.importorskip("sklearn")
COUNT = 30


def features(images: Tensor) -> Tensor:
    return images.mean(1).flatten(1)[:, ::97]  # (B, 11)


@pytest.fixture(scope="module")
def vae() -> VQVAE:
    return load_tokenizer("digits")


@pytest.fixture(scope="module")
def report(vae: VQVAE) -> TokenizerReport:
    data = load_dataset("digits", "val", 32)
    lpips = lambda x, y: (x - y).abs().amax((1, 2, 3))  # noqa: E731
    with threads(1):
        return evaluate_tokenizer(
            vae, data, count=COUNT, batch_size=8, spaces=[Space("FD-x", features)], lpips=lpips
        )


@torch.no_grad()
def test_figures_by_hand(vae: VQVAE, report: TokenizerReport) -> None:
    x = load_dataset("digits", "val", 32).batch([i * 200 // COUNT for i in range(COUNT)])[0]
    steps = [(each + 1) / 2 for each in vae.img_to_reconstructed_img(x)]
    real, last = (x + 1) / 2, steps[-1]
    assert report.count == COUNT and report.image_size == 32 and report.vocab_size == 256
    assert report.psnr == pytest.approx(float(psnr(last, real).mean()), rel=1e-4)
    assert report.ssim == pytest.approx(float(ssim(last, real).mean()), rel=1e-4)
    assert report.l1 == pytest.approx(float((last - real).abs().mean()), rel=1e-4)
    assert report.l2 == pytest.approx(float((last - real).square().mean()), rel=1e-4)
    assert report.lpips == pytest.approx(float(2 * (last - real).abs().amax((1, 2, 3)).mean()), rel=1e-4)
    (distance,) = report.distances
    stored = (last.clamp(0, 1) * 255).floor() / 255
    wanted = frechet_distance(features(stored), features(real))
    assert distance.name == "FD-x" and distance.reconstructions == pytest.approx(wanted, rel=1e-3)
    for row, tokens, step in zip(report.scales, vae.img_to_idxBl(x), steps, strict=True):
        assert row.tokens == tokens.numel() == COUNT * row.side**2
        assert row.codes == len(tokens.unique())
        assert row.allowed == allowed(tokens.numel(), 256)
        share = tokens.flatten().bincount() / tokens.numel()
        share = share[share > 0].double()
        assert row.perplexity == pytest.approx(float(torch.exp(-(share * share.log()).sum())), rel=1e-5)
        assert row.psnr == pytest.approx(float(psnr(step, real).mean()), rel=1e-4)
        assert row.ssim == pytest.approx(float(ssim(step, real).mean()), rel=1e-4)
    assert report.scales[0].psnr < report.scales[-1].psnr  # type: ignore[operator]
    assert report.shown is not None
    torch.testing.assert_close(report.shown[:, 0], real[::5])
    torch.testing.assert_close(report.shown[:, -1], last[::5], rtol=1e-3, atol=1e-4)


def test_wrong_tokens_cost_more_and_belong_to_the_image(vae: VQVAE, report: TokenizerReport) -> None:
    data = load_dataset("digits", "val", 32)

    def run(**options: Any) -> Distance:
        report = evaluate_tokenizer(vae, data, count=COUNT, spaces=[Space("FD-x", features)], **options)
        return report.distances[0]

    (found,) = report.distances
    assert found.perturbed is not None and found.perturbed > found.reconstructions
    assert run(batch_size=30).perturbed == pytest.approx(found.perturbed, rel=1e-3)
    assert run(perturbed_tokens=0.0).perturbed == pytest.approx(found.reconstructions, rel=1e-3)
    without = run(perturbed_tokens=None)
    assert without.reconstructions == pytest.approx(found.reconstructions, rel=1e-3)
    assert without.perturbed is None
    assert run(seed=1).perturbed != pytest.approx(found.perturbed, rel=1e-2)
    far = run(perturbed_tokens=1.0, perturbed_codes=64).perturbed
    assert far is not None and far > found.perturbed


def test_rfid_is_that_of_the_pictures_an_export_would_write(vae: VQVAE, tmp_path: Path) -> None:
    """Beside `eval fid`'s arithmetic on the bytes of reconstructions and images."""
    data = load_dataset("digits", "val", 32)
    net = of_inception(random_inception(), "random")
    with torch.no_grad():
        x = data.batch([i * 200 // 4 for i in range(4)])[0]
        images = (x + 1) / 2
        output = (vae.img_to_reconstructed_img(x)[-1] + 1) / 2
        pixels = [(images * 255).round().to(torch.uint8), to_uint8(output).permute(0, 3, 1, 2)]
        pools = [net.compute(each)["pool"] for each in pixels]
    report = evaluate_tokenizer(vae, data, count=4, spaces=[net.space()], perturbed_tokens=None)
    assert report.distances[0].name == "FID"
    assert report.distances[0].reconstructions == pytest.approx(frechet_distance(*pools), rel=1e-3, abs=1e-6)
    assert "| rFID |" in report.as_markdown() and "| pFID" not in report.as_markdown()


def test_the_page(report: TokenizerReport, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    rows = [
        {"step": 1, "phase": "train", "loss": 1.0},
        {"step": 2, "phase": "val", "loss": 2.0, "usage": [1, 2], "perplexity": [3, 4]},
    ]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 3, "pha')  # cut by a kill
    page = report.write(tmp_path / "report", "A tokenizer", log)
    text = page.read_text()
    assert text.startswith("# A tokenizer\n\n30 images of digits, split 'val'; 32 px, 256 codes.")
    assert f"| PSNR (dB) | {report.psnr:.2f} |" in text and "| LPIPS (unnamed) |" in text
    assert "| rFD-x |" in text
    assert "| pFD-x, with 50% of tokens replaced by one of 8 nearest |" in text
    assert "| 1 x 1 | 30 |" in text and "(few)" in text
    pictures = {path.name for path in (tmp_path / "report").glob("*.png")}
    assert pictures == {"reconstructions.png", "scales.png", "course.png"}
    assert all(f"({name})" in text for name in pictures)
    found = json.loads(json.dumps(report.as_dict()))
    assert found["scales"][0]["side"] == 1 and "shown" not in found
    assert found["distances"] == [dataclasses.asdict(report.distances[0])]


def test_all_scales_alone(
    vae: VQVAE, report: TokenizerReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same figures but those of fewer scales, and each image is decoded once."""
    decoded: list[int] = []
    decode = VQVAE.fhat_to_img
    monkeypatch.setattr(VQVAE, "fhat_to_img", lambda self, f: decoded.append(len(f)) or decode(self, f))
    data = load_dataset("digits", "val", 32)
    lpips = lambda x, y: (x - y).abs().amax((1, 2, 3))  # noqa: E731
    options: dict[str, Any] = {"batch_size": 8, "spaces": [Space("FD-x", features)], "lpips": lpips}
    with threads(1):
        found = evaluate_tokenizer(vae, data, count=COUNT, partial=False, **options)
    assert sum(decoded) == 2 * COUNT  # and once more from perturbed tokens
    wanted, came = report.as_dict(), found.as_dict()
    for row in wanted["scales"]:
        row |= {"psnr": None, "ssim": None}
    assert came == wanted and json.dumps(came)
    text = found.write(tmp_path, "A tokenizer").read_text()
    assert f"| PSNR (dB) | {report.psnr:.2f} |" in text and "PSNR up to it" not in text
    lines = text.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("| scale |"))
    assert {line.count("|") for line in lines[head : head + 2 + len(found.scales)]} == {6}
    assert {path.name for path in tmp_path.iterdir()} == {"tokenizer.md", "scales.png"}
    assert "reconstructions.png" not in text and "![Codes in use and perplexity by scale](scales.png)" in text


def test_without_matplotlib_the_page_says_so(
    report: TokenizerReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    imported = builtins.__import__

    def without(name: str, *arguments: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return imported(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    text = report.write(tmp_path, "A tokenizer").read_text()
    assert "pip install 'var_ext[plots]'" in text and "scales.png" not in text
    assert not (tmp_path / "scales.png").exists() and (tmp_path / "reconstructions.png").exists()


def test_the_command(tmp_path: Path) -> None:
    arguments = ["eval", "tokenizer", "digits", "digits", "--count", "4", "--quiet", "--threads", "1"]
    done = CliRunner().invoke(
        main, [*arguments, "--out", str(tmp_path / "r"), "--json", str(tmp_path / "f.json")]
    )
    assert done.exit_code == 0, done.output
    assert "4 images of digits" in done.output and "FD-" not in done.output
    assert (tmp_path / "r" / "tokenizer.md").exists()
    figures = json.loads((tmp_path / "f.json").read_text())
    assert figures["count"] == 4 and figures["distances"] == [] and figures["lpips"] is None
    (tmp_path / "x.pth").write_bytes(b"x")
    done = CliRunner().invoke(main, [*arguments, "--out", str(tmp_path), "--lpips", str(tmp_path / "x.pth")])
    assert done.exit_code == 1 and "x.pth must be" in done.output
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 2 and "--out must name a folder for the page of digits" in done.output


def photos(folder: Path) -> Path:
    """Red above and blue below, turned by EXIF."""
    exif = Image.Exif()
    exif[274] = 6
    for split in ("train", "val"):
        (folder / split / "a").mkdir(parents=True)
        for i in range(3):
            pixels = np.zeros((40, 48, 3), np.uint8)
            pixels[:20, :, 0], pixels[20:, :, 2] = 200 + i, 200
            Image.fromarray(pixels).save(folder / split / "a" / f"{i}.jpg", exif=exif, quality=95)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    save_model(folder, load_tokenizer("digits"))
    rows = [{"step": step, "phase": "train", "loss": 1.0, "seconds": 1} for step in range(3)]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step"')
    return folder


def said(run: Path, *words: str, code: int = 0) -> str:
    arguments = ["eval", "tokenizer", str(run), *words, "--quiet", "--threads", "1"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == code, done.output
    return " ".join(done.output.split())


@pytest.mark.parametrize("kind", ["tokenizer", "var"])
def test_pictures_are_read_as_in_training(run: Path, tmp_path: Path, kind: str) -> None:
    data = str(photos(tmp_path / "photos"))
    plain = said(run, data)
    assert "read published and exact" in plain
    recipe = {"geometry": "upright", "decode": "fast"}
    (run / "recipe.json").write_text(json.dumps({"kind": kind, "recipe": recipe}))
    turned, psnr = said(run, data), re.compile(r"PSNR \(dB\) \| ([\d.]+)")
    assert "read upright and fast" in turned
    assert psnr.search(turned)[1] != psnr.search(plain)[1]  # type: ignore[index]
    asked = said(run, data, "--geometry", "published", "--decode", "exact")
    assert asked.partition("page:")[0] == plain.partition("page:")[0]
    assert (run / "report" / "course.png").exists() == (kind == "tokenizer")
    assert "read " not in said(run, "digits", "--count", "3")  # has no picture files
    assert "digits has none" in said(run, "digits", "--geometry", "upright", code=1)


def test_figures_come_before_the_page(run: Path, tmp_path: Path) -> None:
    (run / "report" / "reconstructions.png").mkdir(parents=True)  # no page can be written
    text = said(run, "digits", "--count", "3", "--json", str(tmp_path / "f.json"), code=1)
    assert "| PSNR (dB) |" in text and json.loads((tmp_path / "f.json").read_text())["count"] == 3


def test_equal_images_have_finite_figures(
    vae: VQVAE, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data = load_dataset("digits", "val", 32)
    monkeypatch.setattr(VQVAE, "fhat_to_img", lambda self, f_hat: data.batch([0])[0])
    found = evaluate_tokenizer(vae, data, count=1)
    assert found.psnr == pytest.approx(100) and "each at most 100 dB" in found.as_markdown()
    write_json(tmp_path / "f.json", found.as_dict())


@pytest.mark.parametrize("option", ["--perturb-tokens", "--perturb-codes"])
def test_perturbation_needs_a_space(run: Path, option: str) -> None:
    assert "are of the distances of --weights and --lite0, got none" in said(
        run, "digits", option, "1", code=2
    )


def test_images_too_small_for_lpips(vae: VQVAE) -> None:
    loss = LPIPS("vgg16")
    loss.smallest = 33
    with pytest.raises(ValueError, match=r"at least 33 x 33 pixels, got 32 x 32: leave out lpips$"):
        evaluate_tokenizer(vae, load_dataset("digits", "val", 32), lpips=loss)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "must be at least 1, got 200, 0 and 32"),
        ({"batch_size": 0}, "must be at least 1, got 200, None and 0"),
        ({"perturbed_tokens": 1.5}, r"perturbed_tokens must be in \[0, 1\] .* got 1.5 and 8"),
        ({"perturbed_codes": 0}, "perturbed_codes at least 1, got 0.5 and 0"),
        ({"count": 1, "spaces": [Space("FD-x", features)]}, "needs at least 2 images, got 1"),
    ],
)
def test_what_is_refused(vae: VQVAE, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_tokenizer(vae, load_dataset("digits", "val", 32), **options)


def test_images_of_another_size_are_refused(vae: VQVAE) -> None:
    with pytest.raises(ValueError, match="must be of the tokenizer's 32 px, got 16"):
        evaluate_tokenizer(vae, load_dataset("digits", "val", 16))
    small = VQVAE(vocab_size=4, z_channels=4, ch=32, ch_mult=(1, 1), v_patch_nums=(1, 4))
    with pytest.raises(ValueError, match="at least 11 px, got 8"):
        evaluate_tokenizer(small, load_dataset("digits", "val", 8))
