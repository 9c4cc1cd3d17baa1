"""Counts the rows for which the emulated CUDA kernel of nearest_code finds the token of the CPU kernel.

python -m tests.cuda.nearest_code_rows [--rows 100000] [--codes 4096] [--channels 32] [--cosine]

The exit status is 1 if a token differs. 10^5 rows against the published codebook take minutes: no test of the suite.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch

from tests.emulator import emulation
from var_ext import _C
from var_ext.ops._native import view


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--codes", type=int, default=4096)
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--cosine", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(1)
    x, codebook = (torch.randn(n, options.channels) for n in (options.rows, options.codes))
    on_cpu, emulated = torch.empty(2, options.rows, dtype=torch.int64)
    memory = torch.empty(_C.nearest_code_scratch(options.rows, options.codes, options.channels))
    _C.nearest_code(view(x), view(codebook), view(on_cpu), options.cosine, None)
    start = time.perf_counter()
    emulation.Stream().nearest_code(view(x), view(codebook), view(emulated), options.cosine, view(memory))
    seconds = time.perf_counter() - start
    equal = int((on_cpu == emulated).sum())
    print(f"{equal} of {options.rows} tokens equal those of the CPU kernel ({_C.isa()}); {seconds:.0f} s")
    return int(equal != options.rows)


if __name__ == "__main__":
    sys.exit(main())
