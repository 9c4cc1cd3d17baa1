"""Bundled models draw, for each (label, seed), the tokens that they always drew, whatever instructions there are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from var_ext import _C
from var_ext.checkpoints import bundled_models

ROOT = Path(__file__).resolve().parents[2]
# torch's own kernels and oneDNN's with the project's: all as on a machine that has no more
MACHINES = {
    "portable": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "avx512_bf16": {},
}


@pytest.mark.parametrize(
    ("variant", "threads"), [("portable", 2), ("avx2", 1), ("avx512", 2), ("avx512_bf16", 1)]
)
def test_tokens_are_what_they_were(variant: str, threads: int) -> None:
    wanted = json.loads((ROOT / "tests/golden/bundled.json").read_text())
    assert wanted.keys() == bundled_models().keys()
    if variant not in _C.cpu_info()["isa"]:
        pytest.skip(f"this CPU has no {variant}")
    environment = {**os.environ, **MACHINES[variant], "VAR_EXT_ISA": variant, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "tests.golden.bundled"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) == wanted
