"""LPIPS: the formula against the published layers, files in every public layout, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.training.lpips_layouts import blurs, heads, randomised, trunk
from var_ext.checkpoints import CheckpointError, save_tensors
from var_ext.training import TokenizerRecipe
from var_ext.training.losses import load_lpips
from var_ext.training.losses.lpips import LPIPS, SMALLEST, BlurPool
from var_ext.training.losses.lpips_files import from_entries
from var_ext.training.tokenizer import TokenizerTask
from var_ext.training.tokenizer_plan import plan


def published(net: str, entries: dict[str, Tensor], a: Tensor, b: Tensor) -> Tensor:
    """LPIPS as torch-fidelity and lpips compute it, layer by layer from torchvision's `features` and heads."""
    pool = nn.MaxPool2d(2, 2) if net == "vgg16" else nn.MaxPool2d(3, 2)
    pools = (4, 9, 16, 23) if net == "vgg16" else (2, 5)
    taps = (3, 8, 15, 22, 29) if net == "vgg16" else (1, 4, 7, 9, 11)
    features = []
    for x in (a, b):
        # torch-fidelity: levels in [0, 255]
        x = (x + 1) * 127.5
        x = x - (1 + torch.tensor([-0.030, -0.088, -0.188])[:, None, None]) * 255 / 2
        x = x * 2 / (torch.tensor([0.458, 0.448, 0.450])[:, None, None] * 255)
        found = []
        for place in range(taps[-1] + 1):
            if place in pools:
                x = pool(x)
            elif f"features.{place}.weight" in entries:
                weight, bias = entries[f"features.{place}.weight"], entries[f"features.{place}.bias"]
                large = weight.shape[-1] == 11
                x = nn.functional.conv2d(
                    x, weight, bias, stride=4 if large else 1, padding=2 if large else weight.shape[-1] // 2
                )
            else:
                x = x.relu()
            if place in taps:
                found.append(x / ((x**2).sum(1, keepdim=True).sqrt() + 1e-10))
        features.append(found)
    total = torch.zeros(len(a))
    for k, (one, two) in enumerate(zip(*features, strict=True)):
        weighted = nn.functional.conv2d((one - two) ** 2, entries[f"lin{k}.model.1.weight"])
        total = total + weighted.mean((2, 3))[:, 0]
    return total


def pair(side: int = 33) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.rand(2, 3, side, side) * 2 - 1, torch.rand(2, 3, side, side) * 2 - 1


@pytest.mark.parametrize("net", ["vgg16", "alex"])
def test_the_formula(net: str) -> None:
    loss, (a, b) = randomised(net), pair()
    wanted = published(net, trunk(loss, net, "torchvision") | heads(loss, "lpips"), a, b)
    # some ten layers in float32, and input scaled in another order
    torch.testing.assert_close(loss(a, b), wanted, rtol=1e-5, atol=0)
    assert loss(a, a).abs().max() == 0


@pytest.mark.parametrize("net", ["vgg16", "alex"])
@pytest.mark.parametrize("layout", ["lpips", "vaex", "torchvision", "stlpips"])
def test_every_layout_gives_the_same_loss(net: str, layout: str, tmp_path: Path) -> None:
    blurred = layout == "stlpips"
    loss, (a, b) = randomised(net, shift_tolerant=blurred), pair()
    entries = trunk(loss, net, layout) | heads(loss, layout) | (blurs(net) if blurred else {})
    torch.save(entries, tmp_path / "one.pth")
    found = load_lpips([str(tmp_path / "one.pth")])
    assert torch.equal(found(a, b), loss(a, b)) and found.digest() == loss.digest()
    assert found.name == f"{'st' if blurred else ''}lpips-{net}"
    if layout == "torchvision":  # heads and trunk in two files, as torch-fidelity and torchvision have them
        torch.save(heads(loss, layout), tmp_path / "heads.pth")
        save_tensors(tmp_path / "trunk.safetensors", trunk(loss, net, layout))
        found = load_lpips([str(tmp_path / "heads.pth"), str(tmp_path / "trunk.safetensors")])
        assert found.digest() == loss.digest()


def test_the_images_get_no_gradient_and_the_output_a_finite_one() -> None:
    loss, (a, b) = randomised("alex"), pair()
    a[0] = b[0] = 0  # flat: many features are 0
    a.requires_grad_(True)
    b.requires_grad_(True)
    loss(a, b).sum().backward()
    assert a.grad is not None and a.grad.isfinite().all() and a.grad[1].abs().max() > 0
    assert b.grad is None and not any(p.requires_grad for p in loss.parameters())
    assert not loss.train().training


def test_it_computes_in_float32_under_autocast() -> None:
    loss, (a, b) = randomised("alex"), pair()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(a, b), loss(a.double(), b)) and loss(a, b).dtype == torch.float32
    assert torch.equal(loss(a, b), loss(a.clone(), b))


@pytest.mark.parametrize(("net", "blurred"), list(SMALLEST))
def test_the_smallest_images(net: str, blurred: bool) -> None:
    loss, smallest = LPIPS(net, shift_tolerant=blurred), SMALLEST[net, blurred]
    assert loss(*pair(smallest)).shape == (2,)
    with pytest.raises(ValueError, match=f"at least {smallest} x {smallest} pixels, got {smallest - 1} x"):
        loss(*pair(smallest - 1))
    loss.smallest = 0  # the network itself has nothing left there
    with pytest.raises(RuntimeError):
        loss(*pair(smallest - 1))


def test_blurs_by_hand() -> None:
    x = torch.arange(16.0).view(1, 1, 4, 4)
    rows = torch.tensor([[2, 1, 0, 1, 2, 3, 2, 1]])[0]  # reflected by two
    padded = x[:, :, rows][..., rows][0, 0]
    taps = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16
    wanted = [[float((padded[i : i + 3, j : j + 3] * taps).sum()) for j in (0, 2, 4)] for i in (0, 2, 4)]
    assert torch.allclose(BlurPool()(x)[0, 0], torch.tensor(wanted))


def test_broken_files_are_refused_with_what_was_wanted(tmp_path: Path) -> None:
    loss = randomised("alex")
    whole = trunk(loss, "alex", "lpips") | heads(loss, "lpips")
    with pytest.raises(
        CheckpointError, match=r"must hold heads of LPIPS for lpips-alex .* got none; heads and trunk"
    ):
        from_entries(trunk(loss, "alex", "lpips"), "FILE")
    with pytest.raises(CheckpointError, match=r"FILE must hold the convolutions of VGG16 .* got 0 layers"):
        from_entries(heads(loss, "lpips"), "FILE")
    with pytest.raises(CheckpointError, match=r"got 5 layers"):
        from_entries({name: t for name, t in whole.items() if name != "net.slice1.0.bias"}, "FILE")
    other = blurs("alex")
    other["net.slice1.1.filt"] = torch.zeros(64, 1, 3, 3)
    blurred = randomised("alex", shift_tolerant=True)
    with pytest.raises(CheckpointError, match=r"must have blurs of 1, 2, 1 over 4"):
        from_entries(trunk(blurred, "alex", "stlpips") | heads(loss, "lpips") | other, "FILE")
    with pytest.raises(CheckpointError, match=r"could not read .*nowhere\.pth"):
        load_lpips([str(tmp_path / "nowhere.pth")])
    torch.save([1], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="named tensors, got list"):
        load_lpips([str(tmp_path / "list.pth")])


def test_the_package_is_read_and_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("var_ext.training.losses.lpips_files.find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"lpips = stlpips-alex needs .* pip install 'var_ext\[stlpips\]'"):
        load_lpips(["stlpips-alex"])
    monkeypatch.undo()
    loss = randomised("alex", shift_tolerant=True)
    folder = tmp_path / "stlpips_pytorch" / "weights" / "vST0.0"
    folder.mkdir(parents=True)
    (tmp_path / "stlpips_pytorch" / "__init__.py").write_text("raise ImportError('it was imported')")
    entries = trunk(loss, "alex", "stlpips") | heads(loss, "lpips") | blurs("alex")
    torch.save(entries, folder / "alex_shift_tolerant.pth")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_lpips(["stlpips-alex"]).digest() == loss.digest()


def test_images_that_are_too_small_are_told_before_training(
    images: Path, tokenizer_recipe: TokenizerRecipe, tmp_path: Path
) -> None:
    loss = randomised("alex")
    save_tensors(tmp_path / "lpips.safetensors", {**trunk(loss, "alex", "lpips"), **heads(loss, "lpips")})
    recipe = tokenizer_recipe.with_options(weight_perceptual=1, lpips=str(tmp_path / "lpips.safetensors"))
    message = r"lpips-alex takes images of at least 31 x 31 pixels, got 8 x 8: use --perceptual structural$"
    with pytest.raises(ValueError, match=message):
        TokenizerTask(images, recipe)
    with pytest.raises(ValueError, match=message):
        plan(recipe)
