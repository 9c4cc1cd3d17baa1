"""Losses of the tokenizer against formulas written out, and their weights over a run."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.training.vits import vit_file
from var_ext.training import TokenizerRecipe
from var_ext.training.losses import ImageLosses, StructuralLoss, Term
from var_ext.training.losses.adversarial import (
    adaptive_weight,
    consistency_loss,
    hinge_loss,
    last_gradients,
    lecam_loss,
)
from var_ext.training.losses.chosen import image_losses, perceptual_loss
from var_ext.training.losses.semantic import semantic_loss
from var_ext.training.losses.structural import ssim


def images(count: int, side: int) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(side)) * 2 - 1


def test_a_weight_begins_and_rises() -> None:
    term = Term("x", 0.5, start=0.2, warmup=0.1)
    weights = [term.weight_at(p) for p in (0, 0.2, 0.25, 0.3, 1)]
    assert weights == pytest.approx([0, 0, 0.25, 0.5, 0.5]) and term.changes
    assert Term("x", 0.5).weight_at(0) == 0.5 and not Term("x", 0.5).changes
    assert Term("x", 0.5, start=0.2).weight_at(0.19) == 0 and Term("x", 0.5, start=0.2).weight_at(0.2) == 0.5


def test_the_sum_and_what_is_not_computed() -> None:
    def never(output: Tensor, images: Tensor) -> Tensor:
        raise AssertionError("its weight is 0")

    losses = ImageLosses(
        [
            (Term("first", 2.0), lambda a, b: (a - b).abs().mean((1, 2, 3))),  # one an image
            (Term("late", 3.0, start=0.5), lambda a, b: (a - b).square().mean()),
            (Term("none", 0.0), never),
        ]
    )
    a, b = images(4, 8), images(4, 9)[:, :, :8, :8]
    l1, l2 = (a - b).abs().mean(), (a - b).square().mean()
    total, values = losses(a, b, 0.4)
    assert torch.allclose(total, 2 * l1) and values.keys() == {"first"}
    total, values = losses(a, b)
    assert torch.allclose(total, 2 * l1 + 3 * l2) and torch.allclose(values["late"], l2)
    assert losses.loss("none") is never and losses.loss("other") is None


def test_no_loss_yet_is_zero_with_a_gradient() -> None:
    losses = ImageLosses([(Term("late", 1.0, start=0.5), lambda a, b: (a - b).square().mean())])
    output = images(1, 8).requires_grad_(True)
    total, values = losses(output, images(1, 8), 0.0)
    total.backward()
    assert total == 0 and values == {} and output.grad is not None and output.grad.abs().max() == 0


def test_structural_similarity_by_hand() -> None:
    """Window by window in float64."""
    a, b = images(1, 12).double(), images(1, 13)[:, :, :12, :12].double()
    bell = torch.tensor([math.exp(-((i - 5) ** 2) / (2 * 1.5**2)) for i in range(11)], dtype=torch.float64)
    taps = torch.outer(bell, bell) / bell.sum() ** 2
    found = []
    for c in range(3):
        for i in range(2):
            for j in range(2):
                x, y = (t[0, c, i : i + 11, j : j + 11] for t in (a, b))
                mx, my = (taps * x).sum(), (taps * y).sum()
                vx, vy = (taps * (x - mx) ** 2).sum(), (taps * (y - my) ** 2).sum()
                cov = (taps * (x - mx) * (y - my)).sum()
                c1, c2 = 0.0004, 0.0036
                found.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    # moments in float32, differences of squares
    assert float(ssim(a.float(), b.float())) == pytest.approx(float(torch.stack(found).mean()), abs=1e-5)


def test_the_structural_loss_by_hand() -> None:
    loss = StructuralLoss()
    a, b = images(2, 24), images(2, 25)[:, :, :24, :24]
    small = [torch.nn.functional.avg_pool2d(x, 2) for x in (a, b)]
    up = [torch.nn.functional.interpolate(x, (24, 24), mode="bilinear") for x in small]
    bands = ((a - up[0]) - (b - up[1])).abs().mean((1, 2, 3)) + (small[0] - small[1]).abs().mean((1, 2, 3))
    similarity = (ssim(a, b) + ssim(*small)) / 2  # 24 and 12 pixels; 6 are too few
    assert torch.allclose(loss(a, b), 0.5 * (1 - similarity) + 0.5 * bands, atol=1e-6)
    assert loss(a, a).abs().max() < 1e-6 and loss.digest() is None
    assert (loss(a * 0.9, a) < loss(b, a)).all()
    assert loss(images(1, 4), images(1, 4)).shape == (1,)  # smaller than a window


def test_losses_of_logits_by_hand() -> None:
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-0.5, 1.0])
    assert hinge_loss(real, fake).item() == pytest.approx((0 + 1) / 2 + (0.5 + 2) / 2)
    assert consistency_loss(real, fake).item() == pytest.approx((2.5**2 + 1) / 2)
    # real beyond the mean of fake 0.25, fake below the mean of real 0.5
    wanted = (1.75**2 + 0) / 2 + (1.0**2 + 0) / 2
    assert lecam_loss(real, fake, 0.5, 0.25).item() == pytest.approx(wanted)


def test_the_adaptive_weight_by_hand() -> None:
    last = torch.tensor([1.0, 1.0], requires_grad=True)
    gradients = last_gradients((3 * last).sum() + 4 * last[0], (2 * last).sum(), last)
    assert torch.equal(gradients, torch.tensor([[7.0, 3.0], [2.0, 2.0]]))
    ratio = math.hypot(7, 3) / math.hypot(2, 2)
    assert float(adaptive_weight(gradients, (0.015, 1e4))) == pytest.approx(ratio, rel=1e-5)
    assert float(adaptive_weight(gradients, (5, 6))) == 5 and float(adaptive_weight(gradients, (1, 1))) == 1
    assert float(adaptive_weight(torch.ones(2, 3) * torch.tensor([[1.0], [0.0]]), (0.015, 1e4))) == 1e4


def test_the_semantic_loss_by_hand(tmp_path: Path) -> None:
    recipe = TokenizerRecipe.small().with_options(
        weight_semantic=0.5, semantic=str(vit_file(tmp_path)), semantic_size=32
    )
    loss = semantic_loss(recipe)
    assert loss is not None and loss.name == "vit-64/8"
    a, b = images(2, 48), images(2, 49)[:, :, :48, :48]
    one, two = (
        loss.vit(torch.nn.functional.interpolate(x, (32, 32), mode="area"))[-1].double() for x in (a, b)
    )
    cosine = (one * two).sum(2) / (one.norm(dim=2) * two.norm(dim=2))
    torch.testing.assert_close(loss(a, b).double(), 1 - cosine.mean(1), atol=1e-5, rtol=0)
    assert loss(a, a).abs().max() < 1e-5
    a.requires_grad_(True)
    loss(a, b).sum().backward()
    assert a.grad is not None and a.grad.abs().max() > 0
    losses = image_losses(recipe, 64, None, torch.device("cpu"))
    assert {term.name for term, _ in losses.parts} == {"l1", "l2", "perceptual", "semantic"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_perceptual": 1}, "weight_perceptual = 1 needs a loss, got none: --lpips FILE"),
        ({"perceptual": "structural", "lpips": "x.pth"}, "structural takes no weights, got lpips = x.pth"),
        ({"weight_perceptual": 0, "weight_semantic": 1}, "weight_semantic = 1 needs a frozen ViT"),
    ],
)
def test_a_loss_without_its_weights_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        image_losses(TokenizerRecipe().with_options(**options), 256, None, torch.device("cpu"))


def test_no_weight_asks_for_no_files() -> None:
    assert perceptual_loss(TokenizerRecipe(weight_perceptual=0, lpips=("nowhere.pth",)), 256) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_perceptual": 0}, "no effect with weight_perceptual = 0: give it a weight"),
        ({"lpips": "x.pth"}, "wanted one perceptual loss, got a function and lpips = x.pth"),
    ],
)
def test_a_function_that_would_not_count_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        image_losses(TokenizerRecipe().with_options(**options), 256, torch.nn.L1Loss(), torch.device("cpu"))
