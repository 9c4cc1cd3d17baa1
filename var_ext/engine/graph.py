"""A whole sampling run, decoder included, as one CUDA graph: at small batches launches take longer than kernels.

What changes between calls is in device memory: labels, seeds or the state of a generator, what an edit keeps, and
cfg, top_k and top_p of every scale. Any other difference needs its own graph; see `Graphs._kind`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from var_ext.engine.call import Call
from var_ext.engine.draw import Edit, Randomness, draw_from, reads_table
from var_ext.engine.lane import lane_of
from var_ext.engine.options import Options

if TYPE_CHECKING:
    from var_ext.engine.engine import Engine

Outputs = tuple[Tensor, Tensor]  # images, tokens
Run = Callable[[], Outputs]
Capture = Callable[[Run, Sequence[torch.Generator]], tuple[Callable[[], None], Outputs]]

KEPT = 4  # graphs kept at a time: each holds its own memory
UNDRAWN = -2  # fills tokens before a replay: any left over were not drawn


def capture_cuda_graph(run: Run, generators: Sequence[torch.Generator]) -> tuple[Callable[[], None], Outputs]:
    """Captures `run` on the current stream; returns the replay function and the memory of its results.

    Args:
        run: has already run on this stream, since libraries choose algorithms outside a capture.
        generators: those it uses besides torch's global one.
    """
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    # Without `stream` torch takes one for the whole process, on the device that captured first: on another device the
    # graph would record nothing. Other threads may allocate during a capture.
    here = torch.cuda.current_stream()
    with torch.cuda.graph(graph, stream=here, capture_error_mode="thread_local"):
        outputs = run()
    return graph.replay, outputs


@dataclass
class Inputs:
    """The inputs of a captured run: labels (B,), seeds (B,) or a generator, values by scale and image (K, B)."""

    labels: Tensor
    randomness: Randomness
    edit: Edit | None
    conditions: dict[str, Tensor]
    cfg: Tensor
    top_k: Tensor
    top_p: Tensor
    filled: Options | None = None  # its values are in the tables

    @classmethod
    def like(cls, call: Call) -> Inputs:
        """Uninitialised inputs for calls like this one."""
        labels, randomness, options, edit = call.labels, call.randomness, call.options, call.edit
        with torch.inference_mode(False):  # writable inside and outside inference mode
            each = torch.zeros(len(labels), dtype=torch.int64, device=labels.device)
            table = torch.zeros(len(options.schedule), len(labels), dtype=torch.float64, device=labels.device)
            own = randomness
            if isinstance(randomness, Tensor):
                own = each.clone()
            elif randomness is not None:
                own = torch.Generator(randomness.device)
            if edit is not None:
                kept = {name: torch.zeros_like(t.contiguous()) for name, t in _tensors_of(edit).items()}
                edit = replace(edit, **kept)  # type: ignore[type-var]
            conditions = {name: torch.zeros_like(t.contiguous()) for name, t in call.conditions.items()}
            return cls(each, own, edit, conditions, table, table.to(torch.int64), table.clone())

    def fill(self, call: Call) -> None:
        """Writes the values of a call."""
        labels, randomness, options, edit = call.labels, call.randomness, call.options, call.edit
        self.labels.copy_(labels)
        if isinstance(self.randomness, Tensor) and isinstance(randomness, Tensor):
            self.randomness.copy_(randomness)
        else:
            _pass_state(randomness, self.randomness)
        for own, given in zip(_tensors_of(self.edit).values(), _tensors_of(edit).values(), strict=True):
            own.copy_(given)
        for name, condition in self.conditions.items():
            condition.copy_(call.conditions[name])
        if self.filled != options:
            for target, values in (
                (self.cfg, options.cfg),
                (self.top_k, options.top_k),
                (self.top_p, options.top_p),
            ):
                target.copy_(torch.tensor(values, dtype=target.dtype)[:, None].expand_as(target))
            self.filled = options

    def give_back(self, randomness: Randomness) -> None:
        """Advances the caller's generator as if it had been used."""
        _pass_state(self.randomness, randomness)


def _pass_state(source: Randomness, target: Randomness) -> None:
    if isinstance(source, torch.Generator) and isinstance(target, torch.Generator):
        target.set_state(source.get_state())


def _fields_of(edit: Edit | None) -> dict[str, Any]:
    return {f.name: getattr(edit, f.name) for f in fields(edit)} if is_dataclass(edit) else {}


def _tensors_of(edit: Edit | None) -> dict[str, Tensor]:
    return {name: value for name, value in _fields_of(edit).items() if isinstance(value, Tensor)}


@dataclass
class Case:
    """Calls of one kind: the first runs eagerly (warm-up), the second is captured, later ones are replayed."""

    inputs: Inputs
    run: Run
    seen: bool = False
    replay: Callable[[], None] | None = None
    outputs: Outputs | None = None

    def drawn(self, capture: Capture) -> Outputs:
        """Samples with the current values of the inputs."""
        if not self.seen:
            outputs = self.run()
            self.seen = True  # only now: a capture needs a completed run
            return outputs
        if self.replay is None or self.outputs is None:
            own = self.inputs.randomness
            self.replay, self.outputs = capture(self.run, [own] if isinstance(own, torch.Generator) else [])
            self.outputs[1].fill_(UNDRAWN)
        self.replay()
        return self.outputs


class Graphs:
    """Runs an engine's calls, as graphs from the second of each kind on.

    Threads may share it: they take turns on a device.

    Args:
        engine: on a GPU.
        capture: captures a function without arguments; tests pass a stand-in.
    """

    def __init__(self, engine: Engine, capture: Capture = capture_cuda_graph) -> None:
        self.engine, self.capture = engine, capture
        self._cases: OrderedDict[tuple[Any, ...], Case] = OrderedDict()
        self._weights = 0  # the engine's build that the graphs belong to

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: graphs are left out."""
        return {**self.__dict__, "_cases": OrderedDict()}

    def clear(self) -> None:
        """Frees all graphs and their memory."""
        with lane_of(self.engine.device).taken():
            self._cases.clear()

    def sample(self, call: Call) -> Outputs:
        """As `Engine.sample`: images (B, 3, S, S), tokens (B, L); copies owned by the caller.

        An edit must be a dataclass: its tensors, and conditions, may change from call to call.
        """
        with lane_of(call.labels.device).taken() as copied, torch.inference_mode():
            case = self._case(call)
            case.inputs.fill(call)
            images, tokens = case.drawn(self.capture)
            case.inputs.give_back(call.randomness)
            return copied(images), copied(tokens)

    def _case(self, call: Call) -> Case:
        self.engine.parts()
        if self._weights != self.engine.builds:  # the graphs read freed memory
            self._cases.clear()
            self._weights = self.engine.builds
        kind = self._kind(call)
        if kind not in self._cases:
            while len(self._cases) >= KEPT:
                self._cases.popitem(last=False)
            inputs = Inputs.like(call)
            self._cases[kind] = Case(inputs, self._run(inputs, call))
        self._cases.move_to_end(kind)
        return self._cases[kind]

    def _kind(self, call: Call) -> tuple[Any, ...]:
        """All that a captured graph depends on besides its inputs."""
        options, tables = call.options, reads_table(call.randomness, call.options)
        fixed = [(f.name, getattr(options, f.name)) for f in fields(options) if f.name not in tables]
        of_edit, of_model = _fields_of(call.edit).items(), call.conditions.items()
        return (
            len(call.labels),
            call.decode,
            type(call.randomness),
            options.guided_scales,
            *fixed,
            type(call.edit),
            *((name, tuple(v.shape) if isinstance(v, Tensor) else v) for name, v in of_edit),
            *((name, tuple(value.shape), value.dtype) for name, value in of_model),
        )

    def _run(self, inputs: Inputs, call: Call) -> Run:
        engine, options = self.engine, call.options
        own = replace(
            call,
            labels=inputs.labels,
            randomness=inputs.randomness,
            edit=inputs.edit,
            conditions=inputs.conditions,
        )

        def run() -> Outputs:
            draw = draw_from(inputs.randomness, options, engine.codebook, inputs)
            return engine.sample(own, draw, cfg=inputs.cfg)

        return run
