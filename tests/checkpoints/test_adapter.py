"""Folders of adapters as peft writes them: what is read, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import var_ext
from tests.tiny import tiny
from var_ext.checkpoints import CheckpointError, find_model, save_adapter
from var_ext.checkpoints.adapter_entries import merged

LAYER = "blocks.0.attn.proj"
FIELDS = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 6,
    "use_rslora": False,
    "bias": "none",
    "target_modules": {"b", "a"},
}


def pair(rank: int = 2, layer: str = LAYER) -> dict[str, torch.Tensor]:
    return {f"{layer}.lora_A.weight": torch.randn(rank, 64), f"{layer}.lora_B.weight": torch.randn(64, rank)}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    vae, var = tiny()
    return var_ext.save_model(tmp_path / "base", vae, var, sampling={"cfg": 2.0}, class_names=list("abcde"))


def save(base: Path, adapter: dict[str, torch.Tensor], **fields: Any) -> Path:
    description = {**FIELDS, "base_model_name_or_path": str(base), **fields}
    return save_adapter(
        base.parent / "adapter",
        adapter,
        description,
        num_classes=5,
        sampling={"cfg": 3.0},
        class_names=list("vwxyz"),
    )


@pytest.mark.parametrize(("rslora", "scale"), [(False, 3.0), (True, 6 / 2**0.5)])
def test_it_is_put_on_its_model(base: Path, rslora: bool, scale: float) -> None:
    adapter = pair()
    sampler = var_ext.load(save(base, adapter, use_rslora=rslora), precision="fp32")
    assert sampler.class_names == list("vwxyz") and sampler.defaults["cfg"] == 3.0
    ours, theirs = sampler.var.state_dict(), var_ext.load(base).var.state_dict()
    added = scale * adapter[f"{LAYER}.lora_B.weight"] @ adapter[f"{LAYER}.lora_A.weight"]
    torch.testing.assert_close(ours[f"{LAYER}.weight"], theirs[f"{LAYER}.weight"] + added)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs if name != f"{LAYER}.weight")
    assert sampler([0], [1]).shape == (1, 3, 8, 8)


def test_a_folder_of_peft_alone_takes_the_names_of_its_model(base: Path) -> None:
    folder = save(base, pair())
    (folder / "config.json").unlink()
    found = find_model(folder)
    assert found.class_names == list("abcde") and found.sampling == {"cfg": 2.0}
    assert json.loads((folder / "adapter_config.json").read_text())["target_modules"] == ["a", "b"]


def test_a_repository_of_adapters(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(base, pair())
    wanted = find_model(folder).models()[1].state_dict()
    monkeypatch.setattr("var_ext.checkpoints.find.fetch", lambda name, file, hint="": folder / file)
    found = find_model("somebody/letters")
    assert found.class_names == list("vwxyz") and found.source.endswith("/somebody/letters")
    entries = found.models()[1].state_dict()
    assert all(torch.equal(entries[name], tensor) for name, tensor in wanted.items())


def test_adapters_of_an_adapter(base: Path) -> None:
    first, second = save(base, pair()), base.parent / "second"
    description = {**FIELDS, "base_model_name_or_path": str(first)}
    save_adapter(second, pair(), description, num_classes=5, sampling={}, class_names=None)
    weights = [find_model(path).models()[1].state_dict()[f"{LAYER}.weight"] for path in (base, first, second)]
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])
    assert find_model(second).class_names is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "LOHA"}, "must have peft_type = 'LORA', got 'LOHA': merge it with peft"),
        ({"use_dora": True}, "must have use_dora = False, got True"),
        ({"bias": "all"}, "must have bias = 'none', got 'all'"),
        ({"alpha_pattern": {"proj": 3}}, "must have alpha_pattern = {}, got {'proj': 3}"),
        ({"r": 0}, "and have the numbers r and lora_alpha, got .*, 0 and 6"),
        ({"base_model_name_or_path": None}, "must name a model in base_model_name_or_path, .* got None, 2 and 6"),
        ({"base_model_name_or_path": "nowhere"}, "adapters of another model, which is not there: the model must be"),
    ],
)  # fmt: skip
def test_other_adapters_are_refused(base: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        find_model(save(base, pair(), **fields))


def test_a_tokenizer_has_no_adapters(base: Path) -> None:
    other = var_ext.save_model(base.parent / "vae", tiny()[0])
    with pytest.raises(CheckpointError, match="which must have a transformer, got a tokenizer alone"):
        find_model(save(other, pair()))


def test_a_model_that_is_its_own_adapter_is_refused(base: Path) -> None:
    folder = save(base, pair())
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": str(folder)})
    )
    with pytest.raises(CheckpointError, match="holds adapters of another model, which is itself"):
        find_model(folder)


def test_adapters_that_are_each_others_model_are_refused(base: Path) -> None:
    first, second = save(base, pair()), base.parent / "second"
    shutil.copytree(first, second)
    for folder, other in ((first, second), (second, first)):
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(other)}))
    with pytest.raises(CheckpointError, match="holds adapters of another model, which is itself"):
        find_model(first)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda a: a.pop(f"{LAYER}.lora_B.weight"),
            r"\(r, in\) and lora_B .* got \(2, 64\), None and \(64, 64\)",
        ),
        (
            lambda a: a.pop(f"{LAYER}.lora_A.weight"),
            "must have entries of this model .* got blocks.0.attn.proj.lora_B",
        ),
        (lambda a: a.update(pair(layer="blocks.7.attn.proj")), r"for blocks.7.attn.proj, got .* and None"),
        (lambda a: a.update(pair(layer="blocks.0.ffn.fc1")), r"for blocks.0.ffn.fc1, got .* and \(256, 64\)"),
        (
            lambda a: a.update({"magnitude": torch.ones(3)}),
            "entries of this model and its adapters, got magnitude",
        ),
        (lambda a: a.update({"head.bias": torch.ones(3)}), r"head.bias \(wanted \(16,\) .*, got \(3,\)"),
    ],
)
def test_weights_that_do_not_fit_are_named(
    base: Path, change: Callable[[dict[str, torch.Tensor]], Any], message: str
) -> None:
    adapter = pair()
    change(adapter)
    with pytest.raises(CheckpointError, match=message):
        find_model(save(base, adapter)).models()


def test_an_adapter_cut_short_is_named(base: Path) -> None:
    folder = save(base, pair())
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(
        CheckpointError, match=r"adapter_model\.safetensors must be a complete safetensors file"
    ):
        find_model(folder).models()


def test_half_precision_is_merged_in_float32(base: Path) -> None:
    adapter = {name: tensor.half() for name, tensor in pair().items()}
    weights = find_model(base).models()[1].state_dict()
    found = merged({f"{LAYER}.weight": weights[f"{LAYER}.weight"].half()}, adapter, 1.0)[f"{LAYER}.weight"]
    assert found.dtype == torch.float32 and not torch.equal(found, found.half().float())
