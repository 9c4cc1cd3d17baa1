"""What happens where torch no longer has a private name of those behind `var_ext._torch`."""

from __future__ import annotations

import runpy
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import var_ext
from var_ext import _torch, ops
from var_ext.engine import layers, precision
from var_ext.models.modules import Dropout

PACKING = [
    "reorder_linear_weight",
    "linear_pointwise",
    "reorder_convolution_weight",
    "convolution_pointwise",
    "reorder_transposed_weight",
    "transposed_pointwise",
]


def door() -> dict[str, Any]:
    """The names of the door, looked up anew."""
    return runpy.run_path(str(_torch.__file__))


@pytest.mark.parametrize(
    "name",
    [
        "_parameters",
        "_buffers",
        "_modules",
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_backward_pre_hooks",
        "_compiled_call_impl",
    ],
)
def test_without_a_needed_name_of_modules_the_import_names_it_and_the_version(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [n for n in dir(nn.Module()) if n != name and not n.startswith("__")]
    monkeypatch.setattr(nn, "Module", type("Module", (), dict.fromkeys(names)))
    with pytest.raises(
        ImportError, match=rf"needs Module\.{name} of torch, which torch {torch.__version__[:4]}"
    ):
        door()


def test_without_versions_of_tensors_the_import_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "Tensor", type("Tensor", (), {}))
    with pytest.raises(ImportError, match=r"Tensor\._version"):
        door()


def test_names_that_may_go_are_none_then(monkeypatch: pytest.MonkeyPatch) -> None:
    known = [*PACKING, "qlinear_prepack", "qlinear_pointwise", "addmm_gelu", "below_autograd"]
    there = door()
    assert None not in [there[name] for name in known]
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())
    monkeypatch.setattr(torch.ops, "onednn", SimpleNamespace())
    monkeypatch.delattr(torch, "_addmm_activation")
    monkeypatch.delattr(torch._C, "_AutoDispatchBelowAutograd")
    gone = door()
    assert [gone[name] for name in known] == [None] * len(known)
    assert not gone["packs_layers"]() and not gone["multiplies_int8"]() and not gone["multiplies_fp16"]()


def test_whether_an_input_requires_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = _torch.any_requires_grad
    monkeypatch.delattr(torch._C, "_any_requires_grad")
    slow = door()["any_requires_grad"]
    assert slow is not fast
    plain, leaf = torch.zeros(2), torch.zeros(2, requires_grad=True)
    for given in ((plain, 3, None), (plain, leaf, 0.5), (leaf,), (leaf.detach(), None)):
        assert slow(*given) == fast(*given) == any(value is leaf for value in given)


def test_calls_make_a_node_where_forward_mode_cannot_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    x, scale = torch.randn(2, 3, 8), torch.randn(2, 8)
    wanted = ops.adaln(x, scale, scale)
    assert not _torch.forward_mode()
    monkeypatch.delattr(forward_ad, "_current_level")
    assert _torch.forward_mode()
    assert torch.equal(ops.adaln(x, scale, scale), wanted)


def test_dropout_is_torchs_where_transforms_cannot_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    x, mine, theirs = torch.ones(1000), Dropout(0.3), nn.Dropout(0.3)

    def drop(layer: nn.Module) -> Tensor:
        torch.manual_seed(0)
        return layer(x)

    assert not torch.equal(drop(mine), drop(theirs))
    monkeypatch.delattr(torch._C, "_are_functorch_transforms_active")
    assert torch.equal(drop(mine), drop(theirs))


def test_the_stream_comes_from_torchs_object_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 10 + device, raising=False)
    assert _torch.raw_stream(3) == 13
    monkeypatch.delattr(torch._C, "_cuda_getCurrentRawStream")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=20 + device))
    assert _torch.raw_stream(3) == 23


@pytest.mark.parametrize("name", PACKING)
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda **how: layers.linear(nn.Linear(24, 40), **how), (3, 24)),
        (lambda **how: layers.convolution(nn.Conv2d(8, 16, 3, padding=1), free=False, **how), (2, 8, 5, 5)),
        (lambda **how: layers.upsampling(nn.Conv2d(8, 16, 3, padding=1), free=False, **how), (2, 8, 5, 5)),
    ],
    ids=["linear", "convolution", "upsampling"],
)
def test_layers_are_not_packed_without_one_of_the_names(
    make: Callable[..., layers.Layer], shape: tuple[int, ...], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> Tensor:
        torch.manual_seed(0)
        layer = make(precision=precision.Precision("fp32", torch.float32), pack=True)
        return layer(torch.randn(shape))

    packed = run()
    for other in PACKING:  # none may be called
        monkeypatch.setattr(_torch, other, lambda *_: pytest.fail("a packed layer"))
    monkeypatch.setattr(_torch, name, None)
    torch.testing.assert_close(run(), packed)  # other sums


@pytest.mark.parametrize("name", ["qlinear_prepack", "qlinear_pointwise"])
def test_int8_is_refused_with_the_version_then(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert precision.named_precision("int8", cpu).int8
    monkeypatch.setattr(_torch, name, None)
    with pytest.raises(ValueError, match=rf"int8 needs .*torch {torch.__version__[:4]}.*take bf16 or fp32"):
        precision.named_precision("int8", cpu)


def test_fp16_on_the_cpu_is_refused_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_torch, "_fp16_on_cpu", lambda: True)
    assert precision.named_precision("fp16", torch.device("cpu")).dtype == torch.float16
    monkeypatch.setattr(_torch, "_fp16_on_cpu", None)
    with pytest.raises(ValueError, match="fp16 needs"):
        precision.named_precision("fp16", torch.device("cpu"))


def test_a_wrapper_of_compile_is_refused_where_what_it_holds_is_not_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = var_ext.load("digits").var
    wrapper = torch.compile(model)
    assert _torch.uncompiled(wrapper) is model
    assert _torch.uncompiled(model) is model
    monkeypatch.setattr(_torch, "uncompiled", lambda given: given)
    with pytest.raises(TypeError):
        var_ext.accelerate(wrapper)


# Names of torch itself are back before torch uses them: torch without them would have another way of its own.
WITHOUT = """
import importlib.util, sys, torch
from pathlib import Path
path = Path(sys.argv[1])
spec = importlib.util.spec_from_file_location("var_ext._torch", path)
door = importlib.util.module_from_spec(spec)
context = torch._C._AutoDispatchBelowAutograd
del torch._C._AutoDispatchBelowAutograd
spec.loader.exec_module(door)
torch._C._AutoDispatchBelowAutograd = context
sys.modules["var_ext._torch"] = door
from var_ext.ops import _registry
assert _registry._torch is door and door.below_autograd is None
"""
GRADIENTS = """
from var_ext import ops
torch.manual_seed(0)
x, scale, bias = (torch.randn(shape, requires_grad=True) for shape in ((2, 3, 8), (2, 8), (8,)))
y = ops.bias_gelu(ops.adaln(x, scale, scale), bias)
y.square().sum().backward()
small = torch.randn(1, 2, 3, 3, requires_grad=True)
(grad,) = torch.autograd.grad(ops.bicubic_upsample(small, 5).square().sum(), small, create_graph=True)
grad.square().sum().backward()
given = [y, x.grad, scale.grad, bias.grad, small.grad]
print([t.detach().double().flatten().tolist() for t in given])
"""


def test_gradients_are_registered_by_torchs_public_function_then() -> None:
    def printed(code: str) -> str:
        run = [sys.executable, "-c", code, str(_torch.__file__)]
        return subprocess.run(run, check=True, capture_output=True, text=True).stdout

    assert printed(WITHOUT + GRADIENTS) == printed("import torch" + GRADIENTS)
