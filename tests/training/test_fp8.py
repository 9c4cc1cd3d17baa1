"""8-bit products, emulated: what they are, how far a training with them is from one without, where they are refused."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.tiny import tiny
from tests.training.ranked import ranked
from var_ext.checkpoints import load_tensors
from var_ext.training import VARRecipe, train_var
from var_ext.training.fp8 import to_fp8

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def recipe(var_recipe: VARRecipe) -> VARRecipe:
    return var_recipe.with_options(fp8="emulated", autocast="bf16")


def rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """To 8 bits, with the scale that makes the largest number the type's largest, a power of two or not."""
    scale = torch.finfo(dtype).max / x.abs().max()
    return (x * scale).to(dtype).to(torch.float32) / scale


def test_products_of_blocks_are_rounded_and_nothing_else() -> None:
    _, var = tiny()
    plain = {name: type(layer) for name, layer in var.named_modules() if isinstance(layer, nn.Linear)}
    names = list(var.state_dict())
    assert "8 linear layers multiply in 8 bits, emulated in float32" in to_fp8(var, CPU, emulate=True)
    changed = {n for n, layer in var.named_modules() if n in plain and type(layer) is not plain[n]}
    assert changed == {
        f"blocks.{i}.{n}" for i in range(2) for n in ("attn.mat_qkv", "attn.proj", "ffn.fc1", "ffn.fc2")
    }
    assert list(var.state_dict()) == names
    layer = var.blocks[0].ffn.fc1
    x = torch.randn(3, 7, 64, requires_grad=True)
    y = layer(x)
    weight, e4m3, e5m2 = layer.weight.detach(), torch.float8_e4m3fn, torch.float8_e5m2
    wanted = rounded(x.detach(), e4m3) @ rounded(weight, e4m3).T + layer.bias
    # the scale may round to another last bit, which moves single numbers to the next of 8 bits
    torch.testing.assert_close(y.detach(), wanted.detach(), rtol=0.02, atol=0.02)
    assert (y - x @ weight.T - layer.bias).abs().max() > 0.02
    slope = torch.randn_like(y)
    y.backward(slope)
    torch.testing.assert_close(x.grad, rounded(slope, e5m2) @ rounded(weight, e4m3), rtol=0.03, atol=0.05)


def test_a_training_learns_nearly_as_without(
    images: Path, tokenizer: Path, recipe: VARRecipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Validation loss after 18 steps. A product in 8 bits is wrong by 4%, of which training must show little: more than
    bfloat16 alone, less than a tenth of what was learned."""
    found = {}
    kinds: dict[str, dict[str, Any]] = {"fp8": {}, "bf16": {"fp8": "none"}}
    for kind, options in kinds.items():
        train_var(images, tokenizer, tmp_path / kind, recipe.with_options(**options), progress=False)
        lines = [json.loads(line) for line in (tmp_path / kind / "log.jsonl").read_text().splitlines()]
        found[kind] = [line["loss"] for line in lines if line["phase"] == "val"]
    learned = found["bf16"][0] - found["bf16"][-1]
    apart = abs(found["fp8"][-1] - found["bf16"][-1])
    assert learned > 0.1 and 0 < apart < 0.1 * learned, found
    said = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert any("fp8 is an experiment" in line for line in said)
    entries = [load_tensors(tmp_path / kind / "var.safetensors") for kind in found]
    assert entries[0].keys() == entries[1].keys()  # a model as any other


@pytest.mark.slow
def test_ranks_and_shards(images: Path, tokenizer: Path, recipe: VARRecipe, tmp_path: Path) -> None:
    """A scale is that of the rows that a rank computes at once, so ranks round otherwise: near, and finite."""
    recipe = recipe.with_options(epochs=2, select="last")
    alone = train_var(images, tokenizer, tmp_path / "alone", recipe, progress=False)
    kinds = ("none", "optimizer", "full")
    cases: list[Any] = [
        ("var", (images, tokenizer, tmp_path / shard), recipe.with_options(shard=shard)) for shard in kinds
    ]
    ranked(2, cases, tmp_path)
    wanted = load_tensors(alone / "var.safetensors")["blocks.0.ffn.fc1.weight"]
    for shard in kinds:
        found = load_tensors(tmp_path / shard / "var.safetensors")["blocks.0.ffn.fc1.weight"]
        assert (found - wanted).norm() < 0.1 * wanted.norm()


@pytest.mark.parametrize(
    ("capability", "has"),
    [((8, 0), "NVIDIA A100, of capability 8.0"), ((8, 6), "NVIDIA A100, of capability 8.6")],
)
def test_older_gpus_are_refused(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], has: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    with pytest.raises(
        ValueError, match=f"fp8 needs a GPU of compute capability 8.9 or newer, got {has}: leave"
    ):
        to_fp8(tiny()[1], torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert "emulated" not in to_fp8(tiny()[1], torch.device("cuda"))


def test_other_devices_and_sides_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match=r"capability 8\.9 or newer, got cpu: leave out --fp8; --fp8 emulated"
    ):
        to_fp8(tiny()[1], CPU)
    _, var = tiny()
    var.blocks[1].ffn.fc2 = nn.Linear(256, 72)
    with pytest.raises(ValueError, match=r"multiples of 16, got blocks.1.ffn.fc2 of \(72, 256\)"):
        to_fp8(var, CPU, emulate=True)
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(ValueError, match=r"fp8 needs torchao: pip install 'var_ext\[fp8\]'"):
        to_fp8(tiny()[1], CPU, emulate=True)
