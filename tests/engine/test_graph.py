"""What a CUDA graph captures, without a GPU: a capture that records and replays, and tensors that only pretend."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.models.conftest import small_pair
from var_ext.engine import Engine, Graphs, Precision, SeededDraw, named_precision, options_for
from var_ext.engine.graph import KEPT, Inputs

CPU = torch.device("cpu")


class Ops(TorchDispatchMode):
    """Names of the ops that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class FakeCapture:
    """Runs once to capture; a replay runs again and puts its results where those of the capture lie."""

    def __init__(self) -> None:
        self.captured, self.replayed, self.ops = 0, 0, Ops()

    def __call__(self, run):
        with self.ops:
            outputs = run()
        self.captured += 1

        def replay():
            self.replayed += 1
            for place, value in zip(outputs, run(), strict=True):
                place.copy_(value)

        return replay, outputs


def direct(engine, labels, seeds, options):
    with torch.inference_mode():
        return engine.sample(
            labels, options, SeededDraw(seeds, options, engine.vae.quantize.embedding.weight)
        )


@pytest.mark.parametrize("mode", ["fp32", "bf16"])
def test_one_graph_serves_all_labels_seeds_and_settings(pair, mode):
    engine, capture = Engine(pair[1].eval(), named_precision(mode, CPU), pack=True), FakeCapture()
    graphs = Graphs(engine, capture)
    calls = [
        ([0, 1], [5, 6], {"cfg": 2.0, "top_k": 12, "top_p": 0.9}),
        ([4, 2], [7, -8], {"cfg": 1.0, "top_k": 0, "top_p": 0.0}),
        ([3, 3], [9, 2**62], {"cfg": [0.5, 1, 2, 3], "top_k": [1, 5, 9, 24], "top_p": [0, 0.3, 0.6, 0.9]}),
    ]
    for labels, seeds, given in calls:
        labels, seeds = torch.tensor(labels), torch.tensor(seeds)
        options = options_for(engine.schedule, **given)
        with torch.inference_mode():
            images, tokens = graphs.sample(labels, seeds, options)
        expected = direct(engine, labels, seeds, options)
        assert torch.equal(tokens, expected[1])
        torch.testing.assert_close(
            images, expected[0]
        )  # the mixture before the head is computed in another order
    assert (capture.captured, capture.replayed) == (1, 3)


def test_a_capture_has_no_look_at_the_device(pair):
    """No value goes to the host, no shape depends on one."""
    engine, capture = Engine(pair[1].eval(), named_precision("bf16", CPU), pack=True), FakeCapture()
    options = options_for(engine.schedule, cfg=2.0, top_k=12, top_p=0.9)
    Graphs(engine, capture).sample(torch.tensor([0, 1]), torch.tensor([2, 3]), options)
    looks = ("_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "is_nonzero")
    assert not [name for name in capture.ops.names if any(look in name for look in looks)]
    assert not [name for name in capture.ops.names if "sort" in name or "multinomial" in name]


def test_what_shapes_the_work_makes_a_graph_of_its_own(pair):
    engine, capture = Engine(pair[1].eval(), named_precision("fp32", CPU), pack=True), FakeCapture()
    graphs = Graphs(engine, capture)

    def sample(batch=2, decode=True, **given):
        options = options_for(engine.schedule, **{"cfg": 2.0, **given})
        return graphs.sample(torch.arange(batch), torch.arange(batch), options, decode=decode)

    first = sample()
    for given in ({"batch": 3}, {"cfg": 0.0}, {"temperature": 2.0}, {"decode": False}):
        before = capture.captured
        images, _ = sample(**given)
        sample(**given)
        assert capture.captured == before + 1 and len(graphs._kept) <= KEPT
        assert len(images) == (0 if given.get("decode") is False else given.get("batch", 2))
    again = sample()  # the oldest was let go
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)) and capture.captured == 6
    with torch.no_grad():
        pair[1].head.weight.neg_()
    assert not torch.equal(sample()[1], first[1]) and capture.captured == 7


def test_results_outlive_the_next_replay(pair):
    engine = Engine(pair[1].eval(), named_precision("fp32", CPU), pack=True)
    graphs, options = Graphs(engine, FakeCapture()), options_for(engine.schedule, cfg=1.0)
    first = graphs.sample(torch.tensor([0]), torch.tensor([1]), options)
    kept = [part.clone() for part in first]
    graphs.sample(torch.tensor([3]), torch.tensor([8]), options)
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_tensor_of_a_capture_lies_on_one_device(dtype, smooth, monkeypatch):
    """With tensors without memory in the place of a GPU's: one of the host among them, or a value that is looked at, is
    an error."""
    vae, var = small_pair()
    monkeypatch.setattr(Inputs, "fill", lambda *_: None)  # it comes before the capture
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # knows no tensors without memory
    engine = Engine(var.eval().to("meta"), Precision("", dtype), pack=True)
    vae.to("meta")
    options = options_for(var.schedule, cfg=3, top_k=5, top_p=0.9, temperature=1.5, more_smooth=smooth)
    graphs = Graphs(engine, lambda run: (lambda: None, run()))
    with torch.no_grad():
        images, tokens = graphs.sample(torch.zeros(2), torch.zeros(2), options)
        assert images.is_meta and images.shape == (2, 3, 8, 8)
        assert tokens.is_meta and tokens.shape == (2, 30)
        if not smooth:  # that the test would notice
            monkeypatch.setattr(vae.quantize.embedding, "weight", nn.Parameter(torch.zeros(24, 8)))
            with pytest.raises(ValueError, match="all tensors must be on one device"):
                Graphs(engine, graphs.capture).sample(torch.zeros(2), torch.zeros(2), options)
