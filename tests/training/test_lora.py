"""Adapters: what is trained and what stays, merged and in peft's own format, resumed and on ranks."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import var_ext
from tests.tiny import tiny
from tests.training.ranked import ranked, train
from var_ext.checkpoints import load_tensors, load_tokenizer
from var_ext.models import VAR
from var_ext.models.keyed import row_keys
from var_ext.training import VARRecipe, train_var
from var_ext.training.loop import Moment
from var_ext.training.lora import add_adapters, whole_model
from var_ext.training.network import build_network, other_classes
from var_ext.training.plan import PeakMemory, plan
from var_ext.training.var import VARTask

MATRICES = ("attn.mat_qkv", "attn.proj", "ffn.fc1", "ffn.fc2")


@pytest.fixture(scope="session")
def recipe(var_recipe: VARRecipe) -> VARRecipe:
    return var_recipe.with_options(lora=4, epochs=2, lora_dropout=0.1, lora_alpha=8)


def tune(images: Path, model: Path, out: Path, recipe: VARRecipe) -> Path:
    return train_var(images, model, out, recipe, init_from=model, progress=False)


def entries(folder: Path) -> dict[str, torch.Tensor]:
    """Of the transformer, with adapters merged."""
    return var_ext.checkpoints.find_model(folder).models()[1].state_dict()


def test_a_model_with_fresh_adapters_is_the_same(var_recipe: VARRecipe) -> None:
    _, var = tiny()
    labels, words = torch.tensor([0, 4]), torch.randn(2, 20, 8)
    before, plain = var(labels, words), var.state_dict()
    note = add_adapters(var, var_recipe.with_options(lora=4), new_classes=False)
    # rounding: the MLP adds the bias with the GELU where nothing stands between them
    torch.testing.assert_close(var(labels, words), before, rtol=1e-5, atol=1e-6)
    trained = {name: p for name, p in var.named_parameters() if p.requires_grad}
    sides = {name: sum(plain[f"blocks.0.{name}.weight"].shape) for name in MATRICES}
    count = sum(p.numel() for p in trained.values())
    assert len(trained) == 16 and count == 2 * 4 * sum(sides.values())
    assert f"rank 4 beside 8 linear layers are trained: {count:,} of " in note
    assert all(".lora_A." in name or ".lora_B." in name for name in trained)


@pytest.mark.parametrize("shared_aln", [False, True])
def test_merged_weights_answer_as_adapters_do(var_recipe: VARRecipe, shared_aln: bool) -> None:
    recipe = var_recipe.with_options(lora=3, lora_alpha=5.0, lora_targets="*")
    _, var = tiny(shared_aln=shared_aln)
    linear = [name for name, layer in var.named_modules() if isinstance(layer, torch.nn.Linear)]
    add_adapters(var, recipe, new_classes=False)
    with torch.no_grad():
        for name, p in var.named_parameters():
            if ".lora_B." in name:
                p.normal_(std=0.1)
    labels, words = torch.tensor([0, 4]), torch.randn(2, 20, 8)
    wanted, (_, plain) = var(labels, words), tiny(shared_aln=shared_aln)
    before = plain(labels, words)
    changed = whole_model(var.state_dict(), recipe)
    assert {n for n, t in plain.state_dict().items() if not torch.equal(t, changed[n])} == {
        f"{name}.weight" for name in linear
    }
    plain.load_state_dict(changed)
    assert (wanted - before).abs().max() > 0.05
    torch.testing.assert_close(plain(labels, words), wanted, rtol=1e-4, atol=1e-5)  # another order of sums


def test_training_learns_and_changes_the_targets_alone(
    trained: Path, images: Path, recipe: VARRecipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"lora_targets": "blocks.{1-1}.attn.proj,head", "select": "last"}
    out = tune(images, trained, tmp_path, recipe.with_options(**options))
    before, after = entries(trained), entries(out)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        "blocks.1.attn.proj.weight",
        "head.weight",
    }
    said = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert any("adapters of rank 4 beside 2 linear layers are trained: " in line for line in said)
    assert load_tensors(out / "var.safetensors").keys() == before.keys()  # a model as any other


def test_new_classes_are_trained_beside_adapters(
    trained: Path, other_images: Path, recipe: VARRecipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tune(other_images, trained, tmp_path, recipe)
    assert "trained, and the embeddings of other classes as a whole: " in caplog.text
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        vae = load_tokenizer(trained)
        fresh = VAR(vae, **{**var_ext.load(trained).var.config, "num_classes": 3})
        fresh.init_weights(recipe.init_adaln, recipe.init_adaln_gamma, recipe.init_head, -1)
    before, after = fresh.class_emb.weight[:3].detach(), entries(out)["class_emb.weight"]
    assert after.shape[0] == 4 and (after[:3] - before).abs().max() > 1e-4
    assert (after[3] != entries(trained)["class_emb.weight"][2]).any()  # "no class" learns too


def test_as_many_classes_with_other_names_are_other_classes(
    trained: Path, images: Path, recipe: VARRecipe, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    for folder, name in zip(sorted(images.iterdir()), ("above", "below"), strict=True):
        (tmp_path / "data" / name).symlink_to(folder)
    before = entries(trained)["class_emb.weight"]
    assert not torch.equal(
        entries(tune(tmp_path / "data", trained, tmp_path / "a", recipe))["class_emb.weight"], before
    )
    assert torch.equal(entries(tune(images, trained, tmp_path / "b", recipe))["class_emb.weight"], before)
    assert (
        other_classes("ab", 3, None)
        and not other_classes("ab", 2, None)
        and not other_classes("ab", 2, ["a", "b"])
    )


def test_an_adapter_alone_goes_back_on_its_model(
    trained: Path, other_images: Path, recipe: VARRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged = tune(other_images, trained, tmp_path / "merged", recipe)
    monkeypatch.chdir(trained.parent)  # a relative name
    alone = train_var(
        other_images, trained.name, tmp_path / "alone", recipe.with_options(lora_save="adapter"),
        init_from=trained.name, progress=False,
    )  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert not (alone / "var.safetensors").exists() and not (alone / "vae.safetensors").exists()
    wanted, found = var_ext.load(merged), var_ext.load(alone)
    assert found.class_names == wanted.class_names and found.defaults == wanted.defaults
    ours, theirs = found.var.state_dict(), wanted.var.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    size = sum(t.numel() for t in load_tensors(alone / "adapter_model.safetensors").values())
    assert size < 0.5 * sum(t.numel() for t in theirs.values())


def test_peft_reads_the_adapter(trained: Path, images: Path, recipe: VARRecipe, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    out = tune(images, trained, tmp_path, recipe.with_options(lora_save="adapter"))
    var = var_ext.load(trained).var
    found = peft.PeftModel.from_pretrained(var, out).merge_and_unload().state_dict()
    wanted = entries(out)
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(tensor, entries(trained)[name]) for name, tensor in wanted.items())


def test_peft_reads_new_classes_too(
    trained: Path, other_images: Path, recipe: VARRecipe, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    out = tune(other_images, trained, tmp_path, recipe.with_options(lora_save="adapter"))
    base = var_ext.load(trained).var
    var = VAR(base.vae_proxy[0], **{**base.config, "num_classes": 3}).eval()
    kept = {n: t for n, t in base.state_dict().items() if n != "class_emb.weight"}
    var.load_state_dict(kept, strict=False)
    found = peft.PeftModel.from_pretrained(var, out).merge_and_unload()
    labels, words = torch.tensor([0, 2]), torch.randn(2, 20, 4)
    torch.testing.assert_close(
        found(labels, words), var_ext.load(out).var(labels, words), rtol=1e-4, atol=1e-5
    )


def test_another_end_takes_the_place_of_an_adapter(
    trained: Path, images: Path, recipe: VARRecipe, tmp_path: Path
) -> None:
    tune(images, trained, tmp_path, recipe.with_options(lora_save="adapter"))
    tune(images, trained, tmp_path, recipe)  # nothing is left to train
    assert not (tmp_path / "adapter_config.json").exists() and (tmp_path / "var.safetensors").exists()


class Killed(Exception):
    pass


@pytest.mark.parametrize("options", [{}, {"autocast": "bf16", "micro_batch": 5, "ema": 0.0}], ids=str)
def test_a_resumed_run_ends_with_the_same_bits(
    trained: Path,
    other_images: Path,
    recipe: VARRecipe,
    tmp_path: Path,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = recipe.with_options(**options)
    whole = tune(other_images, trained, tmp_path / "whole", recipe)
    step = VARTask.step

    def killed(self: VARTask, at: Moment, batch: Any) -> Any:
        if at.step == 3:
            raise Killed
        return step(self, at, batch)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(VARTask, "step", killed)
        tune(other_images, trained, tmp_path / "cut", recipe)
    cut = tune(other_images, trained, tmp_path / "cut", recipe)
    found, wanted = entries(cut), entries(whole)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_ranks_and_shards_train_the_same(
    trained: Path, other_images: Path, recipe: VARRecipe, tmp_path: Path
) -> None:
    """Within the order of sums, which Adam turns into steps, after 12 of them; of adapters no more than of weights."""
    recipe = recipe.with_options(epochs=4, batch_size=12)
    train(("tune", (other_images, trained, tmp_path / "alone"), recipe))
    kinds = {"none": 0, "optimizer": 4, "full": 5}
    cases = [
        (
            "tune",
            (other_images, trained, tmp_path / shard),
            recipe.with_options(shard=shard, micro_batch=most),
        )
        for shard, most in kinds.items()
    ]
    ranked(2, cases, tmp_path)
    wanted, before = entries(tmp_path / "alone"), entries(trained)
    assert (wanted["blocks.0.ffn.fc1.weight"] - before["blocks.0.ffn.fc1.weight"]).abs().max() > 1e-3
    for shard in kinds:
        found = entries(tmp_path / shard)
        apart = {name: (found[name] - tensor).abs().max().item() for name, tensor in wanted.items()}
        assert max(apart.values()) < 1e-5, (shard, max(apart, key=apart.__getitem__))


def test_dropout_of_adapters_belongs_to_the_row(var_recipe: VARRecipe) -> None:
    _, var = tiny()
    add_adapters(var, var_recipe.with_options(lora=4, lora_dropout=0.5), new_classes=False)
    with torch.no_grad():
        for name, p in var.named_parameters():
            if ".lora_B." in name:
                p.normal_(std=0.5)
    var.train()
    rows, words = var.key_rows(torch.device("cpu")), torch.randn(6, 20, 8)

    def run(part: slice) -> torch.Tensor:
        rows.keys = row_keys(7, part)
        return var(torch.zeros(6, dtype=torch.int64)[part], words[part])

    whole, halves = run(slice(0, 6)), torch.cat([run(slice(0, 2)), run(slice(2, 6))])
    torch.testing.assert_close(halves, whole, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(
        run(slice(0, 6)), var.eval()(torch.zeros(6, dtype=torch.int64), words), atol=1e-2
    )


def test_a_plan_counts_what_is_trained(tokenizer: Path, var_recipe: VARRecipe) -> None:
    vae = load_tokenizer(tokenizer)
    recipe = var_recipe.with_options(lora=4)
    plain, same, other = (
        plan(var_recipe, vae, 3),
        plan(recipe, vae, 3, 1, False),
        plan(recipe, vae, 3, 1, True),
    )
    assert (
        same.trained == 2 * 4 * (32 + 96 + 32 + 32 + 2 * (32 + 128))
        and other.trained == same.trained + 4 * 32
    )
    assert same.parameters == plain.parameters + same.trained and same.optimizer == 12 * same.trained
    assert same.total < plain.total and "0.00M of them trained" in same.as_text()
    assert same.flops == plain.flops * 2 // 3


def test_a_plan_promises_what_a_step_takes(
    trained: Path, images: Path, recipe: VARRecipe, tmp_path: Path
) -> None:
    recipe = recipe.with_options(embed_dim=128, drop_rate=0.0, lora_dropout=0.0)
    vae = load_tokenizer(trained)
    promised = plan(recipe, vae, 2, 1, False)
    with torch.no_grad():
        source = build_network(recipe, vae, 2)
    with PeakMemory() as peak:
        task = VARTask(images, vae, tmp_path, recipe, source=source)
        task.load_data()
        for step in range(2):  # the state of the optimizer comes with the first
            peak.peak = 0
            (batch,) = task.feed(0, torch.arange(12).view(1, 12))
            task.step(Moment(step, 10, 0, False), batch)
    assert promised.total == pytest.approx(peak.peak, rel=0.1)


def test_without_peft_the_command_is_named(
    trained: Path, images: Path, recipe: VARRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"lora needs peft: pip install 'var_ext\[lora\]'"):
        tune(images, trained, tmp_path, recipe)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora": 32}, "lora must be below 32, the smaller side of blocks.0.attn.mat_qkv, got 32"),
        ({"lora_targets": "blocks.*.mlp"}, "lora_targets: 'blocks.*.mlp' matches no linear layer; names are like"),
        ({"lora_save": "adapter", "patch_nums": "1,3,4"}, "lora_save = adapter keeps the scales of --init-from"),
    ],
)  # fmt: skip
def test_adapters_that_cannot_be(
    trained: Path, images: Path, recipe: VARRecipe, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message.replace("*", r"\*")):
        tune(images, trained, tmp_path, recipe.with_options(**options))


def test_an_adapter_is_of_the_models_own_tokenizer(
    trained: Path, images: Path, recipe: VARRecipe, tmp_path: Path
) -> None:
    vae = load_tokenizer(trained)
    with torch.no_grad():
        vae.decoder.conv_out.bias += 1
    other = var_ext.save_model(tmp_path / "other", vae)
    with pytest.raises(
        ValueError, match="keeps the tokenizer of --init-from, got another: take lora_save = m"
    ):
        train_var(
            images, other, tmp_path / "out", recipe.with_options(lora_save="adapter"), init_from=trained,
            progress=False,
        )  # fmt: skip


def test_the_folder_has_pefts_fields(trained: Path, images: Path, recipe: VARRecipe, tmp_path: Path) -> None:
    out = tune(images, trained, tmp_path, recipe.with_options(lora_save="adapter", epochs=1))
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and (config["r"], config["lora_alpha"]) == (4, 8)
    assert config["base_model_name_or_path"] == str(trained) and config["modules_to_save"] is None
