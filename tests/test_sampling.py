"""The sampler: one random stream an image, whatever the batch; arguments."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.models.conftest import small_pair
from tests.threads import threads
from var_ext import Sampler, backend


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    return Sampler(*small_pair(), defaults={"cfg": 2.0, "top_k": 12, "top_p": 0.9}, precision="fp32")


LABELS = torch.arange(64) % 5
SEEDS = 1000 + 17 * torch.arange(64)


@pytest.fixture(scope="module")
def alone(sampler) -> torch.Tensor:
    return torch.cat([sampler.tokens(int(a), int(s)) for a, s in zip(LABELS, SEEDS, strict=True)])


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("batch", [1, 7, 64])
@pytest.mark.parametrize("shuffled", [False, True])
def test_an_image_does_not_depend_on_its_batch(sampler, alone, batch, shuffled, count):
    order = (
        torch.randperm(64, generator=torch.Generator().manual_seed(batch)) if shuffled else torch.arange(64)
    )
    with threads(count):
        tokens = sampler.tokens(LABELS[order], SEEDS[order], batch_size=batch)
    assert torch.equal(tokens, alone[order])


def test_both_backends_draw_the_same_tokens(sampler, alone):
    with backend.force("reference"):
        assert torch.equal(sampler.tokens(LABELS, SEEDS), alone)


def test_images_are_the_decoded_tokens(sampler):
    images, tokens = sampler([1, 2], [3, 4]), sampler.tokens([1, 2], [3, 4])
    assert images.shape == (2, 3, 8, 8) and images.dtype == torch.float32
    decoded = sampler.vae.idxBl_to_img(
        [tokens[:, s] for s in sampler.vae.schedule.slices], True, last_one=True
    )
    torch.testing.assert_close(images, (decoded + 1) / 2, rtol=1e-4, atol=1e-5)  # sums in another order


def test_seeds_and_labels_matter(sampler):
    first = sampler.tokens(1, list(range(20)))
    assert not torch.equal(first, sampler.tokens(1, list(range(20, 40))))
    assert not torch.equal(first, sampler.tokens(2, list(range(20))))
    assert len(first.unique(dim=0)) == 20


def test_seeds_of_all_64_bits_count(sampler):
    tokens = sampler.tokens(1, [5, 5 + 2**32, 5 - 2**63, -5])
    assert len(tokens.unique(dim=0)) == 4


def test_without_seeds_the_global_generator_decides(sampler):
    torch.manual_seed(3)
    first = sampler.tokens([0] * 4)
    assert not torch.equal(first, sampler.tokens([0] * 4))
    torch.manual_seed(3)
    assert torch.equal(first, sampler.tokens([0] * 4))


def test_greedy_needs_no_seed(sampler):
    assert len(sampler.tokens(2, list(range(6)), top_k=1).unique(dim=0)) == 1


def test_no_images_is_an_empty_batch(sampler):
    assert sampler([], []).shape == (0, 3, 8, 8)
    assert sampler.tokens([], []).shape == (0, 30)
    assert not list(sampler.stream([], []))


def test_a_stream_yields_the_images_of_a_call(sampler):
    drawn = list(sampler.stream(LABELS[:10], SEEDS[:10], batch_size=4, cfg=1.0, top_k=5, top_p=0.8))
    assert [start for start, _ in drawn] == [0, 4, 8]
    images = torch.cat([images for _, images in drawn])
    assert torch.equal(images, sampler(LABELS[:10], SEEDS[:10], batch_size=4, cfg=1.0, top_k=5, top_p=0.8))


def test_a_stream_draws_what_is_asked_for(sampler, monkeypatch):
    draw, sizes = sampler.engine.draw, []
    monkeypatch.setattr(sampler.engine, "draw", lambda call: sizes.append(len(call)) or draw(call))
    stream = sampler.stream(1, range(10), batch_size=3)
    assert sizes == []
    next(stream), next(stream)
    assert sizes == [3, 3]
    stream.close()


def test_a_stream_leaves_autograd_to_its_reader(sampler):
    for _, images in sampler.stream([1], [2]):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        assert not images.is_inference() and not images.requires_grad
        (images * torch.ones(1, requires_grad=True)).sum().backward()  # may be saved for a gradient


def test_a_stream_shows_progress_when_asked_to(sampler, capfd, caplog):
    with caplog.at_level("INFO", logger="var_ext"):
        list(sampler.stream(1, range(5), batch_size=3))
    assert [record.getMessage() for record in caplog.records] == ["3 of 5 images", "5 of 5 images"]
    assert capfd.readouterr() == ("", "")
    list(sampler.stream(1, range(5), batch_size=3, progress=True))
    out, err = capfd.readouterr()
    assert "5/5" in err and not out


def test_a_stream_checks_its_arguments_at_once(sampler):
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        sampler.stream([1], [0], batch_size=0)
    with pytest.raises(ValueError, match=r"got shapes \(2,\) and \(3,\)"):
        sampler.stream([1, 2], [0, 1, 2])


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        (([7], [0]), {}, r"labels must be in 0..5 \(5: no class\), got \[7\]"),
        (([1, 2], [0, 1, 2]), {}, r"got shapes \(2,\) and \(3,\)"),
        (([1], [0]), {"top_p": 1.5}, r"top_p must be in \[0, 1\], got 1.5"),
        (([1], [0]), {"top_k": -1}, "top_k must be whole numbers of 0 or more, got -1"),
        (([1], [0]), {"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_named(sampler, args, options, message):
    with pytest.raises(ValueError, match=message):
        sampler(*args, **options)


@pytest.mark.parametrize(
    ("labels", "seeds", "error", "message"),
    [
        ([1.9], [0], TypeError, "labels must be integers, got float32"),
        ([1], [0.7], TypeError, "seeds must be integers, got float32"),
        ([True], [0], TypeError, "labels must be integers, got bool"),
        ([1], [2**64], ValueError, r"seeds must be integers of 64 bits, got \[18446744073709551616\]"),
        ([1], -(2**63) - 1, ValueError, "seeds must be integers of 64 bits, got"),
        (np.array([1.0]), [0], TypeError, "labels must be integers, got float64"),
        (np.array(["1"]), [0], TypeError, "labels must be integers, got array"),
        (
            np.array([2**64 - 1], np.uint64),
            0,
            ValueError,
            r"labels must be below 2\^63, got \[18446744073709551615\]",
        ),
    ],
)
def test_nothing_is_rounded_to_a_label_or_seed(sampler, labels, seeds, error, message):
    with pytest.raises(error, match=message):
        sampler.tokens(labels, seeds)


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8, np.uint64, object])
def test_integers_of_numpy_are_taken(sampler, kind):
    wanted = sampler.tokens([1, 2], [3, 4], batch_size=1)
    assert torch.equal(
        sampler.tokens(np.array([1, 2], kind), np.array([3, 4], kind), batch_size=np.int64(1)), wanted
    )
    if kind is not object:
        assert torch.equal(sampler.tokens([kind(1), kind(2)], [kind(3), kind(4)]), wanted)
        assert torch.equal(sampler.tokens(kind(1), kind(3)), wanted[:1])


UNSIGNED = 2**64 - 5
SEEDS_OF_FIVE = [UNSIGNED, [UNSIGNED], np.uint64(UNSIGNED), np.array([UNSIGNED], np.uint64)]


@pytest.mark.parametrize("seed", [*SEEDS_OF_FIVE, torch.tensor([-5]).view(torch.uint64)])
def test_an_unsigned_seed_is_the_one_with_its_bits(sampler, seed):
    assert torch.equal(sampler.tokens(1, seed), sampler.tokens(1, -5))
    image = torch.full((3, 8, 8), 0.5)
    box = (0, 0, 1, 0.5)
    assert torch.equal(sampler.edit(image, box, seed=seed), sampler.edit(image, box, seed=-5))


def test_seeds_with_and_without_a_sign_together(sampler):
    assert torch.equal(sampler.tokens(1, [2**64 - 5, -6]), sampler.tokens(1, [-5, -6]))


def test_options_of_numpy_and_torch_are_taken(sampler):
    ramp, ks = [0.0, 1.0, 2.0, 3.0], [1, 2, 3, 4]
    wanted = sampler.tokens([1], [2], cfg=ramp, top_k=ks, top_p=0.5, cfg_until=3)
    for array in (np.array, torch.tensor):
        given = {"cfg": array(ramp), "top_k": array(ks), "top_p": array(0.5), "cfg_until": np.int64(3)}
        assert torch.equal(sampler.tokens([1], [2], **given), wanted)
    with pytest.raises(TypeError, match=r"batch_size must be a whole number, got 2.0"):
        sampler.tokens([1], [2], batch_size=2.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_float32_is_float32_whatever_the_default(sampler, dtype):
    def answers():
        parts = sampler([1], [2]), sampler([1], [2], more_smooth=True), sampler.scales([1], [2])
        again = sampler.var.autoregressive_infer_cfg(2, None, 3)
        return (
            *parts,
            sampler([], []),
            sampler.edit(torch.full((3, 8, 8), 0.5).float(), (0, 0, 1, 0.5), 1, 2),
            again,
        )

    wanted = answers()
    torch.set_default_dtype(dtype)
    try:
        found = answers()
    finally:
        torch.set_default_dtype(torch.float32)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == torch.float32 and torch.equal(ours, theirs)


def test_wrong_parts_are_named():
    (vae, var), (other, _) = small_pair(), small_pair()
    with pytest.raises(ValueError, match="built on the vae that is given with it"):
        Sampler(other, var)
    with pytest.raises(ValueError, match="must name 5 classes, got 2"):
        Sampler(vae, var, class_names=["a", "b"])
    with pytest.raises(ValueError, match="may hold cfg, top_k, top_p, got heat"):
        Sampler(vae, var, defaults={"heat": 1})
