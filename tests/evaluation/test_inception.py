"""The Inception of FID: its layout, its resize, its files; and beside torch-fidelity, see `fidelity_checkout`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.evaluation.fidelity_checkout import module, with_torch_fidelity
from tests.evaluation.inception import (
    constant,
    node,
    random_inception,
    save_graph,
    save_openai,
    save_pth,
    varint,
)
from var_ext.checkpoints import CheckpointError
from var_ext.evaluation.graph_def import read_constants
from var_ext.evaluation.inception import InceptionV3, resize_like_tf1
from var_ext.evaluation.inception_weights import HUB_FILE, find_weights, read_inception, scopes

SIDES = (32, 64, 256, 299, 512)


@pytest.fixture(scope="module")
def network() -> InceptionV3:
    return random_inception(scaled=False)


def pixels(side: int, count: int = 2) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8)


def deviation(result: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((result - expected).abs().max() / expected.abs().max())


def test_the_layout_is_the_published_one(network: InceptionV3) -> None:
    entries = network.state_dict()
    assert len(entries) == 566 and len([name for name in entries if "num_batches" not in name]) == 472
    floats = sum(
        t.numel() for name, t in entries.items() if "num_batches" not in name and "running" not in name
    )
    assert floats == 23_850_960  # 1008 classes and no auxiliary head
    for name, shape in {
        "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
        "Mixed_5b.branch5x5_2.conv.weight": (64, 48, 5, 5),
        "Mixed_6a.branch3x3dbl_3.conv.weight": (96, 96, 3, 3),
        "Mixed_6b.branch7x7_2.conv.weight": (128, 128, 1, 7),
        "Mixed_6d.branch1x1.bn.running_mean": (192,),
        "Mixed_7a.branch7x7x3_3.conv.weight": (192, 192, 7, 1),
        "Mixed_7c.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1),
        "fc.weight": (1008, 2048),
    }.items():
        assert entries[name].shape == shape


def test_each_unit_has_its_scope_in_the_graph() -> None:
    """Samples of every kind; which is which the published converter says."""
    pairs = dict(scopes())
    assert len(pairs) == len(set(pairs.values())) == 94
    for name, scope in {
        "Conv2d_1a_3x3": "conv",
        "Conv2d_4a_3x3": "conv_4",
        "Mixed_5b.branch1x1": "mixed/conv",
        "Mixed_5c.branch5x5_2": "mixed_1/tower/conv_1",
        "Mixed_5d.branch3x3dbl_3": "mixed_2/tower_1/conv_2",
        "Mixed_6a.branch3x3": "mixed_3/conv",
        "Mixed_6a.branch3x3dbl_1": "mixed_3/tower/conv",
        "Mixed_6b.branch7x7_3": "mixed_4/tower/conv_2",
        "Mixed_6d.branch1x1": "mixed_6/conv",
        "Mixed_6e.branch7x7dbl_5": "mixed_7/tower_1/conv_4",
        "Mixed_7a.branch3x3_2": "mixed_8/tower/conv_1",
        "Mixed_7a.branch7x7x3_4": "mixed_8/tower_1/conv_3",
        "Mixed_7b.branch3x3_2a": "mixed_9/tower/mixed/conv",
        "Mixed_7c.branch3x3dbl_3b": "mixed_10/tower_1/mixed/conv_1",
        "Mixed_7c.branch_pool": "mixed_10/tower_2/conv",
    }.items():
        assert pairs[name] == scope


@pytest.mark.parametrize("side", SIDES)
def test_resize_against_the_formula(side: int) -> None:
    """Output i reads input i * in / out, between its two neighbours."""
    image = torch.rand(1, 2, side, side + 5, dtype=torch.float64) * 255
    sides = image.shape[2:]
    wanted = image
    for axis, length in zip((2, 3), sides, strict=True):
        place = torch.arange(299, dtype=torch.float64) * length / 299
        low = place.floor().long()
        share = (place - low).reshape([-1 if i == axis else 1 for i in range(4)])
        high = (low + 1).clamp_max(length - 1)
        wanted = wanted.index_select(axis, low) * (1 - share) + wanted.index_select(axis, high) * share
    # places up to 512 in float32, as in the graph: half a unit of 2^-15 px, times 255 a pixel, along two axes
    torch.testing.assert_close(resize_like_tf1(image), wanted, rtol=0, atol=2 * 255 * 2**-15)
    square = pixels(299).float()
    assert torch.equal(resize_like_tf1(square), square)


@torch.no_grad()
def test_features(network: InceptionV3) -> None:
    """Spatial features: the first seven channels of the 1x1 branch of Mixed_6d, after norm and ReLU."""
    seen: list[torch.Tensor] = []
    hook = network.Mixed_6d.get_submodule("branch1x1").register_forward_hook(lambda *a: seen.append(a[2]))
    images = pixels(64)
    pool, spatial = network(images)
    hook.remove()
    assert pool.shape == (2, 2048) and spatial.shape == (2, 2023)
    assert seen[0].shape == (2, 192, 17, 17) and seen[0].min() == 0
    assert torch.equal(spatial.reshape(2, 17, 17, 7), seen[0][:, :7].permute(0, 2, 3, 1))
    torch.testing.assert_close(network.logits(pool), network.fc(pool) - network.fc.bias, rtol=1e-4, atol=1e-4)
    # what is run: sums of other orders, float32; bfloat16 rounds by 2^-9 in each of 20 layers
    fast, rough = network.folded()(images), network.folded(torch.bfloat16)(images)
    assert deviation(fast[0], pool) < 1e-5 and deviation(fast[1], spatial) < 1e-5
    assert 1e-5 < deviation(rough[0], pool) < 0.05 and deviation(rough[1], spatial) < 0.1
    assert not network.train().training


def test_three_kinds_of_file_hold_one_network(network: InceptionV3, tmp_path: Path) -> None:
    files = (
        save_pth(network, tmp_path / "a.pth"),
        save_pth(network, tmp_path / "counters.pth", counters=True),
        save_openai(network, tmp_path / "openai.pt"),
        save_graph(network, tmp_path / "graph.pb"),
    )
    assert {read_inception(file).digest() for file in files} == {network.digest()}
    scaled = random_inception()
    assert (
        read_inception(save_graph(scaled, tmp_path / "scaled.pb")).digest()
        == scaled.digest()
        != network.digest()
    )


def test_constants_of_a_graph(tmp_path: Path) -> None:
    file = tmp_path / "graph.pb"
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    filled = node("filled", 1, (4,), np.float32(7).tobytes(), listed=True)
    file.write_bytes(constant("a", array) + constant("b", array, listed=True) + filled)
    found = read_constants(file)
    assert np.array_equal(found["a"], array) and np.array_equal(found["b"], array)
    assert found["filled"].tolist() == [7, 7, 7, 7]  # one value may stand for all


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "with constants, got none"),
        (b"not a graph at all", "another format or cut short"),
        (constant("a", np.ones((2, 3), np.float32))[:-5], "cut short: a field of"),
        (varint(10) + b"\xff" * 12, "a number without an end"),
        (node("a", 1, (3,), b"12345678"), r"a has 2 values for the shape \(3,\)"),
    ],
)
def test_refuses_what_is_no_graph(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "graph.pb").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_constants(tmp_path / "graph.pb")


def test_refuses_weights_of_another_network(network: InceptionV3, tmp_path: Path) -> None:
    entries = network.state_dict()

    def refused(changed: dict[str, torch.Tensor], message: str) -> None:
        torch.save(changed, tmp_path / "other.pth")
        with pytest.raises(CheckpointError, match=message):
            read_inception(tmp_path / "other.pth")

    stranger, fewer = {"conv1.weight": torch.zeros(64, 3, 7, 7)}, {"fc.weight": torch.zeros(1000, 2048)}
    refused(stranger, "472 entries of FID's Inception.*got 1, 472 missing.*1 of others")
    refused({**entries, **fewer}, r"fc.weight of shape \(1000, 2048\).*torchvision's is another")
    broken = {"fc.bias": torch.full((1008,), torch.nan)}
    refused({**entries, **broken}, "finite weights, got NaN or infinity in fc.bias")
    refused({k: v for k, v in entries.items() if k != "fc.bias"}, "got 471, 1 missing, such as fc.bias")
    save_pth(network, tmp_path / "cut.pth")
    whole = (tmp_path / "cut.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="cut short"):
        read_inception(tmp_path / "cut.pth")
    with pytest.raises(CheckpointError, match="could not read"):
        read_inception(tmp_path / "none.pth")


def test_the_file_is_named_or_in_the_cache_of_torch_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert find_weights(tmp_path / "named.pth") == tmp_path / "named.pth"
    with pytest.raises(CheckpointError, match=rf"--weights, or put one at .*{HUB_FILE}. .*--features lite0"):
        find_weights()
    cached = tmp_path / "hub" / "checkpoints" / HUB_FILE
    cached.parent.mkdir(parents=True)
    cached.touch()
    assert find_weights() == cached


@torch.no_grad()
@with_torch_fidelity
@pytest.mark.parametrize("side", SIDES)
def test_features_equal_those_of_torch_fidelity(
    network: InceptionV3, side: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = save_pth(network, tmp_path / "a.pth", counters=True)
    theirs = module("feature_extractor_inceptionv3", monkeypatch).FeatureExtractorInceptionV3(
        "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(file)
    )
    seen: list[torch.Tensor] = []
    theirs.Mixed_6d.branch1x1.register_forward_hook(lambda *a: seen.append(a[2]))
    images = pixels(side)
    pool, logits = theirs(images)
    spatial = seen[0][:, :7].permute(0, 2, 3, 1).flatten(1)
    for each in (network, network.folded()):
        found = each(images)
        assert deviation(found[0], pool) < 1e-5
        assert deviation(found[1], spatial) < 1e-5
        assert deviation(each.logits(found[0]), logits) < 1e-5
