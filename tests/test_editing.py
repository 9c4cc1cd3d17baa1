"""Editing: which tokens stay, that they are the image's own, and what the sampler makes of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.models.conftest import PATCH_NUMS, small_pair
from var_ext import Sampler, ScaleSchedule
from var_ext.editing import KeptCodes, Region, keep_by_scale
from var_ext.schedule import SCALES_256, SCALES_512

SIZE, GRID = 8, 4
SCHEDULE = ScaleSchedule(PATCH_NUMS)


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    return Sampler(*small_pair(), defaults={"cfg": 0.5, "top_k": 2, "top_p": 0.0}, precision="fp32")


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 3, SIZE, SIZE)


def region(mask, outside: bool = False, image_size: int = SIZE, grid: int = GRID) -> Region:
    return Region.of(mask, image_size=image_size, grid=grid, outside=outside)


# ---------------------------------------------------------------------- masks


@pytest.mark.parametrize("place", [(0, 0), (7, 7), (3, 4), (5, 1)])
def test_one_pixel_takes_its_token(place):
    mask = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    mask[place] = True
    found = region(mask)
    assert torch.equal(found.replace, mask[None])
    assert (~found.keep).nonzero().tolist() == [[0, place[0] // 2, place[1] // 2]]
    # what lies outside it touches every token
    found = region(mask, outside=True)
    assert torch.equal(found.replace, ~mask[None]) and not found.keep.any()


def test_a_token_stays_only_when_all_its_pixels_do():
    mask = torch.rand(5, 12, 12) < 0.1
    keep = region(mask, image_size=12).keep
    for m, y, x in np.ndindex(5, 4, 4):
        assert keep[m, y, x] == (not mask[m, 3 * y : 3 * y + 3, 3 * x : 3 * x + 3].any())


@pytest.mark.parametrize("side", [SIZE, GRID])
def test_forms_of_a_mask_are_equal(side):
    mask = torch.rand(side, side) < 0.3
    wanted = region(mask)
    assert wanted.replace.shape == (1, SIZE, SIZE) and wanted.keep.shape == (1, GRID, GRID)
    forms = [mask[None], mask[None, None], mask.float(), mask.double()[None], 0.25 + 0.25 * mask.half()]
    for form in [*forms, mask.expand(3, 1, side, side)]:
        found = region(form)
        assert torch.equal(found.keep, wanted.keep.expand_as(found.keep))
        assert torch.equal(found.replace, wanted.replace.expand_as(found.replace))
        turned = region(~mask)
        assert torch.equal(region(form, outside=True).keep, turned.keep.expand_as(found.keep))


def test_a_mask_of_numpy_is_taken():
    mask = np.random.default_rng(0).random((SIZE, SIZE)) < 0.3
    for form in (mask, mask[None], mask.astype(np.float32)):
        assert torch.equal(region(form).replace[0], torch.from_numpy(mask))
    with pytest.raises(TypeError, match="mask must be bool or floating point, got uint8"):
        region(mask.astype(np.uint8))


def test_a_mask_in_tokens_covers_their_pixels():
    mask = torch.eye(GRID, dtype=torch.bool)
    found = region(mask)
    assert torch.equal(found.keep[0], ~mask)
    assert torch.equal(found.replace[0], mask.repeat_interleave(2, 0).repeat_interleave(2, 1))


def test_a_box_is_rounded_to_tokens():
    keep = region((0.1, 0.3, 0.8, 0.97), image_size=256, grid=16).keep[0]
    wanted = torch.ones(16, 16, dtype=torch.bool)
    wanted[5:16, 2:13] = False  # rows 4.8 to 15.5, columns 1.6 to 12.8
    assert torch.equal(keep, wanted)
    outside = region([0.1, 0.3, 0.8, 0.97], outside=True, image_size=256, grid=16)
    assert torch.equal(outside.keep[0], ~wanted) and torch.equal(outside.replace[0, ::16, ::16], wanted)


@pytest.mark.parametrize(
    "schedule", [SCHEDULE, ScaleSchedule(SCALES_256), ScaleSchedule(SCALES_512)], ids=str
)
def test_the_mask_at_each_scale(schedule):
    side = schedule.side
    keep = torch.rand(6, side, side) < 0.5
    keep[0], keep[1] = True, False
    found = keep_by_scale(keep, schedule)
    assert found.dtype == torch.bool and found.shape == (6, schedule.num_tokens)
    for p, part in zip(schedule.patch_nums, schedule.slices, strict=True):
        places = (np.arange(p) + 0.5) * side / p - 0.5  # of the scale's centres on the last grid
        low = np.floor(places).astype(int)
        weights = np.zeros((p, side))
        weights[np.arange(p), low] += 1 - (places - low)
        weights[np.arange(p), np.minimum(low + 1, side - 1)] += places - low
        mixed = weights @ keep.double().numpy() @ weights.T
        sure = np.abs(mixed - 0.5) > 1e-6
        if side % p == 0:  # halves are exact there, and do not stay
            sure[:] = True
        wanted = np.ones_like(mixed, dtype=bool) if p == 1 else mixed > 0.5
        assert np.array_equal(
            found[:, part].numpy()[sure.reshape(6, -1)], wanted.reshape(6, -1)[sure.reshape(6, -1)]
        )
    assert torch.equal(found[:, schedule.slices[-1]], keep.flatten(1) if side > 1 else found[:, -1:])


def test_a_mask_does_not_depend_on_its_batch():
    keep = torch.rand(9, 16, 16) < 0.5
    schedule = ScaleSchedule(SCALES_256)
    alone = torch.cat([keep_by_scale(each[None], schedule) for each in keep])
    assert torch.equal(keep_by_scale(keep, schedule), alone)


# ---------------------------------------------------------------------- codes


def test_kept_tokens_are_the_images_own(sampler, images, monkeypatch):
    """Of all that enters the sum, in one edit of three images with masks of their own."""
    vae, mask = sampler.vae, torch.rand(3, SIZE, SIZE) < 0.15
    hook, drawn, taken = KeptCodes.__call__, [], []

    def spy(kept, codes, k):
        drawn.append(codes)
        taken.append(hook(kept, codes, k))
        return taken[-1]

    monkeypatch.setattr(KeptCodes, "__call__", spy)
    sampler.edit(images, mask, seed=[1, 2, 3])
    own = vae.quantize.embedding(torch.cat(vae.img_to_idxBl(images * 2 - 1), dim=1))
    keep = keep_by_scale(region(mask).keep, vae.schedule)[..., None]
    assert 0.2 < keep.float().mean() < 0.8
    assert torch.equal(torch.cat(taken, dim=1), torch.where(keep, own, torch.cat(drawn, dim=1)))
    assert (torch.cat(drawn, dim=1) != own)[~keep[..., 0]].any(dim=1).float().mean() > 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_hook_keeps_shape_and_dtype(sampler, images, dtype):
    kept = KeptCodes.of(sampler.vae, images, torch.rand(1, GRID, GRID) < 0.5, count=3)
    assert len(kept) == 3 and len(kept[1:]) == 2
    for k, length in enumerate(SCHEDULE.lengths):
        codes = torch.randn(3, length, 8, dtype=dtype)
        found = kept(codes, k)
        assert found.dtype == dtype and found.shape == codes.shape
        assert torch.equal(kept[1:](codes[1:], k), found[1:])


def test_an_image_is_tokenized_once(sampler, images, monkeypatch):
    sizes, tokenize = [], sampler.vae.img_to_idxBl
    monkeypatch.setattr(sampler.vae, "img_to_idxBl", lambda x: sizes.append(len(x)) or tokenize(x))
    sampler.edit(images[0], (0, 0, 0.5, 1), [0, 1, 2, 3], 5)
    sampler.edit(images, (0, 0, 0.5, 1), batch_size=2)
    assert sizes == [1, 2, 1]


# ---------------------------------------------------------------------- images


def test_an_edit_does_not_depend_on_its_batch(sampler, images):
    masks, labels, seeds = torch.rand(3, SIZE, SIZE) < 0.2, [1, 5, 3], [7, 8, 9]
    together = sampler.edit(images, masks, labels, seeds)
    assert together.shape == (3, 3, SIZE, SIZE) and together.dtype == torch.float32
    assert together.min() >= 0 and together.max() <= 1 and not together.is_inference()
    alone = [sampler.edit(*each) for each in zip(images, masks, labels, seeds, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone))
    torch.testing.assert_close(together, sampler.edit(images, masks, labels, seeds, batch_size=2))


def test_one_of_each_serves_all(sampler, images):
    image, box = images[0], (0.0, 0.0, 1.0, 0.5)
    masks = torch.rand(3, SIZE, SIZE) < 0.3
    for args in (
        (image, box, [0, 1, 2], 4),
        (image, box, None, [4, 5, 6]),
        (image[None], masks, 2, [4]),
        (images, masks[0], None, 4),
    ):
        assert len(sampler.edit(*args).unique(dim=0)) == 3
    assert sampler.edit(image, box).shape == (1, 3, SIZE, SIZE)
    assert sampler.edit(images[:0], box).shape == (0, 3, SIZE, SIZE)


@torch.no_grad()
def test_an_image_that_is_kept_is_reconstructed(sampler, images):
    wanted = sampler.vae.img_to_reconstructed_img(images * 2 - 1, last_one=True).add(1).div(2)
    edited = sampler.edit(images, torch.zeros(SIZE, SIZE))
    torch.testing.assert_close(edited, wanted, rtol=1e-4, atol=1e-5)  # sums in another order
    assert (sampler.edit(images, torch.ones(SIZE, SIZE)) - wanted).abs().max() > 0.01


def test_pasted_pixels_are_exact(sampler, images):
    mask = torch.rand(3, SIZE, SIZE) < 0.3
    free, pasted = (sampler.edit(images, mask, seed=3, paste=paste) for paste in (False, True))
    assert torch.equal(pasted, torch.where(mask[:, None], free, images))
    one = sampler.edit(images[0], mask[0], seed=[3, 4], paste=True, outside=True)
    assert torch.equal(one[:, :, mask[0]], images[0][:, mask[0]].expand(2, -1, -1))


def test_defaults(sampler, images):
    """No class, and the published settings rather than the model's."""
    box, published = (0.25, 0.0, 1.0, 1.0), {"cfg": 3.0, "top_k": 900, "top_p": 0.95}
    for label in (5, 1):
        given = () if label == 5 else (label,)
        wanted = sampler.edit(images, box, label, [1, 2, 3], **published)
        assert torch.equal(sampler.edit(images, box, *given, seed=[1, 2, 3]), wanted)
        # without a class both halves of guidance are the same
        for other in ({"cfg": 0.0}, {"top_k": 1}, {"top_p": 0.3})[label == 5 :]:
            assert not torch.equal(sampler.edit(images, box, *given, seed=[1, 2, 3], **other), wanted)


def test_without_seeds_the_global_generator_decides(sampler, images):
    torch.manual_seed(3)
    first = sampler.edit(images[:1].expand(3, -1, -1, -1), (0, 0, 1, 1))
    assert len(first.unique(dim=0)) == 3
    torch.manual_seed(3)
    assert torch.equal(sampler.edit(images[:1].expand(3, -1, -1, -1), (0, 0, 1, 1)), first)


def test_editing_leaves_drawing_alone(sampler, images):
    before = sampler.tokens([1, 2], [3, 4])
    sampler.edit(images, (0, 0, 1, 0.5))
    assert torch.equal(sampler.tokens([1, 2], [3, 4]), before)


# ---------------------------------------------------------------------- errors

IMAGE, BOX = torch.zeros(3, SIZE, SIZE), (0.0, 0.0, 1.0, 0.5)


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        (
            (IMAGE[:1], BOX),
            {},
            ValueError,
            r"image must have shape \(3, 8, 8\) or \(N, 3, 8, 8\), got \(1, 8, 8\)",
        ),
        ((torch.zeros(3, 16, 16), BOX), {}, ValueError, r"got \(3, 16, 16\)"),
        ((IMAGE - 1, BOX), {}, ValueError, r"image must hold values in \[0, 1\], got -1 to -1"),
        ((IMAGE + 1.000001, BOX), {}, ValueError, r"values in \[0, 1\], got 1.000001 to 1.000001"),
        ((IMAGE.double() - 1e-12, BOX), {}, ValueError, r"values in \[0, 1\], got -1e-12 to -1e-12"),
        (
            (IMAGE.bfloat16() + 1.0078125, BOX),
            {},
            ValueError,
            r"values in \[0, 1\], got 1.0078125 to 1.0078125",
        ),
        ((IMAGE + torch.nan, BOX), {}, ValueError, r"image must hold values in \[0, 1\], got nan"),
        ((IMAGE.byte(), BOX), {}, TypeError, r"image must be a floating point tensor in \[0, 1\], got uint8"),
        (
            (IMAGE.numpy(), BOX),
            {},
            TypeError,
            r"image must be a floating point tensor in \[0, 1\], got ndarray",
        ),
        (
            (IMAGE, torch.zeros(5, 5)),
            {},
            ValueError,
            r"mask must have shape \(8, 8\).* or \(4, 4\).*, got \(5, 5\)",
        ),
        ((IMAGE, torch.zeros(1, 3, 8, 8)), {}, ValueError, r"mask must have shape .*, got \(1, 3, 8, 8\)"),
        ((IMAGE, torch.zeros(8, 4)), {}, ValueError, r"mask must have shape .*, got \(8, 4\)"),
        ((IMAGE, torch.tensor(BOX)), {}, ValueError, r"mask must have shape .*, got \(4,\)"),
        (
            (IMAGE, torch.full((8, 8), 255.0)),
            {},
            ValueError,
            r"mask must hold values in \[0, 1\], got 255 to 255",
        ),
        ((IMAGE, torch.zeros(8, 8).byte()), {}, TypeError, "mask must be bool or floating point, got uint8"),
        (
            (IMAGE, "left"),
            {},
            TypeError,
            "mask must be a tensor or a box, and a box must be four .*, got 'left'",
        ),
        ((IMAGE, (0, 0, 1)), {}, TypeError, r"a box must be four numbers .*, got \(0, 0, 1\)"),
        ((IMAGE, None), {}, TypeError, "mask must be a tensor or a box"),
        ((IMAGE, (0.5, 0, 0.5, 1)), {}, ValueError, "with x0 < x1 and y0 < y1, got"),
        ((IMAGE, (0, 0, 8, 8)), {}, ValueError, r"in \[0, 1\] .*, got \(0.0, 0.0, 8.0, 8.0\)"),
        ((IMAGE, (0, 0, 0.1, 1)), {}, ValueError, "must hold a token of the 4 x 4 grid, got none"),
        ((IMAGE, BOX, 7), {}, ValueError, r"labels must be in 0..5 \(5: no class\), got \[7\]"),
        ((IMAGE, BOX, 1.5), {}, TypeError, "label must be integers, got float32"),
        ((IMAGE, BOX, [[1]]), {}, ValueError, r"label must be one integer or \(N,\), got shape \(1, 1\)"),
        ((IMAGE, BOX, 1, [0.5]), {}, TypeError, "seed must be integers, got float32"),
        (
            (IMAGE, BOX, [1, 2], [1, 2, 3]),
            {},
            ValueError,
            "must be one each or N each, got 1 of image, 1 of mask, 2 of label, 3 of seed",
        ),
        ((IMAGE, BOX), {"top_p": 2.0}, ValueError, "top_p must be in"),
        ((IMAGE, BOX), {"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_named(sampler, args, options, error, message):
    with pytest.raises(error, match=message):
        sampler.edit(*args, **options)
