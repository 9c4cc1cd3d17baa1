"""Files from strangers cost no more than their size, and end in one line."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import var_ext
from tests.tiny import tiny
from var_ext.checkpoints import (
    CheckpointError,
    find_model,
    load_published,
    load_tensors,
    save_model,
    save_tensors,
)
from var_ext.checkpoints.model_folder import parse
from var_ext.checkpoints.released import MODELS, published_config
from var_ext.checkpoints.training_run import progress, read_checkpoint
from var_ext.info import describe_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("saved"), *tiny())


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


UNFIT: list[tuple[str, str, Any]] = [
    ("var", "depth", 10**7),
    ("var", "depth", 16.0),
    ("var", "norm_eps", "1e-6"),
    ("var", "norm_eps", [1]),
    ("var", "norm_eps", float("nan")),
    ("var", "cond_drop_rate", {}),
    ("var", "attn_l2_norm", "no"),
    ("var", "mlp_ratio", float("inf")),
    ("var", "patch_nums", "124"),
    ("var", "num_classes", 10**30),
    ("vae", "ch_mult", [1] * 10**5),
    ("vae", "ch_mult", [1, [1]]),
    ("vae", "share_quant_resi", 10**8),
    ("vae", "default_qresi_counts", 10**8),
    ("vae", "v_patch_nums", [1] * 10**6),
    ("vae", "v_patch_nums", [10**6]),
    ("vae", "z_channels", True),
    ("vae", "beta", None),
    ("vae", "vocab_size", "16"),
]


@pytest.mark.parametrize("use", [describe_model, var_ext.load], ids=["info", "load"])
@pytest.mark.parametrize(("model", "name", "value"), UNFIT, ids=lambda value: repr(value)[:20])
def test_arguments_are_bounded_before_anything_is_built(
    use: Callable[[Path], Any],
    model: str,
    name: str,
    value: Any,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = json.loads((folder / "config.json").read_text())
    config[model][name] = value
    (folder / "config.json").write_text(json.dumps(config))

    def built(*_: Any, **__: Any) -> None:
        raise AssertionError("a network was built")

    if model == "vae":
        monkeypatch.setattr("var_ext.models.vqvae.Encoder.__init__", built)
    else:
        monkeypatch.setattr("var_ext.models.var.AdaLNSelfAttn.__init__", built)
    with pytest.raises(CheckpointError, match=rf"{name} must be .*, got ") as raised:
        use(folder)
    assert len(str(raised.value)) < 500 and "\n" not in str(raised.value)


def test_images_are_bounded(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["vae"] |= {"v_patch_nums": [1, 1024], "ch_mult": [1] * 12}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="side of an image must be at most 16384 pixels, got 2097152"):
        describe_model(folder)


def test_published_models_are_within_the_bounds() -> None:
    for depth in MODELS.values():
        config = {"format": "var_ext/1", **published_config(depth)}
        parse(json.loads(json.dumps(config)), "here", Path).shapes()


@pytest.mark.parametrize(
    "text", ['{"format":' + "[" * 10**5 + "]" * 10**5 + "}", '{"a":' * 10**5, "[" * 10**6]
)
def test_deeply_nested_json_is_one_line(text: str, folder: Path) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json must be a JSON object"):
        find_model(folder)


@pytest.mark.parametrize(
    "config",
    [
        {"training": "../../elsewhere.ckpt"},
        {"training": "/etc/passwd"},
        {"training": "step-.ckpt"},
        {"digests": 3},
    ],
)
def test_a_config_names_files_of_its_folder_alone(config: dict[str, object], folder: Path) -> None:
    own = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(own | config))
    with pytest.raises(CheckpointError, match=next(iter(config))):
        find_model(folder)


def test_digests_of_a_mixins_config_are_no_digests() -> None:
    with pytest.raises(CheckpointError, match="digests"):
        parse({"vae_kwargs": {}, "digests": 3}, "here", Path).shapes()


@pytest.mark.parametrize("change", [lambda t: t + 100, lambda t: -t, lambda t: t * 0, lambda t: t.flip(1)])
def test_levels_are_those_of_the_scales(change: Callable[[Tensor], Tensor], folder: Path) -> None:
    entries = load_tensors(folder / "var.safetensors")
    save_tensors(folder / "var.safetensors", entries | {"lvl_1L": change(entries["lvl_1L"])})
    with pytest.raises(
        CheckpointError, match=r"var\.safetensors must have in lvl_1L the scale of each token"
    ):
        var_ext.load(folder)


def expanded(tensor: Tensor) -> Tensor:
    return torch.zeros(1).expand(6 * 10**8, *tensor.shape[1:])


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("which", "entry", "change", "message"),
    [
        (1, "lvl_embed.weight", expanded, r"shape \(600000000, 64\), ask for over"),
        (0, "quantize.embedding.weight", expanded, r"shape \(600000000, 8\), ask for over"),
        (1, "head.weight", lambda t: t.to_sparse_csr(), r"not dense and plain \(sparse_csr"),
        (1, "head.weight", lambda t: t.to_sparse(), r"not dense and plain \(sparse_coo"),
        (1, "head.weight", lambda t: torch.complex(t, t).conj().imag, "not dense and plain"),
        (1, "head.weight", lambda t: t.to("meta"), "not dense and plain .* on meta"),
        (
            1,
            "head.weight",
            lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
            "not dense and plain",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_ask_for_more_than_their_file(
    which: int, entry: str, change: Callable[[Tensor], Any], message: str, zipped: bool, tmp_path: Path
) -> None:
    files = []
    for n, model in enumerate(tiny()):
        entries = dict(model.state_dict())
        if n == which:
            entries[entry] = change(entries[entry])
        files.append(tmp_path / f"{n}.pth")
        torch.save(entries, files[-1], _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=rf"{which}\.pth must hold plain tensors .*{message}"):
        load_published(*files)


def test_many_entries_of_one_memory(tmp_path: Path) -> None:
    memory = torch.zeros(10**5)
    torch.save({"pos_1LC": memory, **{f"blocks.{n}.x": memory for n in range(10)}}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="ask for over"):
        load_published(tmp_path / "x.pth")


def test_compressed_records_are_refused(tmp_path: Path) -> None:
    torch.save({"pos_1LC": torch.zeros(10**6)}, tmp_path / "x.pth")
    with zipfile.ZipFile(tmp_path / "x.pth") as plain, zipfile.ZipFile(tmp_path / "y.pth", "w") as packed:
        for record in plain.infolist():
            packed.writestr(record.filename, plain.read(record), zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="its records are compressed"):
        load_published(tmp_path / "y.pth")


class Foreign(Tensor):
    """Of a class that somebody let torch read."""


def test_tensors_of_other_classes(tmp_path: Path) -> None:
    torch.save({"state": torch.ones(3).as_subclass(Foreign)}, tmp_path / "x.ckpt")
    with (
        torch.serialization.safe_globals([Foreign]),
        pytest.raises(CheckpointError, match="not dense and plain"),
    ):
        read_checkpoint(tmp_path / "x.ckpt")


def test_containers_are_bounded(tmp_path: Path) -> None:
    content: Any = {}
    for _ in range(100):
        content = {"state": content}
    itself: dict[str, Any] = {}
    itself["itself"] = itself
    for n, each in enumerate((content, itself)):
        torch.save(each, tmp_path / f"{n}.ckpt")
    with pytest.raises(CheckpointError, match="containers in containers"):
        read_checkpoint(tmp_path / "0.ckpt")
    with pytest.raises(CheckpointError, match="wanted a training checkpoint"):
        read_checkpoint(tmp_path / "1.ckpt")


@pytest.mark.parametrize("state", [{}, {"task": 3, "best": None}, {"task": {}, "best": {"weights": 3}}])
def test_a_checkpoint_without_weights(state: dict[str, Any], folder: Path) -> None:
    content = {"format": "var_ext/train/3", "pins": {}, "step": 1, "world": 1, "folder": None, "state": state}
    torch.save(content, folder / "last.ckpt")
    config = json.loads((folder / "config.json").read_text()) | {"training": "last.ckpt"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"last\.ckpt must hold the weights of a training run"):
        var_ext.load(folder)


def test_a_folder_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_: object) -> list[str]:
        raise PermissionError(13, os.strerror(13))

    monkeypatch.setattr("os.listdir", refused)
    monkeypatch.setattr("pathlib.Path.iterdir", refused)
    with pytest.raises(CheckpointError, match=rf"could not read {tmp_path}: Permission denied"):
        find_model(tmp_path)


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "\ud800"])
def test_a_name_that_no_file_can_have(name: str) -> None:
    with pytest.raises((ValueError, CheckpointError), match=r"the model must be|could not read"):
        find_model(name)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ('{"phase": "train", "step": 3, "loss": NaN}', "step 3, loss nan"),
        ('{"phase": "train", "step": 3, "loss": null}', "no step is logged yet"),
        ('{"phase": "train", "step": 3}\n[1]\n3\n' + "[" * 10**5, "no step is logged yet"),
        ('{"phase": [1], "step": 3, "loss": 1}', "no step is logged yet"),
        ('{"phase": "train", "step": 3, "loss": 1}\n{"phase": "val"}', "step 3, loss 1"),
    ],
)
def test_a_log_of_anything(lines: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text(lines)
    assert progress(tmp_path) == said
