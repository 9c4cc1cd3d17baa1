"""One pool of threads: the kernels work on torch's own, as many threads as torch.set_num_threads says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

# Threads of the process once torch has its pool, and after each kernel that is large enough to use it.
PROGRAM = """
import json, os, sys
import torch
from var_ext import ops
torch.set_num_threads(int(sys.argv[1]))
count = lambda: len(os.listdir("/proc/self/task"))
x = torch.randn(4096, 32)
torch.nn.functional.silu(torch.randn(1 << 20))  # an elementwise op runs on the OpenMP pool
counts = [count()]
for call in (lambda: ops.nearest_code(x, x), lambda: ops.bicubic_upsample(torch.randn(8, 32, 16, 16), 64)):
    call()
    counts.append(count())
print(json.dumps(counts))
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads in /proc")
@pytest.mark.parametrize("threads", [1, 3])
def test_kernels_start_no_threads_of_their_own(threads: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(threads)], capture_output=True, text=True, timeout=120, check=True
    )
    alone, *after = json.loads(done.stdout)
    assert after == [alone] * len(after)
    assert alone >= threads
