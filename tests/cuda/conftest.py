"""Where the tests of the CUDA kernels run: in the emulator, and on a GPU where one is at hand."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.cuda import compiled
from tests.emulator import emulation
from tests.ops.conftest import poisoned_memory  # noqa: F401
from var_ext import _C, backend
from var_ext.engine import layers
from var_ext.ops import _native

_BEGIN = time.monotonic()


@dataclass(frozen=True)
class Gpu:
    """Calls move a tensor there, with its strides. In the emulator that is where it lies already."""

    level: str

    def __call__(self, tensor: Tensor) -> Tensor:
        if self.level == "emulated":
            return tensor
        memory = tensor.untyped_storage().cuda()
        placed = torch.empty(0, dtype=tensor.dtype, device="cuda")
        return placed.set_(memory, tensor.storage_offset(), tensor.shape, tensor.stride())

    @contextmanager
    def sampled(self, blocks: int) -> Iterator[None]:
        """Runs only so many blocks of each launch, the first and the last among them; on hardware all."""
        if self.level == "emulated":
            emulation.emulator().sample(blocks)
        yield
        if self.level == "emulated":
            emulation.emulator().sample(0)

    @contextmanager
    def of_one_multiprocessor(self) -> Iterator[None]:
        """Kernels take the chip for a small one, which few blocks fill; hardware is what it is."""
        if self.level == "emulated":
            emulation.emulator().multiprocessors(1)
        yield
        if self.level == "emulated":
            emulation.emulator().multiprocessors(108)

    @contextmanager
    def of_chip(self, target: str) -> Iterator[None]:
        """Blocks may have as much shared memory as on that chip; hardware is what it is."""
        if self.level == "emulated":
            emulation.emulator().chip(target)
        yield
        if self.level == "emulated":
            emulation.emulator().chip("80")

    def conflicts(self) -> list[tuple[str, int, int]]:
        """Bank conflicts since the test began: where the first was, ways, times; the emulator counts them."""
        return emulation.emulator().conflicts()


def levels() -> list[str]:
    """VAR_EXT_GPU_TESTS chooses "emulated" or "hardware"; without it the second where it can run, beside the first."""
    chosen = os.environ.get("VAR_EXT_GPU_TESTS")
    if chosen not in (None, "", "emulated", "hardware"):
        raise ValueError(f"VAR_EXT_GPU_TESTS must be emulated or hardware, got {chosen!r}")
    if chosen:
        return [chosen]
    there = torch.cuda.is_available() and _C.build_info()["cuda"] is not None
    return ["emulated", "hardware"] if there else ["emulated"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """VAR_EXT_GPU_CASES=n: n cases of each test that runs kernels and no others, for tools that make each one slow.

    The files take turns: should time run out, every op has had some.
    """
    count = int(os.environ.get("VAR_EXT_GPU_CASES") or 0)
    if not count:
        return
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if "gpu" in getattr(item, "fixturenames", ()):
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    turns: list[tuple[int, int, pytest.Item]] = []
    tests: Counter[Path] = Counter()  # of each file so far
    for of_one in cases.values():
        chosen = of_one[:: max(1, len(of_one) // count)][:count]
        turns += [(case, tests[item.path], item) for case, item in enumerate(chosen)]
        tests[of_one[0].path] += 1
    items[:] = [item for *_, item in sorted(turns, key=lambda turn: turn[:2])]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """VAR_EXT_GPU_SECONDS=s: what would begin later is skipped, so that a slow tool comes to its end and reports."""
    seconds = float(os.environ.get("VAR_EXT_GPU_SECONDS") or "inf")
    if time.monotonic() - _BEGIN > seconds:
        pytest.skip(f"no time left after {seconds:.0f} s")


@contextmanager
def exact_float32() -> Iterator[None]:
    """torch's products and convolutions keep all bits of float32: its convolutions round to TF32 unless told not to."""
    switches = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = False
    try:
        yield
    finally:
        for switch, allowed in zip(switches, before, strict=True):
            switch.allow_tf32 = allowed


@pytest.fixture(params=levels())
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """The native backend on CUDA kernels."""
    with backend.force("native"), exact_float32() if request.param == "hardware" else nullcontext():
        if request.param == "emulated":
            emulation.emulator().seed(0)
            emulation.emulator().sample(0)
            emulation.emulator().multiprocessors(108)
            emulation.emulator().chip("80")
            monkeypatch.setattr(_native, "is_gpu", lambda tensor: True)
            monkeypatch.setattr(layers, "adds_bias_apart", lambda x: True)
            monkeypatch.setattr(_native, "gpu_stream", lambda tensor: emulation.Stream())
            monkeypatch.setattr(
                _native, "_multiprocessors_of", lambda device: emulation.emulator().multiprocessors()
            )
        else:
            assert torch.cuda.is_available(), "VAR_EXT_GPU_TESTS=hardware, but torch sees no GPU"
        yield Gpu(request.param)


@pytest.fixture(scope="session", autouse=True)
def _launches_keep_to_their_budgets() -> Iterator[None]:
    """What the compiler cannot know: threads and shared memory that launches ask for."""
    yield
    wrong = []
    if emulation.emulator.cache_info().currsize:
        for signature, threads, shared in emulation.emulator().usage():
            name, arguments = compiled.split_name(signature)
            fitting = [b for b in compiled.budgets().get(name, []) if b.fits(arguments)]
            if fitting and (threads > fitting[0].threads or shared > fitting[0].shared):
                wrong.append(
                    f"{name}<{arguments}>: {threads} threads, {shared} bytes; the budget: {fitting[0]}"
                )
    assert not wrong, "\n".join(wrong)


@pytest.fixture
def traced(gpu: Gpu) -> Iterator[Gpu]:
    """`gpu` with a count of bank conflicts; in the emulator alone."""
    if gpu.level != "emulated":
        pytest.skip("bank conflicts are counted by the emulator")
    emulation.emulator().trace(True)
    yield gpu
    emulation.emulator().trace(False)
