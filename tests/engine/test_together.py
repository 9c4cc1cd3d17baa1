"""Layers that read the same condition are one product where a launch has its price, whatever a user changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.engine.test_changes import Doubled, patched
from tests.models.conftest import small_pair
from var_ext.engine import Engine, Precision, layers
from var_ext.engine.layers import Dense
from var_ext.models import VAR

BF16 = Precision("bf16", torch.bfloat16)
LABELS = torch.tensor([0, 4, 2])


@pytest.fixture
def _launches_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "on_gpu", lambda weight: True)


def modulations(engine: Engine, labels: torch.Tensor = LABELS) -> torch.Tensor:
    """All vectors of a sampling, one after the other."""
    parts = engine.parts()
    with torch.no_grad():
        blocks, head = parts.modulations(parts.var.condition(labels))
    return torch.cat([vector for vectors in (*blocks, head) for vector in vectors], dim=-1).float()


def exact(var: VAR, labels: torch.Tensor = LABELS) -> torch.Tensor:
    with torch.no_grad():
        blocks, head = var.modulations(var.condition(labels), torch.float32)
    return torch.cat([vector for vectors in (*blocks, head) for vector in vectors], dim=-1)


CHANGES = {
    "nothing": lambda var: None,
    "a hook on a layer": lambda var: (
        var.blocks[1].ada_lin[1].register_forward_hook(lambda m, x, out: -3 * out)
    ),
    "a hook on both": lambda var: var.blocks[0].ada_lin.register_forward_hook(lambda m, x, out: -3 * out),
    "a hook before the head's": lambda var: var.head_nm.ada_lin[0].register_forward_pre_hook(
        lambda m, x: (-3 * x[0],)
    ),
    "a forward patched": lambda var: patched(var.blocks[0].ada_lin),
    "another activation": lambda var: var.blocks[0].ada_lin.__setitem__(0, nn.Tanh()),
    "an adapter": lambda var: var.head_nm.ada_lin.__setitem__(1, Doubled(var.head_nm.ada_lin[1])),
    "a layer more": lambda var: var.blocks[1].ada_lin.append(Doubled(nn.Identity())),
    "no bias": lambda var: var.blocks[1].ada_lin.__setitem__(1, nn.Linear(64, 384, bias=False)),
    "one for two": lambda var: setattr(var.blocks[1], "ada_lin", var.blocks[0].ada_lin),
}


@pytest.mark.usefixtures("_launches_cost")
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_takes_effect(change, shared, monkeypatch):
    """After the first sampling, and before it."""
    var = small_pair(shared_aln=shared)[1].eval()
    if shared and "blocks" in CHANGES[change].__code__.co_names:
        pytest.skip("blocks have no layer of their own")
    engine, before = Engine(var, BF16, pack=False), exact(var)
    assert engine.parts().together
    CHANGES[change](var)
    wanted = exact(var)
    assert change == "nothing" or (wanted - before).abs().max() > 0.1 * wanted.abs().max()
    products = []
    of_dense = Dense.product
    monkeypatch.setattr(Dense, "product", lambda self, *given: products.append(1) or of_dense(self, *given))
    for used in (engine, Engine(var, BF16, pack=False)):
        # input, weight and sum are rounded to 8 bits
        assert (modulations(used) - wanted).abs().max() < 2**-6 * wanted.abs().max()
    assert change not in ("nothing", "one for two") or len(products) == 2


@pytest.mark.usefixtures("_launches_cost")
def test_a_condition_that_changes_in_place_is_read_anew():
    var = small_pair()[1].eval()
    memory = torch.zeros(3, var.C)
    var.condition = lambda labels: memory.copy_(var.class_emb(labels))
    engine = Engine(var, BF16, pack=False)
    first, other = modulations(engine), modulations(engine, LABELS.flip(0))
    assert torch.equal(first, other.flip(0)) and not torch.equal(first, other)


@pytest.mark.usefixtures("_launches_cost")
def test_each_layer_still_serves_alone():
    """As `get_logits` of a user calls that of the head."""
    var = small_pair()[1].eval()
    parts = Engine(var, BF16, pack=False).parts()
    cond = parts.var.condition(LABELS)
    with torch.no_grad():
        alone = torch.cat(parts.var.head_nm.modulation(cond, torch.bfloat16), dim=-1)
        among = torch.cat(parts.modulations(cond)[1], dim=-1)
    torch.testing.assert_close(
        alone, among, rtol=2**-7, atol=2**-7
    )  # sums of another order, rounded to 8 bits


@pytest.mark.usefixtures("_launches_cost")
def test_no_weight_lies_in_memory_twice(monkeypatch):
    monkeypatch.setattr(layers, "_has_packed_layers", lambda dtype: False)  # a CPU's
    var = small_pair()[1].eval()
    parts = Engine(var, BF16, pack=True, release=True).parts()
    assert parts.together and not var.blocks[0].ada_lin[1].weight.numel()
    whole = parts.together._layer.weight
    for block in parts.var.blocks:
        (member,) = block.ada_lin
        assert member._layer.weight.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


def test_shared_weights_and_those_of_a_cpu_stay_apart(monkeypatch):
    var = small_pair()[1].eval()
    assert Engine(var, BF16, pack=False).parts().together is None
    assert Engine(var, BF16, pack=True).parts().together is None
    monkeypatch.setattr(layers, "on_gpu", lambda weight: True)
    assert Engine(var, Precision("fp32", torch.float32), pack=False).parts().together is None
