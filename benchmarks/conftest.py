"""Runs the benchmark files: shape by shape, lap by lap, competitor by competitor.

A file gives `SHAPES` (name -> arguments), `SMOKE` (arguments small enough for a test), `COMPETITORS` (names)
and a function `case(**arguments) -> Case`; its one test is `run_case()`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import case as cases
import pytest
import torch

from var_ext import backend

_load = os.getloadavg()[0]  # before the run: the load of the machine


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--smoke", action="store_true", help="each competitor once, on a tiny shape")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--smoke"):
        cases.compile_backend = "eager"
    torch.set_num_threads(cases.threads())


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    from var_ext import _C

    del machine_info["node"]  # the machine's name is private
    machine_info["torch"] = torch.__version__
    machine_info["load"] = _load
    machine_info["threads"] = torch.get_num_threads()
    machine_info["var_ext"] = {**_C.build_info(), "isa": _C.isa()}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "run_case" not in metafunc.fixturenames:
        return
    smoke, module = metafunc.config.getoption("--smoke"), metafunc.module
    # the first is the outermost: all competitors run one lap before any of them runs the next
    metafunc.parametrize("shape", ["smoke"] if smoke else list(module.SHAPES))
    metafunc.parametrize("lap", range(1 if smoke else getattr(module, "LAPS", cases.LAPS)))
    metafunc.parametrize("competitor", module.COMPETITORS)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("benchmark") is None:
            item.add_marker(pytest.mark.benchmark(max_time=0.1, min_rounds=3, disable_gc=True))


_latest: dict[tuple[str, str], cases.Case] = {}  # one entry: inputs of earlier shapes are freed


def _case(module: ModuleType, shape: str) -> cases.Case:
    key = (module.__name__, shape)
    if key not in _latest:
        _latest.clear()
        torch.manual_seed(0)
        built = module.case(**(module.SMOKE if shape == "smoke" else module.SHAPES[shape]))
        assert tuple(built.competitors) == module.COMPETITORS, (tuple(built.competitors), module.COMPETITORS)
        _latest[key] = built
    return _latest[key]


@pytest.fixture
def run_case(
    request: pytest.FixtureRequest, benchmark, shape: str, lap: int, competitor: str
) -> Callable[[], None]:
    """Checks the competitor against the reference, then times it for one lap."""

    def run() -> None:
        op = request.module.__name__.removeprefix("bench_")
        case = _case(request.module, shape)
        case.verify(competitor)
        native = backend.use_native(op, "cpu")
        benchmark.group = f"{op} | {shape}"
        benchmark.extra_info.update(
            op=op,
            shape=shape,
            competitor=competitor,
            lap=lap,
            bytes=case.bytes,
            flops=case.flops,
            images=case.images,
            kernel="native" if native else "reference",
            threads=torch.get_num_threads(),
        )
        benchmark(case.competitors[competitor])

    return run
