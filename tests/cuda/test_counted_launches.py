"""Launches as benchmark files and the count of a sampling have them, against what the emulator sees."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.build.tools import ROOT
from tests.cuda.conftest import Gpu
from tests.emulator import emulation
from tests.launches import KERNELS
from tests.models.conftest import small_pair
from tests.ops import oracle
from tests.ops.test_cached_attention import normed
from var_ext import ops
from var_ext.engine import Call, Engine, Precision, SeededDraw, options_for
from var_ext.ops import _native

NAMES = sorted(
    path.stem
    for path in (ROOT / "benchmarks").glob("bench_*.py")
    if "\nGPU_SHAPES" in path.read_text(encoding="utf-8")
)

# heads that CUDA takes, and queries that a block has room for or not
CHANGES: dict[str, dict[str, Any]] = {
    "bench_block_causal_attention": dict(dim=32),
    "bench_cached_attention": dict(dim=32, dtype=torch.bfloat16, steps=[(1, 1), (128, 129), (129, 258)]),
}


@pytest.fixture
def module(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module(request.param)
    for name in (request.param, "case"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("module", NAMES, indirect=True)
def test_launches(gpu: Gpu, module: Any) -> None:
    if gpu.level != "emulated":
        pytest.skip("the emulator counts launches")
    torch.manual_seed(0)
    case = module.case(**{**module.SMOKE, **CHANGES.get(module.__name__, {})})
    before = emulation.emulator().launches()
    case.competitors["var_ext"]()
    assert emulation.emulator().launches() - before == case.launches > 0


@pytest.mark.parametrize("module", NAMES, indirect=True)
def test_every_shape_is_counted(module: Any) -> None:
    for shape, arguments in module.GPU_SHAPES.items():
        with torch.device("meta"):
            case = module.case(**arguments)
        assert min(case.launches, case.bytes) > 0, shape


class Launching(emulation.Stream):
    """Finds out how many launches a call of each kernel takes, beside what the count says."""

    def __init__(self, found: dict[str, set[tuple[int, int]]]) -> None:
        self.found = found

    def __getattr__(self, kernel: str) -> Callable[..., None]:
        launch = super().__getattr__(kernel)

        def call(*given: Any) -> None:
            before = emulation.emulator().launches()
            launch(*given)
            taken = emulation.emulator().launches() - before
            self.found.setdefault(kernel, set()).add((taken, KERNELS[kernel](*given)))

        return call


def test_launches_of_a_sampling(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kernel takes what the count of a whole sampling says, at every scale and in the decoder."""
    if gpu.level != "emulated":
        pytest.skip("the emulator counts launches")
    found: dict[str, set[tuple[int, int]]] = {}
    monkeypatch.setattr(_native, "gpu_stream", lambda tensor: Launching(found))
    engine = Engine(small_pair()[1].eval(), Precision("bf16", torch.bfloat16), pack=False)
    options = options_for(engine.schedule)
    engine.parts()
    found.clear()  # laying out decodes no images
    with torch.inference_mode():
        draw = SeededDraw(torch.tensor([7]), options, engine.codebook)
        engine.sample(Call(torch.tensor([3]), torch.tensor([7]), options), draw)
        # the size of the published f_hat, whose windows fit a block
        f_hat, codes, weight = torch.zeros(1, 32, 16, 16), torch.zeros(1, 32, 8, 8), torch.zeros(32, 32, 3, 3)
        ops.residual_step(f_hat, codes, weight, torch.zeros(32), next_size=10)
    assert found.keys() == KERNELS.keys()
    assert all(taken == said for pairs in found.values() for taken, said in pairs), found


@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize("dtype", oracle.LOW)
def test_launches_of_attention(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, dim: int, dtype: torch.dtype
) -> None:
    """One or two, by the number of queries."""
    if gpu.level != "emulated":
        pytest.skip("the emulator counts launches")
    found: dict[str, set[tuple[int, int]]] = {}
    monkeypatch.setattr(_native, "gpu_stream", lambda tensor: Launching(found))
    for queries in (1, 64, 65, 128, 129):
        ops.cached_attention(*normed(1, queries, queries, queries, 1, dim, dtype))
    assert found == {"cached_attention": {(2, 2)} if dtype == torch.float32 else {(1, 1), (2, 2)}}


@pytest.mark.parametrize(
    ("size", "launches"),
    [
        ((1, 4, 64, 64), 2),  # 64 chunks
        ((1, 4, 64, 65), 3),
        ((2, 4, 48, 64), 3),  # 48 each: more to read again
        ((5, 4, 16, 16), 2),
        ((1, 1024, 2, 2), 2),
        ((1, 1028, 2, 2), 3),
    ],
)
def test_launches_of_a_norm(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, size: tuple[int, ...], launches: int
) -> None:
    """Two where the map adds the chunks of its image up itself."""
    if gpu.level != "emulated":
        pytest.skip("the emulator counts launches")
    found: dict[str, set[tuple[int, int]]] = {}
    monkeypatch.setattr(_native, "gpu_stream", lambda tensor: Launching(found))
    x = torch.randn(size).to(memory_format=torch.channels_last)
    ops.group_norm_silu(x, torch.ones(size[1]), torch.zeros(size[1]), groups=2)
    assert found == {"group_norm_silu": {(launches, launches)}}
    found.clear()
    ops.group_norm_silu(x.contiguous(), torch.ones(size[1]), torch.zeros(size[1]), groups=2)
    assert found == {"group_norm_silu": {(3, 3)}}
