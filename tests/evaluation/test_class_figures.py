"""The linear probe, the spread within a class, and the section of a page that is made of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.evaluation.test_fid import linear
from tests.tiny import tiny
from var_ext.data import load_dataset
from var_ext.evaluation import ReportOptions, class_section, write_model_report
from var_ext.evaluation.class_figures import RIDGE, LinearProbe, spread
from var_ext.evaluation.dataset_images import DatasetImages
from var_ext.evaluation.model_subject import Subject
from var_ext.sampling import Sampler


def clouds(
    per_class: int, distance: float, dim: int = 7, classes: int = 3
) -> tuple[torch.Tensor, torch.Tensor]:
    """Classes around corners `distance` from a common centre that is far from 0."""
    generator = torch.Generator().manual_seed(per_class)
    labels = torch.arange(classes).repeat(per_class)
    features = torch.randn(len(labels), dim, generator=generator) + 30
    features[torch.arange(len(labels)), labels] += distance
    return features, labels


def test_a_probe_tells_classes_that_lie_apart() -> None:
    probe = LinearProbe(*clouds(50, 12.0), 3)
    assert probe.accuracy(
        *clouds(40, 12.0),
    ) == [1.0, 1.0, 1.0]
    features, labels = clouds(400, 0.0)  # nothing to tell
    assert all(
        abs(share - 1 / 3) < 0.2 for share in LinearProbe(*clouds(50, 0.0), 3).accuracy(features, labels)
    )


def test_a_probe_is_ridge_regression_with_classes_weighed_alike() -> None:
    features, labels = clouds(30, 2.0)
    some = torch.cat([torch.arange(0, 90), torch.arange(0, 90, 3)])  # class 0 twice as often
    probe = LinearProbe(features[some], labels[some], 3)
    # the same by least squares over rows, scaled by the root of their weight, and rows for the ridge
    counts = np.array([60, 30, 30])
    root = np.sqrt(1 / counts[labels[some]] / 3)[:, None]
    x = features[some].double().numpy()
    mean = (root**2 * x).sum(0)
    x = root * (x - mean)
    y = root * (np.eye(3)[labels[some]] - 1 / 3)
    ridge = math.sqrt(RIDGE * np.diag(x.T @ x).mean()) * np.eye(7)
    wanted = np.linalg.lstsq(np.vstack([x, ridge]), np.vstack([y, np.zeros((7, 3))]), rcond=None)[0]
    np.testing.assert_allclose(probe.weight, wanted, rtol=1e-9, atol=1e-12)


def test_features_that_never_vary_do_no_harm() -> None:
    features, labels = clouds(20, 9.0)
    constant = torch.cat([features, torch.full((len(features), 4), 5.0)], 1)
    assert LinearProbe(constant, labels, 3).accuracy(constant, labels) == [1.0, 1.0, 1.0]
    nothing = torch.full((9, 2), 3.0)
    assert LinearProbe(nothing, torch.arange(9) % 3, 3).predict(nothing).shape == (9,)


def test_a_class_without_images_has_no_accuracy() -> None:
    features, labels = clouds(20, 9.0)
    here = labels != 1
    found = LinearProbe(features, labels, 3).accuracy(features[here], labels[here])
    assert found[0] == found[2] == 1.0 and math.isnan(found[1])


def test_spread_is_over_all_pairs() -> None:
    features, labels = clouds(9, 3.0)
    for label, value in enumerate(spread(features, labels, 3)):
        mine = features[labels == label].double()
        pairs = (mine[:, None] - mine[None]).square().sum(2)
        assert value == pytest.approx(float(pairs.sum()) / (9 * 8), rel=1e-12)
    assert spread(features[:1].repeat(5, 1), torch.zeros(5, dtype=torch.int64), 2)[0] == 0.0
    assert all(math.isnan(each) for each in spread(features[:1], labels[:1], 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(9, dtype=torch.int64)}, r"of all 3 classes, got none of \[1, 2\]"),
        ({"labels": torch.arange(9)}, "labels must be in 0..2, got 0 to 8"),
        ({"labels": torch.arange(3)}, r"features must be \(N, D\) and labels \(N,\), got \(9, 7\) and \(3,\)"),
        ({"features": torch.full((9, 7), math.nan)}, "features must be finite"),
    ],
)  # fmt: skip
def test_refuses(change: dict[str, Any], message: str) -> None:
    features, labels = clouds(3, 1.0)
    given = {"features": features, "labels": labels, **change}
    with pytest.raises(ValueError, match=message):
        LinearProbe(given["features"], given["labels"], 3)
    if "none of" not in message:
        with pytest.raises(ValueError, match=message):
            spread(given["features"], given["labels"], 3)


def test_the_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held-out images in place of samples have their accuracy, and a spread of 1 where there are two."""
    pytest.importorskip("sklearn")
    sampler = Sampler(*tiny(patch_nums=(1, 2, 4, 8), num_classes=10), precision="fp32", defaults={"top_k": 8})
    data = tuple(load_dataset("digits", split, sampler.image_size) for split in ("train", "val"))
    options = ReportOptions(
        count=1, grid_cfg=(0,), grid_top_p=(0.9,), grid_labels=(1,), per_class=4, speed_batches=(1,), repeats=1,
        reconstructions=2, neighbours=2, search=200, class_images=3, batch_size=4,
    )  # fmt: skip

    def written(folder: Path) -> tuple[dict[str, Any], str]:
        page = write_model_report(sampler, "tiny", folder, options=options, data=data, extractor=linear(16))  # type: ignore[arg-type]
        assert page is not None
        return json.loads((folder / "classes.json").read_text())["result"], page.read_text()

    result, text = written(tmp_path / "drawn")
    assert result["counts"] == {"train": 200, "held_out": 30, "samples": 30}
    assert len(result["rows"]) == 10 and "| all | " in text and "judges 30 samples" in text
    monkeypatch.setattr(class_section, "DrawnImages", lambda *_: DatasetImages(data[1], 30))
    result, _ = written(tmp_path / "real")
    assert all(row["spread"] in (1, None) and row["samples"] == row["held_out"] for row in result["rows"])
    assert sum(row["held_out"] for row in result["rows"]) > 3  # random features, yet far above chance


def subject(sampler: Sampler, folder: Path, **options: Any) -> Subject:
    train, held_out = (load_dataset("digits", split, sampler.image_size) for split in ("train", "val"))
    return Subject(
        sampler, "tiny", "digest", ReportOptions(**options), folder, folder, {}, {}, train, held_out,
        extractor=linear(sampler.image_size),
    )  # fmt: skip


def test_the_section_needs_training_images_of_every_class_before_it_draws(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    sampler = Sampler(*tiny(patch_nums=(1, 2, 4, 8), num_classes=10), precision="fp32", defaults={"top_k": 8})
    lacking = class_section.classes(subject(sampler, tmp_path, search=9)).lacking
    assert lacking.startswith("9 of 1197 training images are searched") and "a larger `--search`" in lacking
    found = [class_section.classes(subject(sampler, tmp_path, search=400, class_images=n)) for n in (None, 3)]
    assert [each.settings["class_images"] for each in found] == [20, 3]  # as few as make 200
    with pytest.raises(ValueError, match="class_images 0"):
        ReportOptions(class_images=0)
