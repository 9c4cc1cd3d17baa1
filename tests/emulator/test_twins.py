"""The emulator has a twin of each wrapper in csrc/cuda/ptx.cuh, and nothing beside them."""

from __future__ import annotations

import re

from tests.build.tools import ROOT


def functions(path: str) -> set[str]:
    text = re.sub(r"//.*", "", (ROOT / path).read_text(encoding="utf-8"))
    # at the beginning of a line: name before the parameters
    begins = r"^(?:__device__|inline|EMULATED_ACCESS|template|void|using)"
    return set(re.findall(begins + r"[^;{(]*?(\w+)\s*[(;<]", text, re.M))


def test_each_wrapper_has_a_twin() -> None:
    real, twin = (functions(f"{place}/cuda/ptx.cuh") for place in ("csrc", "tests/emulator/include"))
    assert {"shared_memory", "mma_16816", "cp_async_wait", "exp2_approx"} <= real  # the reading works
    assert real - {"shared_address"} == twin - {"EMULATED_ACCESS"}
