"""What a CUDA graph captures, without a GPU: a capture that records and replays, and tensors that only pretend."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.models.conftest import small_pair
from var_ext import Sampler
from var_ext.engine import (
    Call,
    Engine,
    Graphs,
    Options,
    Precision,
    PublishedDraw,
    SeededDraw,
    named_precision,
    options_for,
    published_sample,
)
from var_ext.engine.graph import KEPT, Inputs, capture_cuda_graph
from var_ext.engine.lane import Lane, lane_of

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
    """Runs once to capture; a replay runs again and puts its results where those of the capture lie. As on a GPU a
    capture takes nothing from generators."""

    def __init__(self, slow: float = 0.0) -> None:
        self.captured, self.replayed, self.ops, self.slow = 0, 0, Ops(), slow

    def __call__(self, run, generators):
        states = [generator.get_state() for generator in generators]
        with self.ops, torch.random.fork_rng():
            outputs = run()
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        self.captured += 1

        def replay():
            self.replayed += 1
            time.sleep(self.slow)
            results = run()
            for place, value in zip(outputs, results, strict=True):
                place.copy_(value)

        return replay, outputs


def direct(engine, labels, seeds, options):
    with torch.inference_mode():
        return engine.sample(Call(labels, seeds, options), SeededDraw(seeds, options, engine.codebook))


@pytest.mark.parametrize("mode", ["fp32", "bf16"])
def test_one_graph_serves_all_labels_seeds_and_settings(pair, mode, monkeypatch):
    monkeypatch.setattr(
        "var_ext.engine.engine.on_gpu", lambda tensor: True
    )  # where draws mix, captured or not
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
            images, tokens = graphs.sample(Call(labels, seeds, options))
        expected = direct(engine, labels, seeds, options)
        assert torch.equal(tokens, expected[1])
        assert torch.equal(images, expected[0])
    assert (capture.captured, capture.replayed) == (1, 2)  # the first call ran eagerly


def test_a_capture_has_no_look_at_the_device(pair):
    """No value goes to the host, no shape depends on one."""
    engine, capture = Engine(pair[1].eval(), named_precision("bf16", CPU), pack=True), FakeCapture()
    options, graphs = options_for(engine.schedule, cfg=2.0, top_k=12, top_p=0.9), Graphs(engine, capture)
    for _ in range(2):
        graphs.sample(Call(torch.tensor([0, 1]), torch.tensor([2, 3]), options))
    assert capture.ops.names
    looks = ("_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "is_nonzero")
    assert not [name for name in capture.ops.names if any(look in name for look in looks)]
    assert not [name for name in capture.ops.names if "sort" in name or "multinomial" in name]


@pytest.mark.parametrize("generator", [False, True])
@pytest.mark.parametrize("smooth", [False, True])
def test_the_published_stream_can_be_captured(pair, generator, smooth):
    """Same tokens as eagerly, and the caller's generator, or torch's global one, ends in the same state."""
    engine, capture = Engine(pair[1].eval(), named_precision("fp32", CPU), pack=False), FakeCapture()
    graphs, labels = Graphs(engine, capture), torch.tensor([0, 3])
    for seed in (3, 4, 5):
        options = options_for(engine.schedule, cfg=1.5, top_k=12, top_p=0.9, more_smooth=smooth)
        rng, again = (torch.Generator().manual_seed(seed) if generator else None for _ in range(2))
        torch.manual_seed(seed)
        with torch.inference_mode():
            expected = engine.sample(Call(labels, rng, options), PublishedDraw(rng, options, engine.codebook))
        left = torch.get_rng_state() if rng is None else rng.get_state()
        torch.manual_seed(seed)
        images, tokens = graphs.sample(Call(labels, again, options))
        assert torch.equal(left, torch.get_rng_state() if again is None else again.get_state())
        assert torch.equal(tokens, expected[1])
        torch.testing.assert_close(images, expected[0])
        assert not images.is_inference()
    assert (capture.captured, capture.replayed) == (1, 2)
    looks = ("_local_scalar_dense", "nonzero", "masked_select", "multinomial")
    assert not [name for name in capture.ops.names if any(look in name for look in looks)]


@dataclass(frozen=True)
class Keep:
    """An edit with tensors of its own, as `editing.KeptCodes` has."""

    codes: torch.Tensor  # (B, Cvae)
    factor: float

    def __call__(self, codes, k):
        return codes * self.factor + self.codes[:, None]


def test_an_edit_is_captured_and_its_tensors_change_between_calls(pair):
    engine, capture = Engine(pair[1].eval(), named_precision("fp32", CPU), pack=True), FakeCapture()
    graphs, options = Graphs(engine, capture), options_for(engine.schedule, cfg=1.0)
    labels, seeds = torch.tensor([0, 3]), torch.tensor([5, 6])
    for n in range(4):
        edit = Keep(torch.full((1, 8), float(n)).expand(2, -1), 0.5)
        images, _ = graphs.sample(Call(labels, seeds, options, edit=edit))
        with torch.inference_mode():
            draw = SeededDraw(seeds, options, engine.codebook)
            expected, _ = engine.sample(Call(labels, seeds, options, edit=edit), draw)
        torch.testing.assert_close(images, expected)
    assert (capture.captured, capture.replayed) == (1, 3)
    for _ in range(2):
        graphs.sample(Call(labels, seeds, options, edit=Keep(torch.zeros(2, 8), 0.25)))
    assert capture.captured == 2


def test_what_the_inputs_do_not_hold_makes_a_graph_of_its_own(pair):
    engine, capture = Engine(pair[1].eval(), named_precision("fp32", CPU), pack=True), FakeCapture()
    graphs = Graphs(engine, capture)

    def sample(batch=2, decode=True, **given):
        options = options_for(engine.schedule, **{"cfg": 2.0, **given})
        return graphs.sample(Call(torch.arange(batch), torch.arange(batch), options, decode=decode))

    first = sample()
    sample()
    for given in ({"batch": 3}, {"cfg": 0.0}, {"temperature": 2.0}, {"decode": False}):
        before = capture.captured
        sample(**given)
        images, _ = sample(**given)
        assert capture.captured == before + 1 and len(graphs._cases) <= KEPT
        assert len(images) == (0 if given.get("decode") is False else given.get("batch", 2))
    again = sample()  # the oldest was let go: eager once more
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)) and capture.captured == 5
    with torch.no_grad():
        pair[1].head.weight.neg_()
    assert not torch.equal(sample()[1], first[1]) and not torch.equal(sample()[1], first[1])


@dataclass(frozen=True)
class MoreOptions(Options):
    """A version of the options with a field that nothing here knows."""

    sharpness: float = 1.0


def test_a_field_added_to_the_options_makes_a_graph_of_its_own(pair):
    engine, capture = Engine(pair[1].eval(), named_precision("fp32", CPU), pack=True), FakeCapture()
    graphs, plain = Graphs(engine, capture), options_for(engine.schedule, cfg=1.0)
    values = {field.name: getattr(plain, field.name) for field in fields(plain)}
    labels, seeds = torch.tensor([0, 3]), torch.tensor([5, 6])
    for sharpness in (1.0, 2.0, 1.0, 2.0):
        graphs.sample(Call(labels, seeds, MoreOptions(**values, sharpness=sharpness)))
    assert capture.captured == 2
    # values that lie in device memory make none
    graphs.sample(Call(labels, seeds, MoreOptions(**{**values, "cfg": (1.0, 2.0, 1.0, 2.0)})))
    assert capture.captured == 2


def test_a_first_sampling_that_fails_is_not_what_a_capture_builds_on(pair, monkeypatch):
    """Libraries choose their algorithms in a run that came to its end; a capture without one would fail."""
    engine, capture = Engine(pair[1].eval(), named_precision("fp32", CPU), pack=True), FakeCapture()
    graphs, options = Graphs(engine, capture), options_for(engine.schedule, cfg=1.0)
    call = Call(torch.tensor([0, 3]), torch.tensor([5, 6]), options)
    with monkeypatch.context() as full:
        full.setattr(engine, "decode", Mock(side_effect=torch.OutOfMemoryError))
        with pytest.raises(torch.OutOfMemoryError):
            graphs.sample(call)
    graphs.sample(call)
    assert capture.captured == 0
    graphs.sample(call)
    assert capture.captured == 1


def test_graphs_are_let_go_between_samplings_of_other_threads(pair):
    """Their memory is in use while one of them replays."""
    engine = Engine(pair[1].eval(), named_precision("fp32", CPU), pack=True)
    graphs, options = Graphs(engine, FakeCapture()), options_for(engine.schedule, cfg=1.0)
    graphs.sample(Call(torch.tensor([0]), torch.tensor([5]), options))
    with ThreadPoolExecutor(1) as pool:
        with lane_of(CPU).taken():
            cleared = pool.submit(graphs.clear)
            with pytest.raises(TimeoutError):
                cleared.result(timeout=0.05)
            assert graphs._cases
        cleared.result(timeout=10)
    assert not graphs._cases


def test_threads_take_turns(pair):
    """Without a turn for each, one thread's seeds would be drawn into the other's images."""
    engine = Engine(pair[1].eval(), named_precision("fp32", CPU), pack=True)
    graphs, options = Graphs(engine, FakeCapture(slow=0.02)), options_for(engine.schedule, cfg=1.0)

    def tokens(seed):
        return graphs.sample(Call(torch.tensor([seed % 5]), torch.tensor([seed]), options))[1]

    expected = [tokens(seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        assert all(map(torch.equal, pool.map(tokens, range(8)), expected))


def test_a_graph_that_records_nothing_is_an_error(pair, monkeypatch):
    engine, options = (
        Engine(pair[1].eval(), named_precision("fp32", CPU), pack=True),
        options_for(pair[1].schedule),
    )
    monkeypatch.setattr(Engine, "_captures", lambda *_: True)
    engine.graphs.capture = lambda run, generators: (lambda: None, run())
    call = Call(torch.tensor([0, 3]), torch.tensor([5, 6]), options)
    first = engine.draw(call)
    for _ in range(2):  # it is not kept: eager again, then the error again
        with pytest.raises(RuntimeError, match="captured CUDA graph recorded nothing: draw with graph=False"):
            engine.draw(call)
        assert torch.equal(engine.draw(call)[1], first[1])


def test_every_way_to_draw_is_captured(monkeypatch):
    """A call, an edit and the published method, from the second call of a kind on."""
    vae, var = small_pair()
    monkeypatch.setattr(Engine, "_captures", lambda *_: True)
    sampler, capture = Sampler(vae, var, precision="fp32", graph=False), FakeCapture()
    fast = Sampler(vae, var, precision="fp32")
    fast.engine.graphs.capture = capture
    picture = torch.rand(3, 8, 8)
    for n in (1, 2, 3):
        mask = torch.zeros(8, 8)
        mask[n:] = 1
        assert torch.equal(fast.tokens([n], [n], batch_size=1), sampler.tokens([n], [n], batch_size=1))
        torch.testing.assert_close(
            fast.edit(picture, mask, label=n, seed=n), sampler.edit(picture, mask, label=n, seed=n)
        )
        arguments = dict(label_B=torch.tensor([n, 0]), g_seed=n, cfg=1.5, top_k=12, top_p=0.9)
        images, tokens = published_sample(fast.engine, 2, **arguments, more_smooth=False)
        expected = var.autoregressive_infer_cfg(2, **arguments, return_tokens=True)
        assert torch.equal(tokens, expected[1])
        torch.testing.assert_close(images, expected[0])
    assert (capture.captured, capture.replayed) == (3, 6)


class FakeCuda:
    """Streams, devices and captures of a machine with several GPUs, as far as `Lane` and the capture use them."""

    def __init__(self, monkeypatch) -> None:
        self.current, self.captures, self.order = [SimpleNamespace(device=0, name="caller")], [], []
        self.made = 0
        for name in ("device", "stream", "graph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "Stream", self.new_stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.current[-1])
        self.generators = []
        graph = SimpleNamespace(replay=lambda: None, register_generator_state=self.generators.append)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)

    def new_stream(self):
        self.made += 1
        here = self.current[-1].device
        return SimpleNamespace(
            device=here, name=f"own {here}", wait_stream=lambda other: self.order.append(other.name)
        )

    @contextmanager
    def device(self, device):
        number = torch.device(device).index
        waits = lambda other: self.order.append(other.name)  # noqa: E731
        self.current.append(SimpleNamespace(device=number, name=f"caller {number}", wait_stream=waits))
        yield
        self.current.pop()

    @contextmanager
    def stream(self, stream):
        self.current.append(stream)
        yield
        self.current.pop()

    @contextmanager
    def graph(self, graph, *, stream, capture_error_mode):
        self.captures.append((self.current[-1].device, stream.device, stream.name))
        yield


def test_each_device_captures_on_a_stream_of_its_own(monkeypatch):
    """torch's own default is one stream for the process, on the device that captured first: a sampler on another device
    would record nothing."""
    cuda = FakeCuda(monkeypatch)
    lanes = [Lane(torch.device("cuda", n)) for n in (0, 1)]
    for lane in (*lanes, *lanes):
        with lane.taken():
            capture_cuda_graph(lambda: (torch.zeros(1), torch.zeros(1)), [lane])
    assert cuda.captures == [(n, n, f"own {n}") for n in (0, 1, 0, 1)]
    assert cuda.generators == [*lanes, *lanes]
    assert cuda.made == 2  # a stream more would leave another workspace of cuBLAS behind
    assert cuda.order == [name for n in (0, 1, 0, 1) for name in (f"caller {n}", f"own {n}")]
    assert lane_of(torch.device("cuda", 1)) is lane_of(torch.device("cuda", 1))
    assert lane_of(torch.device("cuda", 1)) is not lane_of(torch.device("cuda", 0))


def test_results_outlive_the_next_replay(pair):
    engine = Engine(pair[1].eval(), named_precision("fp32", CPU), pack=True)
    graphs, options = Graphs(engine, FakeCapture()), options_for(engine.schedule, cfg=1.0)
    graphs.sample(Call(torch.tensor([0]), torch.tensor([1]), options))
    first = graphs.sample(Call(torch.tensor([0]), torch.tensor([1]), options))
    kept = [part.clone() for part in first]
    graphs.sample(Call(torch.tensor([3]), torch.tensor([8]), options))
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
    graphs = Graphs(engine, lambda run, generators: (lambda: None, run()))
    with torch.no_grad():
        zeros = torch.zeros(2, dtype=torch.int64, device="meta")
        for _ in range(2):
            images, tokens = graphs.sample(Call(zeros, zeros, options))
        assert images.is_meta and images.shape == (2, 3, 8, 8)
        assert tokens.is_meta and tokens.shape == (2, 30)
        if not smooth:  # that the test would notice
            monkeypatch.setattr(vae.quantize.embedding, "weight", nn.Parameter(torch.zeros(24, 8)))
            with pytest.raises(ValueError, match="all tensors must be on one device"):
                Graphs(engine, graphs.capture).sample(Call(zeros, zeros, options))
