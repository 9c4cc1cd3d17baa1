"""What people's files look like: entries under wrappers' names, inside a trainer's checkpoint, as the hub's mixin saves
them; each is taken, or refused with the command that makes it fit."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

import var_ext
from tests.tiny import SCALES, answer, tiny
from var_ext import Sampler, checkpoints
from var_ext.checkpoints import CheckpointError, load_published, load_tensors, load_tokenizer, save_tensors
from var_ext.cli import main
from var_ext.info import describe_model
from var_ext.models import VARHF, VQVAEHF
from var_ext.training.checkpoint import save_checkpoint

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    return answer(Sampler(*tiny()))


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def prefixed(prefix: str) -> Callable[[State], State]:
    return lambda state: {f"{prefix}{name}": tensor for name, tensor in state.items()}


def compiled_parts(state: State) -> State:
    """Parts of the model, not the whole, were given to torch.compile."""
    return {
        re.sub(r"^((?:blocks|encoder)\.)", r"\1_orig_mod.", name): tensor for name, tensor in state.items()
    }


NAMES = {
    "plain": prefixed(""),
    "DataParallel": prefixed("module."),
    "compiled": prefixed("_orig_mod."),
    "compiled, then parallel": prefixed("module._orig_mod."),
    "parallel, then compiled": prefixed("_orig_mod.module."),
    "parts compiled": compiled_parts,
    "averaged": lambda state: {"n_averaged": torch.tensor(7), **prefixed("module.")(state)},
}
WRAPPINGS = {
    "bare": lambda state: state,
    "model": lambda state: {"model": state, "optimizer": {"lr": 1e-4}, "epoch": 3},
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "ema": lambda state: {"ema": state, "args": {"decay": 0.999}},
    "trainer": lambda state: {"trainer": state},
}


@pytest.mark.parametrize(
    ("names", "wrapping"),
    [
        *((names, "bare") for names in NAMES),
        *(("parallel, then compiled", w) for w in WRAPPINGS if w != "bare"),
    ],
)
def test_names_and_wrappings(names: str, wrapping: str, tmp_path: Path, expected: list[list[int]]) -> None:
    files = [
        saved(tmp_path / f"{i}.pth", WRAPPINGS[wrapping](NAMES[names](model.state_dict())))
        for i, model in enumerate(tiny())
    ]
    assert answer(Sampler(*load_published(*files))) == expected


def test_wrappers_name_entries_as_is_supposed_here() -> None:
    var = tiny()[1]
    averaged = torch.optim.swa_utils.AveragedModel(nn.Linear(2, 2))
    assert set(averaged.state_dict()) == {"n_averaged", "module.weight", "module.bias"}
    both = torch.compile(nn.DataParallel(var))
    assert set(both.state_dict()) == {f"_orig_mod.module.{name}" for name in var.state_dict()}


def test_prefixes_in_a_published_trainers_checkpoint(tmp_path: Path, expected: list[list[int]]) -> None:
    states = [prefixed("_orig_mod.")(model.state_dict()) for model in tiny()]
    trainer = dict(zip(("vae_local", "var_wo_ddp"), states, strict=True))
    assert answer(Sampler(*load_published(saved(tmp_path / "a.pth", {"trainer": trainer})))) == expected


def test_prefixes_in_a_model_folder(tmp_path: Path, expected: list[list[int]]) -> None:
    folder = var_ext.save_model(tmp_path, *tiny())
    for file in ("vae.safetensors", "var.safetensors"):
        save_tensors(folder / file, prefixed("module._orig_mod.")(load_tensors(folder / file)))
    assert answer(var_ext.load(folder)) == expected


def test_safetensors_of_any_name(tmp_path: Path, expected: list[list[int]]) -> None:
    for name, model in zip(("a", "b"), tiny(), strict=True):
        save_tensors(tmp_path / f"{name}.safetensors", prefixed("module.")(model.state_dict()))
    files = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    assert answer(var_ext.load(checkpoints.convert(*files, tmp_path / "out"))) == expected


def test_two_entries_of_one_name(tmp_path: Path) -> None:
    state = tiny()[0].state_dict()
    file = saved(tmp_path / "twice.pth", {**state, **prefixed("module.")(state)})
    with pytest.raises(CheckpointError, match=r"have each entry once, got both (\S+) and module\.\1"):
        load_published(file)


def run(command: str) -> None:
    """A `python -c CODE` that a message names, in this process."""
    python, option, code = shlex.split(command)
    assert (python, option) == ("python", "-c")
    exec(code, {"__name__": "__main__"})


def test_two_sets_of_entries_are_a_choice(
    tmp_path: Path, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    vae, var = tiny()
    state = var.state_dict()
    zeros = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    vae_file = saved(tmp_path / "vae.pth", vae.state_dict())
    file = saved(tmp_path / "it's both.pth", {"model": zeros, "ema": state})
    with pytest.raises(CheckpointError, match="must hold one set of entries, got model and ema") as refused:
        load_published(vae_file, file)
    run(str(refused.value).splitlines()[-1])
    assert answer(Sampler(*load_published(vae_file, tmp_path / "ema.pth"))) == expected


FOREIGN = {
    "published trainer": lambda vae, var: {
        "args": argparse.Namespace(depth=2),
        "trainer": {"config": argparse.Namespace(), "vae_local": vae, "var_wo_ddp": var},
    },
    "one model": lambda vae, var: {"args": argparse.Namespace(depth=2), "model": var},
    "bare": lambda vae, var: {**var, "args": argparse.Namespace(depth=2)},
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_objects_are_refused_with_a_command(
    kind: str, tmp_path: Path, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    vae, var = (model.state_dict() for model in tiny())
    vae_file = saved(tmp_path / "vae.pth", vae)
    file = saved(tmp_path / "it's mine.pth", FOREIGN[kind](vae, var))
    with pytest.raises(
        CheckpointError, match=r"asks for the Python object argparse\.Namespace: refused .*"
    ) as refused:
        load_published(vae_file, file)
    assert "nothing in it was run. If you trust its origin" in str(refused.value)
    run(str(refused.value).splitlines()[-1])
    assert answer(Sampler(*load_published(vae_file, tmp_path / "it's mine-entries.pth"))) == expected


def test_the_state_of_a_training_run(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "last.ckpt", {}, 3, {"weights": tiny()[1].state_dict()})
    with pytest.raises(CheckpointError, match=r"the same `var-ext train` command .* its folder, which load"):
        load_published(tmp_path / "last.ckpt")


# ---------------------------------------------------------------------- folders of the hub's mixin

VAE_OPTIONS: dict[str, Any] = {
    "vocab_size": 16, "z_channels": 8, "ch": 32, "ch_mult": (1, 2), "v_patch_nums": SCALES, "quant_resi": 0.25,
}  # fmt: skip
VAR_OPTIONS: dict[str, Any] = {
    "num_classes": 5, "depth": 2, "embed_dim": 64, "num_heads": 4, "attn_l2_norm": False, "norm_eps": 1e-3,
    "patch_nums": SCALES, "flash_if_available": False,
}  # fmt: skip


@pytest.fixture
def mixin(tmp_path: Path) -> tuple[Path, Path, VARHF]:
    """Folders of a VQVAEHF and a VARHF that belong together, with arguments that no entry's shape tells."""
    torch.manual_seed(0)
    var = VARHF(VAE_OPTIONS, **VAR_OPTIONS).eval()
    vae = VQVAEHF(**VAE_OPTIONS)
    vae.load_state_dict(var.vae_proxy[0].state_dict())
    vae.save_pretrained(tmp_path / "vae")
    var.save_pretrained(tmp_path / "var")
    return tmp_path / "vae", tmp_path / "var", var


def test_tokenizer_of_a_mixin_folder(mixin: tuple[Path, Path, VARHF]) -> None:
    folder, _, var = mixin
    image = torch.rand(2, 3, 8, 8) * 2 - 1
    wanted, found = (torch.cat(v.img_to_idxBl(image), 1) for v in (var.vae_proxy[0], load_tokenizer(folder)))
    assert torch.equal(found, wanted)
    assert "16 codes of 8 channels" in describe_model(folder)
    with pytest.raises(CheckpointError, match="tokenizer alone"):
        var_ext.load(folder)


def test_transformer_of_a_mixin_folder_names_the_command_that_takes_it(
    mixin: tuple[Path, Path, VARHF],
) -> None:
    vae_folder, folder, var = mixin
    assert "depth 2, width 64, 5 classes" in describe_model(folder)
    with pytest.raises(
        CheckpointError, match="transformer of a VARHF, which is saved without its tokenizer"
    ) as refused:
        var_ext.load(folder)
    (command,) = re.findall("`var-ext (convert .*) --out FOLDER`", str(refused.value))
    args = command.replace("TOKENIZER", str(vae_folder / "model.safetensors")).split()
    out = folder.parent / "out"
    done = CliRunner().invoke(main, [*args, "--out", str(out)])
    assert done.exit_code == 0, done.output
    again = var_ext.load(out, precision="fp32")
    assert again.var.num_heads == 4 and again.vae.config["quant_resi"] == 0.25  # told by the configs alone
    assert answer(again) == answer(Sampler(var.vae_proxy[0], var, precision="fp32"))


def test_mixin_transformer_tells_of_a_tokenizer_whose_file_does_not(mixin: tuple[Path, Path, VARHF]) -> None:
    folder, var = mixin[1:]
    vae_file = saved(folder.parent / "vae.pth", var.vae_proxy[0].state_dict())
    vae, again = load_published(vae_file, folder / "model.safetensors")
    assert vae.config["quant_resi"] == 0.25
    assert answer(Sampler(vae, again)) == answer(Sampler(var.vae_proxy[0], var))


def test_mixin_transformer_on_the_hub(
    mixin: tuple[Path, Path, VARHF], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repository, file: str(mixin[1] / file))
    with pytest.raises(
        CheckpointError, match=r"DIR/model\.safetensors .*`hf download some/one --local-dir DIR`"
    ):
        var_ext.load("some/one")


def test_mixin_weights_without_their_config_need_what_shapes_do_not_tell(
    mixin: tuple[Path, Path, VARHF],
) -> None:
    vae_folder, folder, _ = mixin
    (folder / "config.json").unlink()
    files = vae_folder / "model.safetensors", folder / "model.safetensors"
    assert load_published(*files)[1].num_heads == 1  # of 64 channels, as published
    assert load_published(*files, num_heads=4)[1].num_heads == 4


def test_an_option_against_the_config_is_not_dropped(mixin: tuple[Path, Path, VARHF]) -> None:
    files = [folder / "model.safetensors" for folder in mixin[:2]]
    assert load_published(*files, num_heads=2)[1].num_heads == 2
    with pytest.raises(CheckpointError, match=r"patch_nums must have 3 sides .* got \(1, 2, 3\)"):
        checkpoints.convert(*files, mixin[0].parent / "out", patch_nums=(1, 2, 3))


def test_mixin_config_that_is_none(mixin: tuple[Path, Path, VARHF]) -> None:
    vae_file = mixin[0] / "model.safetensors"
    for config, message in (
        ('{"vae_kwargs": 3}', r'"vae_kwargs" in .*config\.json must be a dict, got 3'),
        ('{"vae_kwargs": {}, "patch_nums": "abc"}', r'"var" of .*config\.json must be arguments of VAR'),
    ):
        (mixin[1] / "config.json").write_text(config)
        with pytest.raises(CheckpointError, match=message):
            load_published(vae_file, mixin[1] / "model.safetensors")
