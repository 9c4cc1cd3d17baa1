"""The page of a model: its sections, what is kept and made again, kills and ranks, and what is refused."""

from __future__ import annotations

import builtins
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.evaluation.test_fid import linear, save
from tests.evaluation.test_fid import pictures as noise
from tests.tiny import tiny
from var_ext.data import DataError, load_dataset
from var_ext.evaluation import (
    ReportOptions,
    comparing_sections,
    evaluate_fid,
    guidance_grid,
    model_sections,
    open_images,
    read_reference,
    write_model_report,
)
from var_ext.evaluation.comparing_sections import guidance
from var_ext.evaluation.dataset_images import DatasetImages, ReconstructedImages
from var_ext.evaluation.fid_reference import Reference
from var_ext.evaluation.image_sources import DrawnImages
from var_ext.evaluation.kept import Kept
from var_ext.evaluation.model_subject import Subject
from var_ext.evaluation.neighbours import Searched, nearest
from var_ext.export import evaluation_plan, export_images
from var_ext.sampling import Sampler

pytest.importorskip("sklearn")
SIDE = 16
SCALES = (1, 2, 4, 8)
FEW = ReportOptions(
    count=2, grid_cfg=(0, 2), grid_top_p=(0.9,), per_class=2, speed_batches=(1, 2), repeats=1, reconstructions=3,
    neighbours=7, search=50, batch_size=4,
)  # fmt: skip
TITLES = [
    "The model and its surroundings", "Samples by class and seed", "Speed", "Reconstruction by scales",
    "Classes", "Nearest training images", "Guidance x top-p",
]  # fmt: skip


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    return Sampler(*tiny(patch_nums=SCALES), precision="fp32", defaults={"top_k": 8})


def digits(side: int = SIDE) -> Any:
    return tuple(load_dataset("digits", split, side) for split in ("train", "val"))


def write(sampler: Sampler, folder: Path, options: ReportOptions = FEW, **others: Any) -> str:
    given: dict[str, Any] = {"data": digits(), "extractor": linear(SIDE), "machine": {"chip": "a chip"}}
    page = write_model_report(sampler, "tiny", folder, options=options, **{**given, **others})
    return "" if page is None else page.read_text()


@pytest.fixture(scope="module")
def page(sampler: Sampler, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    write(sampler, folder)
    return folder


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the parts of a page are computed."""
    seen = Counter[str]()

    def count(module: Any, name: str) -> None:
        whole = getattr(module, name)

        def counting(*arguments: Any, **options: Any) -> Any:
            seen[name] += 1
            return whole(*arguments, **options)

        monkeypatch.setattr(module, name, counting)

    count(model_sections, "labelled_grid")
    count(model_sections, "measure")
    count(model_sections, "evaluate_tokenizer")
    count(comparing_sections, "nearest")
    count(guidance_grid, "evaluate_fid")
    return seen


def test_the_page(page: Path) -> None:
    text = (page / "report.md").read_text()
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == TITLES
    assert text.startswith("# The model tiny\n") and "| chip | a chip |" in text and "| digest | " in text
    for name in ("samples", "tokenizer/reconstructions", "neighbours", "trade-off"):
        assert f"]({name}.png)" in text and Image.open(page / f"{name}.png").width > 64
    assert "Rows are classes, columns seeds; cfg 1.5, top_k 8, top_p 0.96, fp32." in text
    assert "3 images of digits, split 'val'; 16 px, 16 codes." in text and "| rFID |" in text
    assert "L2 in the space of FID to the nearest of 50 of 1197 training images" in text
    assert "The data has 10 classes and the model 5" in text  # these are not its images
    assert "| cfg | top-p | FID | sFID | IS | precision | recall | KID |" in text
    assert "| reference | 50 of 1197 images of digits, split 'train' |" in text
    assert "Beware: 10 images: published figures are of 50000" in text and "Not done yet" not in text


def test_cells_are_what_eval_fid_says_of_an_export(sampler: Sampler, page: Path, tmp_path: Path) -> None:
    """Of cfg 2; the other one has other figures."""
    plan = evaluation_plan(5, 2, batch_size=4, cfg=2, top_p=0.9, top_k=8)
    samples = open_images(export_images(sampler, plan, tmp_path / "s.npz"))
    train = DatasetImages(digits()[0], 50)
    real = np.concatenate([train.load(block) for block in train.blocks])
    report = evaluate_fid(samples, read_reference(save(tmp_path / "r.npz", real)), linear(SIDE))
    assert report is not None
    other, cell = (json.loads((page / f"guidance/cfg-{cfg}-top-p-0.9.json").read_text()) for cfg in (0, 2))
    assert cell["result"]["figures"] == pytest.approx(dict(report.figures), rel=1e-9)
    assert other["result"]["figures"]["FID"] != pytest.approx(report.figures["FID"], rel=1e-6)
    result = json.loads((page / "guidance.json").read_text())["result"]
    assert result["cells"] == [other["result"], cell["result"]]
    text = (page / "report.md").read_text()
    best = min((other["result"], cell["result"]), key=lambda each: each["figures"]["FID"])
    assert text.count("| **") == 1 and f"| {best['cfg']} | 0.9 | **{best['figures']['FID']:.4g}** |" in text


def test_the_same_again_computes_nothing(sampler: Sampler, page: Path, computed: Counter[str]) -> None:
    before = {path: path.read_bytes() for path in page.rglob("*") if path.is_file()}
    write(sampler, page)
    assert not computed
    after = {path: path.read_bytes() for path in page.rglob("*") if path.is_file()}
    # the plot is drawn anew, its bytes may name a date
    assert {p: b for p, b in after.items() if p.suffix != ".png"} == {
        p: b for p, b in before.items() if p.suffix != ".png"
    }


@pytest.mark.parametrize(("labels", "per_class"), [(None, 20), ((1, 4, 2), 34)])
def test_a_cell_has_100_images_unless_told(sampler: Sampler, labels: Any, per_class: int) -> None:
    reference = Reference("r", {}, DatasetImages(digits()[0], 5))
    options = ReportOptions(grid_labels=labels)
    of = Subject(
        sampler, "tiny", "", options, Path(), Path(), {}, {}, reference=reference, extractor=linear(SIDE)
    )
    cells = guidance(of).settings["cells"]
    plan = evaluation_plan(labels or 5, per_class, batch_size=32, cfg=0.0, top_p=0.9, top_k=8)
    assert len(cells) == 8 and cells[0]["images"] == DrawnImages(sampler, plan, "tiny").key


CHANGES: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "count": ({"count": 3}, {"labelled_grid": 1}),
    "repeats": ({"repeats": 2}, {"measure": 2}),
    "reconstructions": ({"reconstructions": 4}, {"evaluate_tokenizer": 1}),
    "neighbours": ({"neighbours": 6}, {"nearest": 1}),
    "a cell more": ({"grid_cfg": (0, 1, 2)}, {"evaluate_fid": 1}),
    "per_class": ({"per_class": 3}, {"evaluate_fid": 2}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_asked_otherwise_is_made_again(
    sampler: Sampler, page: Path, tmp_path: Path, computed: Counter[str], change: str
) -> None:
    for path in page.rglob("*"):
        if path.is_file():
            (tmp_path / path.relative_to(page)).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path.relative_to(page)).write_bytes(path.read_bytes())
    options, wanted = CHANGES[change]
    write(sampler, tmp_path, ReportOptions(**{**vars(FEW), **options}))
    assert computed == wanted


def test_another_model_machine_or_a_lost_picture(
    sampler: Sampler, tmp_path: Path, computed: Counter[str]
) -> None:
    alone: dict[str, Any] = {"data": None, "extractor": None}
    write(sampler, tmp_path, **alone)
    write(sampler, tmp_path, **alone, machine={"chip": "another"})
    assert computed == {"labelled_grid": 1, "measure": 4}
    (tmp_path / "samples.png").unlink()
    write(sampler, tmp_path, **alone, machine={"chip": "another"})
    assert computed == {"labelled_grid": 2, "measure": 4}
    other = Sampler(*tiny(1, patch_nums=SCALES), precision="fp32", defaults={"top_k": 8})
    write(other, tmp_path, **alone, machine={"chip": "another"})
    assert computed == {"labelled_grid": 3, "measure": 6}


class Killed(Exception):
    pass


def test_goes_on_after_a_kill(
    sampler: Sampler, page: Path, tmp_path: Path, computed: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = guidance_grid.evaluate_fid

    def second_is_killed(*arguments: Any, **options: Any) -> Any:
        if computed["evaluate_fid"]:
            raise Killed
        return whole(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(guidance_grid, "evaluate_fid", second_is_killed)
        with pytest.raises(Killed):
            write(sampler, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert text.endswith("## Guidance x top-p\n\nNot done yet: the same command goes on.\n")
    assert not list(tmp_path.rglob("*.tmp"))
    write(sampler, tmp_path)
    assert computed == {
        "labelled_grid": 1, "measure": 2, "evaluate_tokenizer": 1, "nearest": 1, "evaluate_fid": 2,
    }  # fmt: skip
    for name in ("guidance", "neighbours", "reconstructions", "samples"):
        assert json.loads((tmp_path / f"{name}.json").read_text()) == json.loads(
            (page / f"{name}.json").read_text()
        )


def test_ranks_share_features(sampler: Sampler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks of 4 images, so that both ranks have some; rank 0 finds those of rank 1 and waits for nothing."""
    monkeypatch.setattr("var_ext.evaluation.image_sources.BLOCK", 4)
    alone, both = tmp_path / "alone", tmp_path / "both"
    write(sampler, alone)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert write(sampler, both) == ""
    shared = {path.name for path in (both / "features").iterdir()}
    assert shared and [path.name for path in both.iterdir()] == ["features"]  # and writes no result
    monkeypatch.setenv("RANK", "0")
    assert "Not done yet" not in write(sampler, both)
    assert shared < {path.name for path in (both / "features").iterdir()}
    for name in ("guidance.json", "neighbours.json"):
        assert (both / name).read_bytes() == (alone / name).read_bytes()


def test_without_matplotlib_the_page_says_so(
    sampler: Sampler, page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    imported = builtins.__import__

    def without(name: str, *arguments: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return imported(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    text = write(sampler, tmp_path)
    assert text.count("There are no plots: they need matplotlib, `pip install 'var_ext[plots]'`.") == 2
    assert "trade-off.png" not in text and "scales.png" not in text and "](samples.png)" in text


@pytest.mark.parametrize("extractor", [None, linear(SIDE)], ids=["pixels", "features"])
def test_copies_are_seen(
    sampler: Sampler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extractor: Any
) -> None:
    """A model that draws training images: all of them nearer than held-out images, at distance 0."""
    train = DatasetImages(digits()[0], 50)
    monkeypatch.setattr(
        DrawnImages, "load", lambda self, block: train.load(range(block.start + 20, block.stop + 20))
    )
    data, options = digits(), ReportOptions(**{**vars(FEW), "grid_cfg": (0,)})
    text = write(sampler, tmp_path, options, data=data, extractor=extractor)
    result = json.loads((tmp_path / "neighbours.json").read_text())["result"]
    assert (
        result["table"]["near"] == 1
        and result["table"]["samples_median"] == 0 < result["table"]["real_median"]
    )
    assert [each["distances"][0] for each in result["nearest"]] == [0] * 6
    where = "pixels in [0, 1]" if extractor is None else "the space of FID"
    assert f"L2 in {where}" in text and "| median | 0 |" in text
    assert ("Left out: give `--reference REF`" in text) == (extractor is None)
    picture = np.asarray(Image.open(tmp_path / "neighbours.png"))
    sample, first = (picture[22:86, -4 * 68 + 68 * k : -4 * 68 + 68 * k + 64] for k in (0, 1))
    assert (sample == first).all() and np.ptp(sample) > 100


def test_nearest_is_by_all_pairs_and_in_order() -> None:
    queries, rows = torch.randn(5, 7), torch.randn(23, 7)
    rows[11] = queries[3]
    rows[20] = rows[4]  # of equal ones the first
    found, places = nearest(queries, rows.split(6), 3)
    all_pairs = (queries[:, None].double() - rows[None]).norm(dim=2)
    wanted, order = all_pairs.sort(dim=1, stable=True)
    torch.testing.assert_close(found, wanted[:, :3], rtol=1e-12, atol=0)
    assert torch.equal(places, order[:, :3]) and found[3, 0] == 0 and places[3, 0] == 11
    assert nearest(queries, [rows[:2]], 3)[0].shape == (5, 2)


def test_images_of_a_data_set() -> None:
    data = digits()[0]
    images = DatasetImages(data, 10)
    places = [i * 1197 // 10 for i in range(10)]
    assert images.count == 10 and images.total == 1197 and images.labels == data.labels[places].tolist()
    pixels = images.load(range(2, 5))
    wanted = (data.batch(places[2:5])[0] + 1) / 2 * 255
    assert pixels.shape == (3, SIDE, SIDE, 3) and pixels.dtype == np.uint8
    assert (torch.from_numpy(pixels).permute(0, 3, 1, 2) - wanted).abs().max() <= 0.5 + 1e-4
    assert images.key == DatasetImages(data, 10).key
    assert len({images.key, DatasetImages(data, 9).key, DatasetImages(digits()[1], 10).key}) == 3
    assert DatasetImages(data).count == DatasetImages(data, 5000).count == 1197


def test_reconstructions_of_a_data_set() -> None:
    vae, _ = tiny(patch_nums=SCALES)
    images = DatasetImages(digits()[0], 7)
    found = ReconstructedImages(images, vae, batch_size=3)
    assert (found.count, found.size, found.labels) == (images.count, images.size, images.labels)
    assert (
        found.key
        != ReconstructedImages(images, tiny(1, patch_nums=SCALES)[0], batch_size=3).key
        != images.key
    )
    x = torch.from_numpy(images.load(range(7))).permute(0, 3, 1, 2).float() / 127.5 - 1
    wanted = torch.cat([vae.reconstruct(each[None])[0] for each in x]).clamp(-1, 1)
    pixels = torch.from_numpy(found.load(range(2, 6))).permute(0, 3, 1, 2)
    assert (pixels - (wanted[2:6] + 1) / 2 * 255).abs().max() <= 1 + 1e-2  # truncated, as exports are
    with pytest.raises(ValueError, match="the tokenizer's 16 x 16, got 8 x 8"):
        ReconstructedImages(DatasetImages(digits(8)[0], 7), vae)


def test_features_of_a_search_are_the_same_at_hand_and_kept(tmp_path: Path) -> None:
    images = DatasetImages(digits()[0], 70)
    for extractor in (None, linear(SIDE)):
        searched = Searched(images, extractor, tmp_path, batch_size=32)
        searched.fill()
        rows = list(searched.rows())
        assert [len(part) for part in rows] == [64, 6]
        torch.testing.assert_close(torch.cat(rows), searched.features(images.load(range(70))), rtol=0, atol=0)
    assert len(list(tmp_path.iterdir())) == 1  # pixels are not kept


def test_kept(tmp_path: Path) -> None:
    kept, settings = Kept(tmp_path), {"a": (1, 2), "b": None}
    assert kept.read("x/y", settings) is None
    assert kept.write("x/y", settings, {"found": (3,)}) == kept.read("x/y", settings) == {"found": [3]}
    assert kept.read("x/y", {**settings, "b": 0}) is None
    assert kept.read("x/y", settings, ["picture.png"]) is None
    for damage in ('{"settings": {"a": [1', "[]", '{"result": {}}', '{"settings": {"a": [1, 2], "b": null}}'):
        (tmp_path / "x/y.json").write_text(damage)
        assert kept.read("x/y", settings) is None


def test_refuses_in_python(sampler: Sampler, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data must be of the model's 16 px, got 24"):
        write(sampler, tmp_path, data=digits(24))
    reference = read_reference(save(tmp_path / "r.npz", noise(4, 1, 8)))
    with pytest.raises(DataError, match=r"the model's 16 x 16, got 8 x 8 in r\.npz"):
        write(sampler, tmp_path, reference=reference)
    with pytest.raises(ValueError, match=r"reference r\.npz must come with an extractor, got none"):
        write(sampler, tmp_path, reference=reference, extractor=None)
    with pytest.raises(ValueError, match=r"at least 1, got count 0, speed_batches\[1\] 0"):
        ReportOptions(count=0, speed_batches=(1, 0))
    with pytest.raises(ValueError, match="a cfg, a top_p and a batch size to try"):
        ReportOptions(grid_cfg=())
    with pytest.raises(ValueError, match="top_p must be"):
        write(sampler, tmp_path, ReportOptions(grid_top_p=(1.5,)))
    released = Sampler(*tiny(patch_nums=SCALES), precision="fp32", release=True)
    released([0], [0])
    with pytest.raises(RuntimeError, match="this sampler has released them"):
        write(released, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["r.npz"]
