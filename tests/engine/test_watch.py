"""Which changes of a model are noticed before a sampling."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.models.conftest import small_pair
from var_ext.engine import Engine, named_precision
from var_ext.engine.watch import Watch

CPU = torch.device("cpu")


def add_(module: nn.Module) -> None:
    with torch.no_grad():
        next(module.parameters()).add_(0)


def step(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    torch.optim.AdamW(module.parameters()).step()


def replace(module: nn.Module) -> None:
    """A parameter of the same values."""
    name, old = next(iter(module.named_parameters(recurse=False)))
    setattr(module, name, nn.Parameter(old.detach().clone()))


CHANGES = {
    "written in place": lambda var, vae: add_(var.blocks[1].ffn.fc2),
    "an optimizer's step": lambda var, vae: step(var),
    "written in the codebook": lambda var, vae: add_(vae.quantize.embedding),
    "written in the decoder": lambda var, vae: add_(vae.decoder.conv_out),
    "a parameter replaced": lambda var, vae: replace(var.head),
    "one of a single element replaced": lambda var, vae: setattr(
        var, "single", nn.Parameter(var.single.detach().clone())
    ),
    "a bias taken away": lambda var, vae: setattr(var.blocks[0].attn.proj, "bias", None),
    "a parameter added": lambda var, vae: var.register_parameter("more", nn.Parameter(torch.zeros(1))),
    "one added where there was none": lambda var, vae: setattr(
        var.blocks[0].drop_path, "more", nn.Parameter(torch.zeros(1))
    ),
    "cast": lambda var, vae: var.to(torch.bfloat16),
    "moved": lambda var, vae: vae.decoder.to("meta"),
    "memory exchanged": lambda var, vae: setattr(var.head.weight, "data", var.head.weight.data.clone()),
    "a layer wrapped": lambda var, vae: setattr(
        var.blocks[0].attn, "proj", nn.Sequential(var.blocks[0].attn.proj)
    ),
    "the decoder exchanged": lambda var, vae: setattr(vae, "decoder", small_pair()[0].decoder),
    "another class": lambda var, vae: setattr(
        var.head, "__class__", type("Other", (nn.Linear,), {})
    ),
    "a hook": lambda var, vae: var.blocks[0].ffn.fc1.register_forward_hook(lambda *_: None),
    "a hook of the decoder": lambda var, vae: vae.decoder.conv_in.register_forward_pre_hook(lambda *_: None),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed(change):
    vae, var = small_pair()
    var.single = nn.Parameter(torch.ones(1))
    engine = Engine(var.eval(), named_precision("fp32", CPU), pack=False)
    parts = engine.parts()
    assert engine.parts() == parts and engine.builds == 1
    watch = engine._watch
    assert watch is not None and watch.unchanged()
    CHANGES[change](var, vae)
    assert not watch.unchanged()


def test_a_hook_taken_away_is_noticed():
    layer = nn.Linear(3, 3)
    hook = layer.register_forward_hook(lambda *_: None)
    watch = Watch([layer])
    assert watch.unchanged()
    hook.remove()
    assert not watch.unchanged()


def test_what_is_not_used_may_change():
    vae, var = small_pair()
    engine = Engine(var.eval(), named_precision("fp32", CPU), pack=False)
    parts = engine.parts()
    add_(vae.encoder)
    assert engine.parts() == parts and engine.builds == 1


def test_no_other_tensor_takes_the_place_of_a_former_one():
    """The address of freed memory may come again: what was there is kept alive, so that a change has another."""
    layer = nn.Linear(512, 512)
    watch = Watch([layer])
    for _ in range(20):
        layer.weight.data = layer.weight.data.clone()
        assert not watch.unchanged()


def test_parameters_of_inference_mode_have_no_version():
    with torch.inference_mode():
        layer = nn.Linear(3, 3)
    watch = Watch([layer])
    assert watch.unchanged()
    layer.weight = nn.Parameter(torch.zeros(3, 3))
    assert not watch.unchanged()
