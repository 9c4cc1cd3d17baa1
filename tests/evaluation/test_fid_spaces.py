"""`evaluate_fid` in several feature spaces, and FDr."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.evaluation import adm
from tests.evaluation.test_fid import Killed, features, linear, pictures, save, small_blocks  # noqa: F401
from var_ext.data import DataError
from var_ext.evaluation.features import Extractor
from var_ext.evaluation.fid import evaluate_fid
from var_ext.evaluation.fid_reference import read_reference, write_reference
from var_ext.evaluation.fid_report import FidReport
from var_ext.evaluation.image_sources import NpzImages, open_images

OTHER = 5  # features of the other space


def other(seen: list[int] | None = None, least: int | None = None) -> Extractor:
    """A second space: notes how many images were computed, and fails after that many."""
    whole = linear()

    def compute(pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        if seen is not None:
            if least is not None and sum(seen) + len(pixels) > least:
                raise Killed
            seen.append(len(pixels))
        return {"pool": 3 * whole.compute(pixels)["spatial"][:, :OTHER]}

    return replace(
        whole, titles={"pool": "FD-other"}, fields={"pool": OTHER}, compute=compute, logits=None,
        suffix=" (other)", weights="other.pth", digest="4567",
    )  # fmt: skip


def run(folder: Path, *spaces: Extractor, reference: str = "real.npz", **options: object) -> FidReport:
    images = open_images(folder / "samples.npz")
    report = evaluate_fid(images, read_reference(folder / reference), spaces, **options)  # type: ignore[arg-type]
    assert report is not None
    return report


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spaces")
    for name, which in {"samples": (120, 1), "real": (110, 5), "val": (120, 6)}.items():
        save(folder / f"{name}.npz", pictures(*which))
    return folder


def test_figures_are_those_of_each_space_alone(folder: Path) -> None:
    both, alone = run(folder, linear(), other()), [run(folder, each) for each in (linear(), other())]
    assert both.figures == {**alone[0].figures, **alone[1].figures}
    text = both.as_markdown()
    for wanted in ("| weights | linear.pth", "| weights (other) | other.pth", "| network (other) |",
                   "| precision and recall (other) |", "| FD-other | ", "| KD (other) | "):  # fmt: skip
        assert wanted in text
    facts = json.loads(json.dumps(both.as_dict()))["facts"]
    assert facts["count"] == 120 and "weights" not in facts
    assert {title: each["digest"] for title, each in facts["spaces"].items()} == {
        "FID": "0123", "FD-other": "4567",
    }  # fmt: skip
    assert alone[1].facts["digest"] == "4567" and "spaces" not in alone[1].facts
    said = "\n".join(both.warnings)
    assert said.count("120 images: published figures are of 50000") == 1
    assert "statistics are of the 110 images of real.npz" in said


def test_pixels_are_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    load = NpzImages.load
    monkeypatch.setattr(NpzImages, "load", lambda self, block: asked.append(len(block)) or load(self, block))
    run(folder, linear(), other(), real=open_images(folder / "val.npz"))
    assert sum(asked) == 120 + 110 + 120


def test_a_cache_of_one_space_serves_several(folder: Path, tmp_path: Path) -> None:
    """Killed in one space, then one alone, then both: no block is computed twice."""
    first: list[int] = []
    with pytest.raises(Killed):
        run(folder, linear(), other(first, least=60), cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2  # the first block, of 50 images, in both spaces
    seen: list[int] = []
    run(folder, other(seen), cache=tmp_path)
    assert sum(seen) == 70 + 110
    report = run(folder, linear(), other(seen), cache=tmp_path)
    assert sum(seen) == 70 + 110 and report.figures == run(folder, linear(), other()).figures


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_all_spaces(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int
) -> None:
    val = open_images(folder / "val.npz")
    wanted = run(folder, linear(), other(), real=val)
    monkeypatch.setenv("WORLD_SIZE", str(world))
    seen: list[int] = []
    for rank in reversed(range(world)):
        monkeypatch.setenv("RANK", str(rank))
        report = evaluate_fid(
            open_images(folder / "samples.npz"), read_reference(folder / "real.npz"), [linear(), other(seen)],
            real=val, cache=tmp_path, patience=0,
        )  # fmt: skip
        assert (report is None) == (rank > 0)
    assert report is not None and report.figures == wanted.figures and report.warnings == wanted.warnings
    assert sum(seen) == 120 + 110 + 120


def test_fdr_is_the_mean_of_ratios(folder: Path) -> None:
    report = run(folder, linear(), other(), real=open_images(folder / "val.npz"))
    ratios = []
    for title, field, size in (("FID", "pool", None), ("FD-other", "spatial", OTHER)):
        sets = [
            features(pictures(*which))[field][:, :size].astype(np.float64)
            for which in ((120, 1), (110, 5), (120, 6))
        ]
        unit = adm.frechet(sets[2], sets[1])
        ratios.append(adm.frechet(sets[0], sets[1]) / unit)
        scale = (
            1 if title == "FID" else 9
        )  # the other space is three times as large: of no effect on the ratio
        assert report.figures[f"{title} of real images"] == pytest.approx(scale * unit, rel=1e-6)
        assert report.figures[f"FDr ({title})"] == pytest.approx(ratios[-1], rel=1e-6)  # features are float32
    assert report.figures["FDr"] == pytest.approx(sum(ratios) / 2, rel=1e-6)
    assert "the 120 images of val.npz" in report.conventions["FDr"]
    assert "mean over 2 spaces, FID, FD-other" in report.conventions["FDr"]
    assert report.facts["real"] == "val.npz" and report.facts["real_images"] == 120
    assert "FDr" not in "\n".join(report.warnings)


def test_one_space_has_a_ratio_and_no_mean(folder: Path) -> None:
    report = run(folder, linear(), real=open_images(folder / "val.npz"))
    assert {"FID of real images", "FDr (FID)"} < set(report.figures) and "FDr" not in report.figures
    assert "mean over" not in report.conventions["FDr"]
    assert not any("FDr" in name or "of real" in name for name in run(folder, linear()).figures)


def test_statistics_of_a_file_serve_inception_and_its_images_the_others(folder: Path, tmp_path: Path) -> None:
    path = write_reference(
        open_images(folder / "real.npz"), linear(), tmp_path / "ref.npz", tmp_path / "c", kept=80
    )
    assert path is not None
    val = open_images(folder / "val.npz")
    report = run(folder, linear(), other(), reference=str(path), real=val)
    by_images = run(folder, linear(), reference="real.npz", real=val)
    for name in ("FID", "FDr (FID)"):
        assert report.figures[name] == pytest.approx(by_images.figures[name], rel=1e-12)
    assert report.conventions["FID and sFID"].endswith("statistics of the reference file")
    assert report.conventions["FD-other"].endswith("statistics of the reference's 80 images")
    spaces = report.facts["spaces"]
    assert spaces["FID"]["reference_statistics"] and not spaces["FD-other"]["reference_statistics"]
    with np.load(path) as there:
        np.savez(tmp_path / "few.npz", mu=there["mu"], sigma=there["sigma"])
    with pytest.raises(
        DataError, match=r"few\.npz has statistics of Inception alone.*images \(arr_0\), or a folder"
    ):
        run(folder, linear(), other(), reference=str(tmp_path / "few.npz"))
    alone = run(folder, linear(), reference=str(tmp_path / "few.npz"), real=val)
    assert alone.figures["FDr (FID)"] == pytest.approx(by_images.figures["FDr (FID)"], rel=1e-12)


def test_real_images_that_are_no_unit(folder: Path, tmp_path: Path) -> None:
    seen: list[int] = []
    with pytest.raises(
        ValueError, match=r"others than those of the reference.*got real\.npz for both: hold some"
    ):
        run(folder, other(seen), real=open_images(folder / "real.npz"))
    with pytest.raises(ValueError, match=r"at least 2 images, got 1 of one\.npz"):
        run(folder, other(seen), real=open_images(save(tmp_path / "one.npz", pictures(1, 9))))
    assert not seen  # before features
    np.savez_compressed(tmp_path / "again.npz", arr_0=pictures(110, 5))
    with pytest.raises(
        ValueError, match=r"must differ from the reference, got the FD-other .* of again\.npz: hold"
    ):
        run(folder, other(), real=open_images(tmp_path / "again.npz"))


def test_warnings_about_real_images(folder: Path, tmp_path: Path) -> None:
    some = save(tmp_path / "some.npz", np.concatenate([pictures(60, 6), pictures(110, 5)[:7]]))
    said = "\n".join(run(folder, other(), real=open_images(some)).warnings)
    assert (
        "FDr is of 120 samples and 67 real images, and a distance is larger for fewer: take equally many"
        in said
    )
    assert "7 of 67 real images are in the reference too" in said and "FDr compares equal sizes" not in said
    whole = other()
    any_size = replace(whole, compute=lambda pixels: whole.compute(pixels[:, :, :8, :8]))
    large = save(tmp_path / "large.npz", pictures(120, 6, 16))
    said = "\n".join(run(folder, any_size, real=open_images(large)).warnings)
    assert "samples are of 8 x 8, the real images of 16 x 16: FDr compares equal sizes" in said


def test_refuses_spaces_that_cannot_be_told_apart(folder: Path) -> None:
    with pytest.raises(ValueError, match="distances of different names, got FD-other twice"):
        run(folder, other(), linear(), other())
    with pytest.raises(ValueError, match="there must be a feature space, got none"):
        run(folder)
