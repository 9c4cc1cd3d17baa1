"""What `save_model` writes, `load` gives back; what it could not give back is refused before anything is written."""

from __future__ import annotations

import json
import shutil

import pytest
import safetensors.torch
import torch
from torch import nn

import var_ext
from tests.tiny import answer, tiny
from var_ext import Sampler
from var_ext.checkpoints import CheckpointError, find_model, load_tensors, save_model, saving
from var_ext.models import VAR
from var_ext.models.var import FFN


class Relu(FFN):
    def forward(self, x):
        return self.fc2(nn.functional.relu(self.fc1(x)))


class Adapter(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


class Named(VAR):
    """A subclass without parts of its own."""


def test_exchanged_class_embeddings_come_back(tmp_path):
    vae, var = tiny()
    var.class_emb, var.num_classes = nn.Embedding(10, var.C), 9
    save_model(tmp_path, vae, var, class_names=list("abcdefghi"))
    again = var_ext.load(tmp_path, precision="fp32")
    assert again.num_classes == 9
    expected = Sampler(vae, var, precision="fp32")([8, 3], [1, 2])
    assert torch.equal(again([8, 3], [1, 2]), expected)


def test_a_merged_adapter_comes_back(tmp_path):
    vae, var = tiny()
    with torch.no_grad():
        var.blocks[0].attn.proj.weight.add_(torch.randn_like(var.blocks[0].attn.proj.weight))
    var.__class__ = Named
    save_model(tmp_path, vae, var)
    assert answer(var_ext.load(tmp_path, precision="fp32")) == answer(Sampler(vae, var, precision="fp32"))


def test_a_transformer_goes_with_another_decoder_of_its_codes(tmp_path):
    """As after a training of the decoder alone; the tokenizer that the transformer was built with has the old one."""
    vae, var = tiny()
    other, _ = tiny()
    with torch.no_grad():
        other.decoder.conv_out.weight.mul_(1.5)
    save_model(tmp_path, other, var)
    again = var_ext.load(tmp_path, precision="fp32")
    assert torch.equal(again.vae.decoder.conv_out.weight, 1.5 * vae.decoder.conv_out.weight)
    assert answer(again) == answer(Sampler(vae, var, precision="fp32"))


class OwnLogits(VAR):
    def get_logits(self, h, cond):
        return 2 * super().get_logits(h, cond)


FAULTS = {
    r"blocks.0.attn.proj is a Adapter instead of a Linear": lambda vae, var: setattr(
        var.blocks[0].attn, "proj", Adapter(var.blocks[0].attn.proj)
    ),
    r"blocks.1.ffn is a Relu instead of a FFN": lambda vae, var: setattr(var.blocks[1].ffn, "__class__", Relu),
    r"blocks.0.attn.scale is 3.0 instead of 1.0": lambda vae, var: setattr(var.blocks[0].attn, "scale", 3.0),
    r"blocks.0.norm_eps is 0.1": lambda vae, var: setattr(var.blocks[0], "norm_eps", 0.1),
    r"class_emb.num_embeddings is 9 instead of 6": lambda vae, var: setattr(var, "class_emb", nn.Embedding(9, 64)),
    r"blocks.0 has a forward of its own": lambda vae, var: setattr(var.blocks[0], "forward", var.blocks[0].forward),
    r"style is a Linear, which they do not build": lambda vae, var: setattr(var, "style", nn.Linear(2, 64)),
    r"decoder.mid is a Sequential": lambda vae, var: setattr(vae.decoder, "mid", nn.Sequential(vae.decoder.mid)),
    r"gain is no entry of it": lambda vae, var: setattr(var, "gain", nn.Parameter(torch.ones(1))),
    r"blocks.0 has a extra of its own": lambda vae, var: setattr(var.blocks[0], "extra", var.blocks[0].forward),
    r"the model is a OwnLogits instead of a VAR": lambda vae, var: setattr(var, "__class__", OwnLogits),
    r"decoder.norm_out.eps is 0.5 instead of 1e-06": lambda vae, var: setattr(vae.decoder.norm_out, "eps", 0.5),
    r"quantize.beta is 0.5 instead of 0.25": lambda vae, var: setattr(vae.quantize, "beta", 0.5),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_folder_cannot_hold_is_refused(fault, tmp_path):
    vae, var = tiny()
    FAULTS[fault](vae, var)
    with pytest.raises(ValueError, match=f"but {fault}.*: merge adapters first, or keep the state_dict"):
        save_model(tmp_path / "model", vae, var)
    assert not (tmp_path / "model").exists()


def test_a_writer_that_was_stopped_between_files_leaves_no_mixed_model(tmp_path, monkeypatch):
    """Two models of one size: a tokenizer of one beside the transformer of the other would draw wrong pictures."""
    first, second = tmp_path / "first", tmp_path / "second"
    for folder, seed in ((first, 0), (second, 1)):
        save_model(folder, *tiny(seed))
    models = find_model(second).models()
    names = ["vae.safetensors", "var.safetensors", "config.json"]
    for cut in (1, 2):
        mixed = tmp_path / f"cut{cut}"
        shutil.copytree(first, mixed)
        written = []

        def write(path, *arguments, kept=saving.save_tensors, written=written, cut=cut):
            if len(written) == cut:
                raise KeyboardInterrupt
            written.append(path)
            kept(path, *arguments)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(saving, "save_tensors", write)
            patch.setattr(saving, "write_json", write)
            save_model(mixed, *models)
        assert [path.name for path in written] == names[:cut]
        with pytest.raises(CheckpointError, match="is of another model than config"):
            find_model(mixed).models()
        save_model(mixed, *models)  # the same again goes on
        assert {name: (mixed / name).read_bytes() for name in names} == {
            name: (second / name).read_bytes() for name in names
        }


def test_older_folders_and_files_of_others(tmp_path):
    save_model(tmp_path, *tiny())
    config = json.loads((tmp_path / "config.json").read_text())
    del config["digests"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match=r"vae.safetensors is of another model"
    ):  # written over an older folder
        find_model(tmp_path).models()
    for name in ("vae.safetensors", "var.safetensors"):
        safetensors.torch.save_file(load_tensors(tmp_path / name), tmp_path / name)
    find_model(tmp_path).models()  # as folders were before there were digests
    save_model(tmp_path, *tiny())
    safetensors.torch.save_file(load_tensors(tmp_path / "var.safetensors"), tmp_path / "var.safetensors")
    find_model(tmp_path).models()
