"""A whole sampling, decoder included, as one CUDA graph: at small batches launches would take longer than kernels.

What changes between calls lies in device memory: labels, seeds, and cfg, top_k and top_p of every scale. What shapes
the work makes a graph of its own: the batch, how many scales are guided, temperatures, `more_smooth`, and whether
images are decoded.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from var_ext.engine.draw import SeededDraw
from var_ext.engine.engine import Engine
from var_ext.engine.options import Options

Outputs = tuple[Tensor, Tensor]  # images, tokens
Capture = Callable[[Callable[[], Outputs]], tuple[Callable[[], None], Outputs]]

KEPT = 4  # graphs at a time: each holds the memory of its sampling


def capture_cuda_graph(run: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
    """Captures `run` and returns what replays it, and the memory its results come to lie in."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        run()  # libraries choose their algorithms and allocate outside the capture
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may allocate
        outputs = run()
    return graph.replay, outputs


@dataclass
class Inputs:
    """The memory that a graph reads: labels and seeds (B,), and a value a scale and image, (K, B)."""

    labels: Tensor
    seeds: Tensor
    cfg: Tensor
    top_k: Tensor
    top_p: Tensor

    @classmethod
    def empty(cls, batch: int, scales: int, device: torch.device) -> Inputs:
        """Memory not yet filled."""
        each = torch.zeros(batch, dtype=torch.int64, device=device)
        table = torch.zeros(scales, batch, dtype=torch.float64, device=device)
        return cls(each, each.clone(), table, table.to(torch.int64), table.clone())

    def fill(self, labels: Tensor, seeds: Tensor, options: Options) -> None:
        """Writes the values of a call."""
        self.labels.copy_(labels)
        self.seeds.copy_(seeds)
        for target, values in (
            (self.cfg, options.cfg),
            (self.top_k, options.top_k),
            (self.top_p, options.top_p),
        ):
            target.copy_(torch.tensor(values, dtype=target.dtype)[:, None].expand_as(target))


@dataclass
class Captured:
    """A graph and the memory that it reads and writes."""

    inputs: Inputs
    replay: Callable[[], None]
    outputs: Outputs
    codebook: Tensor


class Graphs:
    """The captured samplings of an engine.

    Args:
        engine: on a GPU.
        capture: makes a graph of a function without arguments; another one for tests.
    """

    def __init__(self, engine: Engine, capture: Capture = capture_cuda_graph) -> None:
        self.engine, self.capture = engine, capture
        self._kept: OrderedDict[tuple[Any, ...], Captured] = OrderedDict()
        self._weights = 0  # the engine's build that they belong to

    def sample(self, labels: Tensor, seeds: Tensor, options: Options, *, decode: bool = True) -> Outputs:
        """As `Engine.sample` with a `SeededDraw`: images (B, 3, S, S), tokens (B, L); copies, so that they last."""
        with torch.cuda.device(labels.device) if labels.is_cuda else nullcontext():
            return self._sampled(labels, seeds, options, decode)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: graphs stay behind."""
        return {**self.__dict__, "_kept": OrderedDict()}

    def _sampled(self, labels: Tensor, seeds: Tensor, options: Options, decode: bool) -> Outputs:
        mixed = (options.top_k, options.top_p) if options.more_smooth else ()
        self.engine.parts()
        if self._weights != self.engine.builds:  # the graphs read memory that is gone
            self._kept.clear()
            self._weights = self.engine.builds
        key = (len(labels), options.guided, options.temperature, mixed, decode)
        if key not in self._kept:
            while len(self._kept) >= KEPT:
                self._kept.popitem(last=False)
            self._kept[key] = self._captured(labels, seeds, options, decode)
        self._kept.move_to_end(key)
        captured = self._kept[key]
        captured.inputs.fill(labels, seeds, options)
        captured.replay()
        images, tokens = captured.outputs
        return images.clone(), tokens.clone()

    def _captured(self, labels: Tensor, seeds: Tensor, options: Options, decode: bool) -> Captured:
        engine, codebook = self.engine, self.engine.vae.quantize.embedding.weight.detach().float()
        inputs = Inputs.empty(len(labels), len(options.cfg), engine.device)
        inputs.fill(labels, seeds, options)

        def run() -> Outputs:
            draw = SeededDraw(inputs.seeds, options, codebook, inputs)
            return engine.sample(inputs.labels, options, draw, decode=decode, cfg=list(inputs.cfg))

        return Captured(inputs, *self.capture(run), codebook)
