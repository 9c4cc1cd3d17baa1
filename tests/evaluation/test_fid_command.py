"""`var-ext eval fid` and `var-ext reference`, with the whole Inception on a few images; and what they refuse."""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch.nn import functional as F

from tests.evaluation.inception import random_inception, save_pth
from tests.evaluation.test_fid import counting, linear, pictures, save
from tests.tiny import tiny
from tests.training.vits import vit_entries
from var_ext.checkpoints import save_model
from var_ext.cli import main
from var_ext.evaluation import features, image_sources
from var_ext.evaluation.efficientnet_lite0 import EfficientNetLite0
from var_ext.evaluation.feature_store import FeatureStore
from var_ext.evaluation.fid import evaluate_fid
from var_ext.evaluation.fid_reference import read_reference, write_reference
from var_ext.evaluation.frechet import frechet_distance
from var_ext.evaluation.image_sources import open_images
from var_ext.evaluation.inception_weights import HUB_FILE
from var_ext.training.frozen_vit import load_vit


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fid")
    save_pth(random_inception(), folder / "inception.pth")
    torch.manual_seed(0)
    torch.save(EfficientNetLite0().state_dict(), folder / "lite0.pth")
    save(folder / "samples.npz", pictures(6, 1))
    save(folder / "real.npz", pictures(5, 5))
    (folder / "photos").mkdir()
    for i, image in enumerate(pictures(5, 5)):
        Image.fromarray(image).save(folder / "photos" / f"{i}.png")
    return folder


def call(*words: object, fails: bool = False) -> str:
    result = CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False)
    assert (result.exit_code != 0) == fails, result.output
    return result.output


NAMES = {
    "FID", "sFID", "IS", "IS shuffled", "precision", "recall", "precision fp32", "recall fp32", "KID", "KID deviation",
}  # fmt: skip


def both_commands(files: Path, tmp_path: Path) -> str:
    weights = ("--weights", files / "inception.pth", "--quiet", "--threads", 1)
    out, found = tmp_path / "ref.npz", tmp_path / "fid.json"
    assert str(out) in call("reference", files / "photos", "--out", out, *weights)
    assert sorted(tmp_path.iterdir()) == [out]  # and no features
    text = call("eval", "fid", files / "samples.npz", "--reference", out, *weights, "--json", found)
    report = json.loads(found.read_text())
    assert set(report["figures"]) == NAMES
    assert f"| FID | {report['figures']['FID']:.4f} |" in text
    assert "sha256 of their values" in text and "Beware: 6 images: published figures" in text
    assert (
        len(list((tmp_path / "fid.json.features").iterdir())) == 2
    )  # of samples, and of the reference's images
    return text


def test_both_commands(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, object]] = []
    monkeypatch.setattr(features, "inception", lambda path, **options: asked.append(options) or linear())
    both_commands(files, tmp_path)
    assert asked == [{"precision": "fp32", "device": "cpu"}] * 2


@pytest.mark.slow
def test_both_commands_with_the_whole_network(files: Path, tmp_path: Path) -> None:
    assert "inception.pth, sha256" in both_commands(files, tmp_path)


def test_another_space_has_another_name(files: Path, tmp_path: Path) -> None:
    options = ("--features", "lite0", "--lite0", files / "lite0.pth", "--quiet", "--threads", 1)
    found = tmp_path / "fd.json"
    text = call(
        "eval", "fid", files / "samples.npz", "--reference", files / "photos", *options, "--json", found
    )
    assert "FID" not in text.replace("FID is", "") and "| FD-lite0 |" in text
    assert set(json.loads(found.read_text())["figures"]) == {
        "FD-lite0", "precision (lite0)", "recall (lite0)", "precision fp32 (lite0)", "recall fp32 (lite0)",
        "KD (lite0)", "KD (lite0) deviation",
    }  # fmt: skip


@torch.no_grad()
def test_the_space_of_a_vit(files: Path, tmp_path: Path) -> None:
    torch.save(vit_entries(), tmp_path / "vit.pth")
    options = ("--features", "vit", "--vit", tmp_path / "vit.pth", "--quiet", "--threads", 1)
    found = tmp_path / "fd.json"
    call("eval", "fid", files / "samples.npz", "--reference", files / "photos", *options, "--json", found)
    figures = json.loads(found.read_text())["figures"]
    extractor = features.vit(tmp_path / "vit.pth")
    title = extractor.titles["pool"]
    sets = [torch.from_numpy(pictures(*which)).permute(0, 3, 1, 2) for which in ((6, 1), (5, 5))]
    mine, real = (extractor.compute(pixels)["pool"] for pixels in sets)
    assert title.startswith("FD-vit-") and figures[title] == pytest.approx(
        frechet_distance(mine, real), rel=1e-6
    )
    # its input is resized and scaled to -1..1, and the class token is normed
    x = F.interpolate(sets[0].float() / 255, (224, 224), mode="bicubic", antialias=True).clamp(0, 1) * 2 - 1
    torch.testing.assert_close(mine, load_vit(str(tmp_path / "vit.pth"), 224)(x)[-1][:, 0])


def test_the_space_of_clip(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("var_ext.evaluation.features.clip", lambda path, **options: linear())
    (tmp_path / "clip.pth").touch()
    options = (
        "--features",
        "clip",
        "--clip",
        tmp_path / "clip.pth",
        "--quiet",
        "--json",
        tmp_path / "fd.json",
    )
    call("eval", "fid", files / "samples.npz", "--reference", files / "photos", *options)
    assert "FID" in json.loads((tmp_path / "fd.json").read_text())["figures"]
    said = call(
        "eval", "fid", files / "samples.npz", "--reference", files / "photos", *options[2:], fails=True
    )
    assert "--clip is of --features clip, got --features inception" in said


def test_a_model_is_drawn(files: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "model", *tiny())
    options = ("--features", "lite0", "--lite0", files / "lite0.pth", "--quiet", "--threads", 1)
    words = (
        "eval",
        "fid",
        tmp_path / "model",
        "--reference",
        files / "photos",
        *options,
        "--precision",
        "fp32",
    )
    text = call(*words, "--per-class", 2, "--labels", "0,3", "--seed", 5, "--cfg", 2)
    assert (
        "4 of model, " in text and "2 classes, 2 images each" in text and "255 times the value, cut" in text
    )


FLOATS = np.full((4, 8, 8, 3), np.nan, np.float32)
STATISTICS = {
    "mu": np.zeros(2048, np.float32), "sigma": np.eye(2048), "mu_s": np.zeros(2023), "sigma_s": np.eye(2023),
}  # fmt: skip


def _truncated(folder: Path) -> Path:
    path = save(folder / "bad.npz", pictures(4, 1))
    path.write_bytes(path.read_bytes()[:-100])
    return path


def _damaged(folder: Path) -> Path:
    """Compressed, with bytes in the middle overwritten."""
    path = folder / "bad.npz"
    np.savez_compressed(path, arr_0=pictures(40, 1))
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 50] = bytes(50)
    path.write_bytes(content)
    return path


def _short(folder: Path) -> Path:
    """A member with fewer bytes than its header says."""
    save(folder / "whole.npz", pictures(4, 1))
    with zipfile.ZipFile(folder / "whole.npz") as whole, zipfile.ZipFile(folder / "bad.npz", "w") as bad:
        bad.writestr("arr_0.npy", whole.read("arr_0.npy")[:-10])
    return folder / "bad.npz"


def _broken_picture(folder: Path) -> Path:
    (folder / "bad").mkdir()
    (folder / "bad" / "a.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    return folder / "bad"


def _npz(folder: Path, **arrays: np.ndarray) -> Path:
    np.savez(folder / "bad.npz", **arrays)  # type: ignore[arg-type]
    return folder / "bad.npz"


def _folder(folder: Path, *names: str) -> Path:
    (folder / "bad").mkdir()
    for name in names:
        (folder / "bad" / name).parent.mkdir(exist_ok=True)
        if name.endswith(".png"):
            Image.fromarray(pictures(1, 1)[0]).save(folder / "bad" / name)
        else:
            (folder / "bad" / name).touch()
    return folder / "bad"


BAD_SAMPLES = {
    "truncated": (_truncated, "bad.npz must be a complete .npz file, but cannot be read to its end"),
    "damaged": (_damaged, "bad.npz must be a complete .npz file, but cannot be read to its end"),
    "short": (_short, r"arr_0 of .*bad.npz must have 768 bytes for its shape \(4, 8, 8, 3\), got 758"),
    "no archive": (lambda f: (f / "bad.npz").write_bytes(b"no") and f / "bad.npz", "must be a complete .npz file"),
    "pickled": (lambda f: _npz(f, arr_0=np.array([{}, {}])), "must hold numbers, got Python objects.*nothing of them"),
    "floats": (lambda f: _npz(f, arr_0=FLOATS), r"\(N, H, W, 3\) uint8 .*got \(4, 8, 8, 3\) float32: .*without NaN"),
    "channels first": (lambda f: _npz(f, arr_0=np.zeros((4, 3, 8, 8), np.uint8)), "move the channels to the end"),
    "gray": (lambda f: _npz(f, arr_0=np.zeros((4, 8, 8), np.uint8)), r"got \(4, 8, 8\) uint8"),
    "fortran": (lambda f: _npz(f, arr_0=np.asfortranarray(pictures(4, 1))), "C order, got Fortran order"),
    "empty": (lambda f: _npz(f, arr_0=np.zeros((0, 8, 8, 3), np.uint8)), "must have images, got none"),
    "other array": (lambda f: _npz(f, images=pictures(4, 1)), "must have an array arr_0, got images"),
    "one image": (lambda f: _npz(f, arr_0=pictures(1, 1)), "need at least 4 images of both kinds, got 1 of bad.npz"),
    "three images": (lambda f: _npz(f, arr_0=pictures(3, 1)), "need at least 4 images of both kinds, got 3 of bad.npz"),
    "empty folder": (lambda f: _folder(f), r"bad must hold images \(.png.*\), got nothing"),
    "texts": (lambda f: _folder(f, "a.txt"), "got a.txt"),
    "mixed": (lambda f: _folder(f, "a.png", "c/b.png"), "pictures or class folders of them, got a.png beside c/"),
    "broken picture": (_broken_picture, "a.png"),
    "a file": (lambda f: (f / "bad.txt").touch() or f / "bad.txt", "a folder of .*bad.txt, where there is a file"),
    "nothing": (lambda f: f / "bad.npz", "bad.npz does not exist"),
}  # fmt: skip


# As other programs damage files: a compression or an encryption that is unknown, a header that is no header.
def _patched(folder: Path, at: int, value: int) -> Path:
    path = folder / "bad.npz"
    np.savez_compressed(path, arr_0=pictures(4, 1))
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"PK\x01\x02")
    for start in (0, entry + 2):  # of the file, and of the table at its end
        content[start + at] = value
    path.write_bytes(content)
    return path


def _header(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "bad.npz", "w") as bad:
        text = b"{'descr': '|u1', 'shape': (4, 8, 8"
        bad.writestr("arr_0.npy", b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text)
    return folder / "bad.npz"


BAD_SAMPLES |= {
    "unknown compression": (lambda f: _patched(f, 8, 97), "must be a complete .npz file"),
    "encrypted": (lambda f: _patched(f, 6, 1), "must be a complete .npz file"),
    "header": (_header, "must be an array as numpy.save writes it"),
}


def _covariance(at: tuple[int, int], value: float) -> np.ndarray:
    found = np.eye(2048)
    found[at] = value
    return found


BAD_REFERENCES = {
    "not symmetric": (lambda f: _npz(f, **{**STATISTICS, "sigma": _covariance((0, 5), 1.0)}), "is not symmetric"),
    "negative": (
        lambda f: _npz(f, **{**STATISTICS, "sigma": -np.eye(2048)}), "must be a covariance, but has the eigenvalue -1"
    ),
    "neither": (lambda f: _npz(f, other=np.zeros(3)), r"must have images \(arr_0\) or statistics .*, got other"),
    "no sigma": (lambda f: _npz(f, mu=np.zeros(2048)), "must have mu and sigma, got no sigma"),
    "shapes": (lambda f: _npz(f, **{**STATISTICS, "sigma": np.eye(5)}), r"\(D,\) and \(D, D\), got \(2048,\)"),
    "integers": (lambda f: _npz(f, **{**STATISTICS, "sigma": np.eye(2048, dtype=int)}), "must be floats .* int64"),
    "NaN": (lambda f: _npz(f, **{**STATISTICS, "mu_s": np.full(2023, np.nan)}), "mu_s and sigma_s .* must be finite"),
    "other network": (
        lambda f: _npz(f, **{**STATISTICS, "mu": np.zeros(64), "sigma": np.eye(64)}),
        "mu of bad.npz must have 2048 features, as Inception's, got 64",
    ),
    "pickled": (lambda f: _npz(f, mu=np.array([{}]), sigma=np.eye(1)), "got Python objects"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_SAMPLES)
def test_refuses_bad_samples(files: Path, tmp_path: Path, case: str) -> None:
    make, message = BAD_SAMPLES[case]
    out = tmp_path / "out" / "fid.json"
    options = (
        "--features",
        "lite0",
        "--lite0",
        files / "lite0.pth",
        "--quiet",
        "--threads",
        1,
        "--json",
        out,
    )
    found = call("eval", "fid", make(tmp_path), "--reference", files / "real.npz", *options, fails=True)
    _check(found, message, out)


@pytest.mark.parametrize("case", BAD_REFERENCES)
def test_refuses_bad_references(files: Path, tmp_path: Path, case: str) -> None:
    make, message = BAD_REFERENCES[case]
    out = tmp_path / "out" / "fid.json"
    options = ("--weights", files / "inception.pth", "--quiet", "--threads", 1, "--json", out)
    found = call("eval", "fid", files / "samples.npz", "--reference", make(tmp_path), *options, fails=True)
    _check(found, message, out)


def _check(found: str, message: str, out: Path) -> None:
    assert re.search(message, found), found
    assert found.startswith("Error: ") and len(found.strip().splitlines()) == 1
    assert not out.exists()  # nothing half-written
    assert not [path for path in out.parent.rglob("*") if path.name.endswith(".tmp")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--lite0", "L"), "--lite0 is of --features lite0, got --features inception"),
        (("--features", "lite0"), "--features lite0 needs its weights: name a file with --lite0"),
        (("--features", "lite0", "--lite0", "L", "--weights", "L"), "--weights is of --features inception"),
        (("--features", "lite0", "--lite0", "L", "--net-precision", "bf16"), "--net-precision is of"),
        (("--seed", "3", "--cfg", "2"), "--seed, --cfg are of a model that draws, got the images"),
        (("--features", "lite0", "--lite0", "L", "--image-size", "16"), "only pictures of folders are cropped"),
        (("--weights", "L"), "must hold the 472 entries of FID's Inception of 2015"),
        ((), HUB_FILE),
    ],
)  # fmt: skip
def test_refuses_options(
    files: Path, tmp_path: Path, options: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    words = [str(files / "lite0.pth") if word == "L" else word for word in options]
    found = call("eval", "fid", files / "samples.npz", "--reference", files / "real.npz", *words, fails=True)
    assert message in found


def test_statistics_serve_inception_alone(files: Path, tmp_path: Path) -> None:
    reference = _npz(tmp_path, **STATISTICS)
    words = ("eval", "fid", files / "samples.npz", "--reference", reference, "--quiet")
    found = call(*words, "--features", "lite0", "--lite0", files / "lite0.pth", fails=True)
    assert "bad.npz has statistics of Inception alone, which say nothing in another space" in found


def test_says_what_samples_may_be(files: Path) -> None:
    found = call("eval", "fid", "sampels/", "--reference", files / "real.npz", *_lite0(files), fails=True)
    assert (
        "SAMPLES must be NAME.npz, a folder of pictures, or a model, got sampels/: the model must be" in found
    )


def _lite0(files: Path) -> tuple[object, ...]:
    return ("--features", "lite0", "--lite0", files / "lite0.pth")


def test_a_reference_is_written_to_a_file(files: Path, tmp_path: Path) -> None:
    words = (
        "reference",
        files / "photos",
        "--weights",
        files / "inception.pth",
        "--out",
        tmp_path / "ref.pth",
    )
    assert "must be written to NAME.npz" in call(*words, fails=True)
    assert not list(tmp_path.iterdir())


def test_a_reference_does_not_replace_its_images(files: Path, tmp_path: Path) -> None:
    path = save(tmp_path / "images.npz", pictures(6, 1))
    before = path.read_bytes()
    link = tmp_path / "link.npz"
    link.symlink_to(path)
    for out in (path, link):
        with pytest.raises(ValueError, match=r"must not replace the images it is of, got .*npz"):
            write_reference(open_images(path), linear(), out, tmp_path / "cache")
    assert path.read_bytes() == before


def test_other_arrays_of_a_file_do_not_matter(tmp_path: Path) -> None:
    for other in (np.array(5), np.array([{}], dtype=object), np.array(["a"] * 6)):
        np.savez(tmp_path / "images.npz", arr_0=pictures(6, 1), arr_1=other)
        assert open_images(tmp_path / "images.npz").labels is None


def test_a_distance_that_the_reference_lacks_is_named(files: Path, tmp_path: Path) -> None:
    reference = tmp_path / "pool.npz"
    size = linear().fields["pool"]
    np.savez(reference, mu=np.zeros(size), sigma=np.eye(size), arr_0=pictures(6, 2))
    report = evaluate_fid(open_images(files / "samples.npz"), read_reference(reference), linear())
    assert report is not None and "sFID" not in report.figures
    assert any(warning.startswith("sFID is left out") for warning in report.warnings)


def test_a_late_rank_leaves_no_features(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 comes, or comes again, when rank 0 has written the file and removed the features."""
    monkeypatch.setattr(image_sources, "BLOCK", 2)
    seen: list[int] = []
    monkeypatch.setattr(features, "inception", lambda path, **options: counting(seen))
    monkeypatch.setenv("WORLD_SIZE", "2")
    out = tmp_path / "ref.npz"
    words = ("reference", files / "photos", "--out", out, "--quiet", "--threads", 1)
    for rank in ("1", "0", "1"):
        monkeypatch.setenv("RANK", rank)
        call(*words)
    assert list(tmp_path.iterdir()) == [out] and sum(seen) == 5
    with np.load(out) as there:
        assert len(there["arr_0"]) == 5


def test_features_that_go_while_a_late_rank_looks_at_them(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    images, cache = open_images(files / "real.npz"), tmp_path / "cache"
    monkeypatch.setattr(image_sources, "BLOCK", 2)
    write_reference(images, linear(), tmp_path / "ref.npz", cache)
    missing = FeatureStore.missing

    def removed_afterwards(store: FeatureStore) -> list[int]:
        found = missing(store)
        shutil.rmtree(cache)
        return found

    monkeypatch.setattr(FeatureStore, "missing", removed_afterwards)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert write_reference(images, counting(seen), tmp_path / "ref.npz", cache) is None
    assert not seen and not cache.exists()


def test_the_same_reference_is_not_made_anew(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(features, "inception", lambda path, **options: counting(seen))
    out = tmp_path / "ref.npz"

    def written(images: str) -> None:
        seen.clear()
        words = ("reference", files / images, "--out", out, "--quiet", "--threads", 1)
        assert str(out) in call(*words)

    written("photos")
    whole = out.read_bytes()
    written("photos")
    assert not seen and out.read_bytes() == whole
    out.write_bytes(whole[:-30])  # cut short
    written("photos")
    assert sum(seen) == 5 and out.read_bytes() == whole
    written("samples.npz")
    assert sum(seen) == 6 and out.read_bytes() != whole


def test_several_spaces_and_real_images(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "inception", lambda path, **options: linear())
    found, real = tmp_path / "fd.json", save(tmp_path / "val.npz", pictures(6, 7))
    words = ("eval", "fid", files / "samples.npz", "--reference", files / "photos", "--quiet", "--threads", 1)
    options = ("--features", "inception,lite0", "--lite0", files / "lite0.pth")
    text = call(*words, *options, "--real", real, "--json", found)
    figures = json.loads(found.read_text())["figures"]
    assert {"FID", "FD-lite0", "FID of real images", "FDr (FID)", "FDr (FD-lite0)", "FDr"} < set(figures)
    assert f"| FDr | {figures['FDr']:.4f} |" in text
    assert figures["FDr"] == pytest.approx((figures["FDr (FID)"] + figures["FDr (FD-lite0)"]) / 2, rel=1e-12)
    assert len(list((tmp_path / "fd.json.features").iterdir())) == 6  # of three sets in two spaces


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--features", "inception,dino"), "must be some of inception, lite0, vit, clip, each once, got"),
        (("--features", "lite0,lite0", "--lite0", "L"), "each once, got 'lite0,lite0'"),
        (("--features", "inception,"), "each once, got 'inception,'"),
        (("--features", "inception,lite0"), "--features lite0 needs its weights: name a file with --lite0"),
        (("--features", "inception,lite0", "--lite0", "L", "--vit", "L"),
         "--vit is of --features vit, got --features inception,lite0"),
        (("--features", "lite0", "--lite0", "L", "--real", "S"), "must have an array arr_0, got mu, sigma"),
        (("--features", "lite0", "--lite0", "L", "--real", "R"), "must be others than those of the reference"),
        (("--features", "lite0", "--lite0", "L", "--real", "R/none"), "does not exist"),
    ],
)  # fmt: skip
def test_refuses_spaces_and_real_images(
    files: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    np.savez(tmp_path / "s.npz", mu=np.zeros(3), sigma=np.eye(3))
    there = {"L": files / "lite0.pth", "S": tmp_path / "s.npz", "R": files / "real.npz"}
    words = [str(there.get(word, word)) for word in options]
    found = call("eval", "fid", files / "samples.npz", "--reference", files / "real.npz", *words, fails=True)
    assert message in found


def test_a_page_is_of_one_space(files: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "model", *tiny())
    words = ("report", tmp_path / "model", "--out", tmp_path / "page", "--reference", files / "real.npz")
    said = call(*words, "--features", "inception,lite0", "--lite0", files / "lite0.pth", fails=True)
    assert "--features must be one space here, got inception,lite0" in said
