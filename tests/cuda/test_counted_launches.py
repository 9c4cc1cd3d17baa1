"""What each benchmark file counts of launches, on its smallest shape, against what the emulator sees."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import pytest
import torch

from tests.build.tools import ROOT
from tests.cuda.conftest import Gpu
from tests.emulator import emulation

NAMES = sorted(
    path.stem
    for path in (ROOT / "benchmarks").glob("bench_*.py")
    if "\nGPU_SHAPES" in path.read_text(encoding="utf-8")
)

# heads that CUDA takes; and qk_norm to fill the cache, as torch's own copies are not seen
CHANGES = {"bench_block_causal_attention": dict(dim=32), "bench_cached_attention": dict(dim=32, norm=True)}


@pytest.fixture
def module(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module(request.param)
    for name in (request.param, "contest"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("module", NAMES, indirect=True)
def test_launches(gpu: Gpu, module: Any) -> None:
    if gpu.level != "emulated":
        pytest.skip("the emulator counts launches")
    torch.manual_seed(0)
    contest = module.contest(**{**module.SMOKE, **CHANGES.get(module.__name__, {})})
    before = emulation.emulator().launches()
    contest.competitors["var_ext"]()
    assert emulation.emulator().launches() - before == contest.launches > 0


@pytest.mark.parametrize("module", NAMES, indirect=True)
def test_every_shape_is_counted(module: Any) -> None:
    for shape, arguments in module.GPU_SHAPES.items():
        with torch.device("meta"):
            contest = module.contest(**arguments)
        assert min(contest.launches, contest.bytes) > 0, shape
