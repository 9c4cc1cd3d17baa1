"""`evaluate_fid` from images to figures, on a small linear network: ADM's arithmetic, sources, ranks and kills."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.evaluation import adm
from tests.tiny import tiny
from var_ext.checkpoints import CheckpointError
from var_ext.data import DataError
from var_ext.evaluation import guards, image_sources
from var_ext.evaluation.features import Extractor
from var_ext.evaluation.fid import evaluate_fid
from var_ext.evaluation.fid_reference import read_reference, write_reference
from var_ext.evaluation.fid_report import FidReport
from var_ext.evaluation.image_sources import DrawnImages, FolderImages, NpzImages, open_images
from var_ext.export import evaluation_plan, export_images, wait_for_files
from var_ext.sampling import Sampler

POOL, SPATIAL, CLASSES = 16, 9, 7


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_sources, "BLOCK", 50)


def linear(side: int = 8) -> Extractor:
    """Features by products with fixed weights; deterministic for each image, in any batch."""
    generator = torch.Generator().manual_seed(3)
    weights = torch.randn(3 * side * side, POOL + SPATIAL, generator=generator, dtype=torch.float64) / side
    head = torch.randn(POOL, CLASSES, generator=generator)

    def compute(pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        x = (pixels.flatten(1).double() / 255 - 0.5) @ weights
        return {"pool": x[:, :POOL].relu().float(), "spatial": x[:, POOL:].float()}

    return Extractor(
        titles={"pool": "FID", "spatial": "sFID"},
        fields={"pool": POOL, "spatial": SPATIAL},
        compute=compute,
        logits=lambda pool: pool @ head * 2,
        suffix="",
        weights="linear.pth",
        digest="0123",
        precision="fp32",
        resize="none",
    )


def pictures(count: int, seed: int, side: int = 8) -> np.ndarray:
    """(N, S, S, 3) uint8: means and contrasts vary."""
    random = np.random.default_rng(seed)
    base = random.integers(40, 200, (count, 1, 1, 3)) + random.normal(0, 30 + seed, (count, side, side, 3))
    return base.clip(0, 255).astype(np.uint8)


def save(path: Path, images: np.ndarray, **others: np.ndarray) -> Path:
    np.savez(path, arr_0=images, **others)
    return path


def features(images: np.ndarray) -> dict[str, np.ndarray]:
    found = linear(images.shape[1]).compute(torch.from_numpy(images).permute(0, 3, 1, 2))
    return {name: each.numpy() for name, each in found.items()}


def run(samples: Path, reference: Path, **options: object) -> FidReport:
    report = evaluate_fid(open_images(samples), read_reference(reference), linear(), **options)  # type: ignore[arg-type]
    assert report is not None
    return report


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fid")
    save(folder / "samples.npz", pictures(430, 1))
    save(folder / "real.npz", pictures(210, 5))
    return folder


def test_figures_are_those_of_adm(folder: Path) -> None:
    report = run(folder / "samples.npz", folder / "real.npz")
    mine, real = features(pictures(430, 1)), features(pictures(210, 5))
    found = report.figures
    for title, field in (("FID", "pool"), ("sFID", "spatial")):
        wanted = adm.frechet(mine[field].astype(np.float64), real[field].astype(np.float64))
        assert found[title] == pytest.approx(wanted, rel=1e-9)
    logits = linear().logits
    assert logits is not None
    scores = logits(torch.from_numpy(mine["pool"])).numpy()
    assert found["IS"] == pytest.approx(adm.inception_score(scores), rel=1e-9)
    for half, suffix in ((True, ""), (False, " fp32")):
        wanted = adm.precision_recall(mine["pool"], real["pool"], half=half)
        assert (found[f"precision{suffix}"], found[f"recall{suffix}"]) == wanted
    kernel = adm.kernel_distance(*(x["pool"].astype(np.float64) for x in (mine, real)), 100, 210)
    assert (found["KID"], found["KID deviation"]) == pytest.approx(kernel, rel=1e-8)
    text = report.as_markdown()
    assert f"| FID | {found['FID']:.4f} |" in text and "linear.pth, sha256 of their values 0123" in text
    assert "430 of samples.npz, 8 x 8, order: as in the file; classes not known" in text
    written = json.loads(json.dumps(report.as_dict()))
    assert written["figures"] == dict(found)
    facts = dict(count=430, size=[8, 8], digest="0123", precision="fp32", reference_images=210)
    assert facts.items() <= written["facts"].items()


def test_a_set_is_at_no_distance_from_itself(folder: Path) -> None:
    found = run(folder / "real.npz", folder / "real.npz").figures
    assert found["FID"] < 1e-9 and found["sFID"] < 1e-9
    assert found["precision"] == found["recall"] == 1


def test_a_reference_in_adms_layout(folder: Path, tmp_path: Path) -> None:
    images = open_images(folder / "real.npz")
    path = write_reference(images, linear(), tmp_path / "ref.npz", tmp_path / "cache", kept=100)
    with np.load(tmp_path / "ref.npz") as there:  # what ADM's evaluator calls
        assert sorted(there.keys()) == ["arr_0", "mu", "mu_s", "sigma", "sigma_s"]
        whole = features(pictures(210, 5))
        for mu, sigma, field in (("mu", "sigma", "pool"), ("mu_s", "sigma_s", "spatial")):
            np.testing.assert_allclose(there[mu], whole[field].astype(np.float64).mean(0), rtol=1e-12)
            np.testing.assert_allclose(there[sigma], np.cov(whole[field], rowvar=False), rtol=1e-5, atol=1e-8)
        assert np.array_equal(there["arr_0"], pictures(210, 5)[np.arange(100) * 210 // 100])
    assert path is not None
    by_file, by_images = run(folder / "samples.npz", path), run(folder / "samples.npz", folder / "real.npz")
    for title in ("FID", "sFID", "IS"):
        assert by_file.figures[title] == pytest.approx(by_images.figures[title], rel=1e-12)
    mine, kept = features(pictures(430, 1))["pool"], whole["pool"][np.arange(100) * 210 // 100]
    wanted = adm.precision_recall(mine, kept, half=True)
    assert (by_file.figures["precision"], by_file.figures["recall"]) == wanted
    assert "statistics of the reference file" in by_file.as_markdown()
    again = write_reference(images, linear(), tmp_path / "again.npz", tmp_path / "cache", kept=100)
    assert again is not None and again.read_bytes() == path.read_bytes()


def test_statistics_alone_give_distances_and_scores(folder: Path, tmp_path: Path) -> None:
    write_reference(open_images(folder / "real.npz"), linear(), tmp_path / "ref.npz", tmp_path / "cache")
    with np.load(tmp_path / "ref.npz") as there:
        np.savez(tmp_path / "few.npz", mu=there["mu"], sigma=there["sigma"])
    report = run(folder / "samples.npz", tmp_path / "few.npz")
    assert set(report.figures) == {"FID", "IS", "IS shuffled"}
    assert any("few.npz has no images: precision, recall" in text for text in report.warnings)


@pytest.mark.parametrize("kind", ["pngs", "class folders", "compressed"])
def test_sources_give_the_same_figures(folder: Path, tmp_path: Path, kind: str) -> None:
    images = pictures(130, 2)
    save(tmp_path / "a.npz", images)
    wanted = run(tmp_path / "a.npz", folder / "real.npz").figures
    if kind == "compressed":
        np.savez_compressed(tmp_path / "b.npz", arr_0=images)
        assert run(tmp_path / "b.npz", folder / "real.npz").figures == wanted
        return
    for i, image in enumerate(images):
        place = tmp_path / "pngs" / ("" if kind == "pngs" else f"{i // 20:02d}") / f"{i:06d}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place)
    report = run(tmp_path / "pngs", folder / "real.npz")
    assert report.figures == wanted
    order = (
        "by name; classes not known" if kind == "pngs" else "by class folder and name; 7 classes, 10 to 20"
    )
    assert order in report.conventions["samples"]


def test_a_model_draws_on_the_way(tmp_path: Path) -> None:
    """The same figures as of the file that `var-ext sample` writes, and features alone are kept."""
    sampler = Sampler(*tiny(), precision="fp32")
    plan = evaluation_plan(5, 13, 7, batch_size=8, top_k=0, top_p=0.0)
    export_images(sampler, plan, tmp_path / "drawn.npz")
    save(tmp_path / "real.npz", pictures(90, 5, sampler.image_size))
    drawn = DrawnImages(sampler, plan, "tiny")
    assert drawn.blocks[0] == range(0, 48) and drawn.count == 65
    extractor, reference = linear(sampler.image_size), read_reference(tmp_path / "real.npz")
    streamed = evaluate_fid(drawn, reference, extractor, cache=tmp_path / "cache")
    written = evaluate_fid(open_images(tmp_path / "drawn.npz"), reference, extractor)
    assert streamed is not None and written is not None
    # blocks of 48 and of 50: sums in another order
    assert streamed.figures == pytest.approx(written.figures, rel=1e-8)
    assert "65 of tiny" in streamed.conventions["samples"]
    assert "5 classes, 13 images each" in streamed.conventions["samples"]
    assert "5 classes, 13 images each" in written.conventions["samples"]  # of the plan beside the file
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".npy"}
    other = DrawnImages(sampler, evaluation_plan(5, 13, 8, batch_size=8, top_k=0, top_p=0.0), "tiny")
    assert other.key != drawn.key


class Killed(Exception):
    pass


def counting(seen: list[int], least: int | None = None) -> Extractor:
    """Notes how many images were computed, and fails after that many."""
    whole = linear()

    def compute(pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        if least is not None and sum(seen) + len(pixels) > least:
            raise Killed
        seen.append(len(pixels))
        return whole.compute(pixels)

    return replace(whole, compute=compute)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_and_kills_change_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int
) -> None:
    wanted = run(folder / "samples.npz", folder / "real.npz")
    monkeypatch.setenv("WORLD_SIZE", str(world))
    seen: list[int] = []

    def rank(number: int, least: int | None = None) -> FidReport | None:
        monkeypatch.setenv("RANK", str(number))
        return evaluate_fid(
            open_images(folder / "samples.npz"),
            read_reference(folder / "real.npz"),
            counting(seen, least),
            cache=tmp_path,
            patience=0,
        )

    with pytest.raises(Killed):
        rank(world - 1, 120)
    kept = len(list(tmp_path.iterdir()))
    assert kept == 2 and not [path for path in tmp_path.iterdir() if path.suffix != ".npy"]
    seen.clear()
    for number in reversed(range(1, world)):
        assert rank(number) is None
    if world > 1:
        monkeypatch.setenv("RANK", "0")
    report = rank(0)
    assert report is not None and report.figures == wanted.figures and report.warnings == wanted.warnings
    assert sum(seen) == 430 + 210 - 100  # nothing twice
    again = rank(0)
    assert again is not None and again.figures == wanted.figures and sum(seen) == 540


def test_rank_0_names_ranks_that_are_lost(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    images, reference = open_images(folder / "samples.npz"), read_reference(folder / "real.npz")
    with pytest.raises(CheckpointError, match=r"lacks 6 of 9 blocks of features, of rank 1, 2 of 3"):
        evaluate_fid(images, reference, linear(), cache=tmp_path, patience=0)
    with pytest.raises(
        ValueError, match="3 ranks must share a folder of features, got none: name one with --cache"
    ):
        evaluate_fid(images, reference, linear())


@pytest.mark.parametrize("damage", [lambda whole: whole[:100], lambda whole: b"", lambda whole: whole[:-8]])
def test_a_damaged_block_is_made_again(
    folder: Path, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    first = run(folder / "samples.npz", folder / "real.npz", cache=tmp_path)
    block = sorted(tmp_path.iterdir())[2]
    block.write_bytes(damage(block.read_bytes()))
    assert run(folder / "samples.npz", folder / "real.npz", cache=tmp_path).figures == first.figures


def test_features_are_found_by_what_they_depend_on(folder: Path, tmp_path: Path) -> None:
    seen: list[int] = []

    def measured(samples: Path, **changes: str) -> None:
        seen.clear()
        extractor = replace(counting(seen), **changes)  # type: ignore[arg-type]
        evaluate_fid(open_images(samples), read_reference(folder / "real.npz"), extractor, cache=tmp_path)

    samples = save(tmp_path / "samples.npz", pictures(60, 1))
    measured(samples)
    assert sum(seen) == 270
    os.utime(samples)
    measured(samples)
    assert not seen  # the same bytes
    for changes in ({"digest": "other"}, {"precision": "bf16"}):
        measured(samples, **changes)
        assert sum(seen) == 270
    measured(save(tmp_path / "samples.npz", pictures(60, 2)))
    assert sum(seen) == 60


def test_too_few_images_are_noticed_before_features(folder: Path, tmp_path: Path) -> None:
    few, one = save(tmp_path / "few.npz", pictures(3, 1)), save(tmp_path / "one.npz", pictures(1, 1))
    seen: list[int] = []
    for pair in ((few, folder / "real.npz"), (folder / "samples.npz", few)):
        with pytest.raises(ValueError, match=r"need at least 4 images of both kinds, got 3 of few\.npz"):
            evaluate_fid(open_images(pair[0]), read_reference(pair[1]), counting(seen))
    with pytest.raises(ValueError, match=r"at least 2 images, got 1 of one\.npz"):
        write_reference(open_images(one), counting(seen), tmp_path / "ref.npz", tmp_path / "cache")
    write_reference(open_images(folder / "real.npz"), linear(), tmp_path / "ref.npz", tmp_path / "cache")
    with np.load(tmp_path / "ref.npz") as there:
        np.savez(tmp_path / "statistics.npz", mu=there["mu"], sigma=there["sigma"])
    with pytest.raises(ValueError, match=r"at least 2 images, got 1 of one\.npz"):
        evaluate_fid(open_images(one), read_reference(tmp_path / "statistics.npz"), counting(seen))
    assert not seen


def test_a_block_at_a_time_is_in_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    load = NpzImages.load
    monkeypatch.setattr(NpzImages, "load", lambda self, block: asked.append(len(block)) or load(self, block))
    run(folder / "samples.npz", folder / "real.npz")
    assert max(asked) == 50 and sum(asked) == 640


def test_float32_is_not_rounded_on_gpus(folder: Path) -> None:
    """Convolutions and products in TF32 keep 10 bits; torch has it on for convolutions unless told."""
    whole, seen = linear(), []

    def noticed(given: torch.Tensor) -> torch.Tensor:
        seen.append((torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()))
        return given

    assert whole.logits is not None
    logits = whole.logits
    extractor = replace(
        whole,
        compute=lambda pixels: whole.compute(noticed(pixels)),
        logits=lambda pool: logits(noticed(pool)),
    )
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    try:
        evaluate_fid(open_images(folder / "real.npz"), read_reference(folder / "real.npz"), extractor)
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cudnn.allow_tf32 = before
    assert set(seen) == {(False, "highest")}


def warnings_of(samples: Path, reference: Path) -> str:
    return "\n".join(run(samples, reference).warnings)


def test_warnings(folder: Path, tmp_path: Path) -> None:
    images = pictures(60, 1)
    turns, ordered = np.arange(60) % 6, np.arange(60) // 10
    found = warnings_of(save(tmp_path / "a.npz", images, arr_1=turns), folder / "real.npz")
    assert "60 images: published figures are of 50000, and FID is larger for fewer" in found
    assert "statistics are of the 210 images of real.npz, not of a whole data set" in found
    for text in ("class order", "equally often", "equal another", "JPEG", "samples are of"):
        assert text not in found
    found = warnings_of(save(tmp_path / "b.npz", images, arr_1=ordered), folder / "real.npz")
    assert (
        "images are in class order (92% are followed by one of their class): the Inception Score in file"
        in found
    )
    assert "Let classes take turns, as `var-ext sample --out NAME.npz` does" in found
    unequal = np.where(np.arange(60) < 30, 0, turns)
    found = warnings_of(save(tmp_path / "c.npz", images, arr_1=unequal), folder / "real.npz")
    assert "classes are not equally often there, 5 to 35 images each" in found
    twice = np.concatenate([images[:50], images[:10]])
    found = warnings_of(save(tmp_path / "d.npz", twice), folder / "real.npz")
    assert "10 of 60 images equal another to the pixel" in found
    large = save(tmp_path / "large.npz", np.zeros((5, 16, 16, 3), np.uint8))
    report = evaluate_fid(open_images(folder / "samples.npz"), read_reference(large), _any_size())
    assert report is not None
    assert "samples are of 8 x 8, the reference of 16 x 16" in "\n".join(report.warnings)
    rough = replace(linear(), precision="bf16")
    report = evaluate_fid(open_images(folder / "real.npz"), read_reference(folder / "real.npz"), rough)
    assert report is not None and "the network computed in bf16, which moves FID" in "\n".join(
        report.warnings
    )
    (tmp_path / "jpegs").mkdir()
    for i in range(20):
        Image.fromarray(images[i]).save(tmp_path / "jpegs" / f"{i}.{'jpg' if i % 2 else 'png'}")
    assert "10 of 20 files are JPEG" in warnings_of(tmp_path / "jpegs", folder / "real.npz")


def _any_size() -> Extractor:
    whole = linear()
    return replace(whole, compute=lambda pixels: whole.compute(pixels[:, :, :8, :8]))


def test_class_order_shows_without_labels(tmp_path: Path) -> None:
    """Two chunks of one class each: the score in file order is 1, shuffled it is that of two classes."""
    images = np.zeros((5200, 2, 2, 3), np.uint8)
    images[5000:] = 255
    images[np.arange(5200), 0, 0, 0] = np.random.default_rng(0).integers(0, 255, 5200)  # not all the same
    sharp = linear(2)
    extractor = replace(
        sharp,
        logits=lambda pool: torch.stack([pool[:, 0], -pool[:, 0]], 1),
        compute=lambda pixels: {
            "pool": torch.where(pixels[:, 2, 1, 1, None] > 0, 40.0, -40.0).expand(-1, POOL)
            + pixels[:, 0, 0, 0, None] / 255,
            "spatial": pixels.flatten(1)[:, :SPATIAL].float(),
        },
    )
    save(tmp_path / "a.npz", images)
    images = images[np.random.default_rng(1).permutation(5200)]
    save(tmp_path / "b.npz", images)
    few = save(tmp_path / "few.npz", images[:20])
    found = {}
    for name in "ab":
        report = evaluate_fid(open_images(tmp_path / f"{name}.npz"), read_reference(few), extractor)
        assert report is not None
        found[name] = "\n".join(report.warnings)
    assert (
        "images seem to be in class order: the Inception Score in file order (1.00, shuffled 1.14)"
        in found["a"]
    )
    assert "class order" not in found["b"]


def test_crop_and_size_of_pictures(tmp_path: Path) -> None:
    """A picture far larger is halved by means first, the middle is kept."""
    wide = np.zeros((40, 100, 3), np.uint8)
    wide[:, 30:70] = 200  # the middle square
    Image.fromarray(wide).save(tmp_path / "a.png")
    Image.fromarray(np.full((8, 8, 3), 7, np.uint8)).save(tmp_path / "b.png")
    images = FolderImages(tmp_path, 8)
    loaded = images.load(range(2))
    assert loaded.shape == (2, 8, 8, 3) and images.size == (8, 8)
    assert (loaded[0, :, 2:6] == 200).all() and (loaded[1] == 7).all()
    assert FolderImages(tmp_path, 4).key != images.key
    with pytest.raises(
        DataError, match=r"must have one size, got 100 x 40 first and 8 x 8 in b\.png: --image-size"
    ):
        FolderImages(tmp_path).load(range(2))
    save(tmp_path / "c.npz", pictures(3, 1))
    assert open_images(tmp_path / "c.npz", 8).count == 3
    with pytest.raises(
        DataError, match=r"only pictures of folders are .* to 16 pixels, got .*c.npz of 8 x 8"
    ):
        open_images(tmp_path / "c.npz", 16)


def test_order_is_judged_by_scores_too() -> None:
    """Several exports in a row: no neighbours of a class, and yet few classes in a chunk."""
    turns = [i % 10 for i in range(100)] + [10 + i % 10 for i in range(100)]
    assert guards.about_order(turns, 50.0, 51.0) == []
    assert "seem to be in class order" in guards.about_order(turns, 10.0, 95.0)[0]


def test_a_short_last_chunk_is_told() -> None:
    assert [guards.about_chunks(n, 5000) for n in (10, 5000, 50_000)] == [[], [], []]
    assert "the last one of these 50001 images has 1" in guards.about_chunks(50_001, 5000)[0]


def test_a_damaged_block_of_another_rank_is_waited_for(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a", "b")]
    for path in paths:
        path.write_bytes(b"whole")
    paths[1].write_bytes(b"damaged")

    def there(i: int) -> bool:
        if i == 1 and looked.append(i) is None and len(looked) == 3:
            paths[1].write_bytes(b"whole")  # the other rank
        return paths[i].read_bytes() == b"whole"

    looked: list[int] = []
    wait_for_files(paths, 2, 5.0, what="blocks", every=0.01, there=there)
    paths[1].write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="lacks 1 of 2 blocks, of rank 1 of 2"):
        wait_for_files(paths, 2, 0.02, what="blocks", every=0.01, there=lambda i: i == 0)


def test_features_of_a_tokenizers_evaluation_are_not_in_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, bool]] = []
    whole = linear()

    def compute(pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        seen.append((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
        return whole.compute(pixels)

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    replace(whole, compute=compute).space().features(torch.zeros(2, 3, 8, 8))
    assert seen == [(False, False)] and torch.backends.cudnn.allow_tf32
