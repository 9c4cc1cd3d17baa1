"""What the driver reports for every kernel of the build: registers, spills, resident blocks; next to the plan.

    python benchmarks/gpu_occupancy.py --out occupancy.json
    python benchmarks/gpu_occupancy.py --list --out occupancy.json      # without a GPU: only the plans

Plans are the `// budget` lines in csrc/cuda, described in tests/cuda/compiled.py. The machine code is read from the
extension module and loaded by the driver, so the figures are those of this code on this chip.
"""

from __future__ import annotations

import argparse
import ctypes
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from harness.report import save

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.cuda import compiled
from var_ext import _C

# of the driver's interface, cuda.h
REGISTERS, LOCAL_BYTES, BINARY_VERSION, DYNAMIC_SHARED = 4, 3, 6, 8
HEADER = struct.Struct("<IHHQ")  # magic, version, bytes of the header, bytes after it
MAGIC = struct.pack("<IHH", 0xBA55ED50, 1, HEADER.size)


def images(module: bytes) -> list[bytes]:
    """The fat binaries in an extension module, one for each source file: machine code and PTX of its kernels."""
    found = []
    for match in re.finditer(re.escape(MAGIC), module):
        *_, size = HEADER.unpack_from(module, match.start())
        found.append(module[match.start() : match.start() + HEADER.size + size])
    return found


class Driver:
    """The few libcuda calls that torch does not expose; the device is torch's current one."""

    def __init__(self) -> None:
        torch.empty(1, device="cuda")  # makes torch's context current
        self._library = ctypes.CDLL("libcuda.so.1")

    def call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            raise RuntimeError(f"{name}: CUDA error {status}")

    def functions(self, image: bytes) -> list[ctypes.c_void_p]:
        module, count = ctypes.c_void_p(), ctypes.c_uint()
        self.call("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(image))
        self.call("cuModuleGetFunctionCount", ctypes.byref(count), module)
        if not count.value:  # a source file without kernels
            return []
        handles = (ctypes.c_void_p * count.value)()
        self.call("cuModuleEnumerateFunctions", handles, count, module)
        return [ctypes.c_void_p(handle) for handle in handles]

    def symbol(self, function: ctypes.c_void_p) -> str:
        name = ctypes.c_char_p()
        self.call("cuFuncGetName", ctypes.byref(name), function)
        return (name.value or b"").decode()

    def attribute(self, function: ctypes.c_void_p, which: int) -> int:
        value = ctypes.c_int()
        self.call("cuFuncGetAttribute", ctypes.byref(value), ctypes.c_int(which), function)
        return value.value

    def blocks(self, function: ctypes.c_void_p, threads: int, shared: int) -> int:
        """How many blocks of that size a multiprocessor holds."""
        value = ctypes.c_int()
        self.call("cuFuncSetAttribute", function, ctypes.c_int(DYNAMIC_SHARED), ctypes.c_int(shared))
        self.call(
            "cuOccupancyMaxActiveBlocksPerMultiprocessor", ctypes.byref(value), function,
            ctypes.c_int(threads), ctypes.c_size_t(shared),
        )  # fmt: skip
        return value.value


def rows(driver: Any, module: bytes) -> Iterator[dict[str, Any]]:
    """One row per kernel, with its plan."""
    for image in images(module):
        functions = driver.functions(image)
        symbols = [driver.symbol(function) for function in functions]
        names = subprocess.run(
            ["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True
        )
        for function, demangled in zip(functions, names.stdout.splitlines(), strict=True):
            name, arguments = compiled.split_name(demangled)
            kernel = compiled.Kernel(
                name, arguments, "", driver.attribute(function, REGISTERS), 0,
                driver.attribute(function, LOCAL_BYTES), 0,
            )  # fmt: skip
            budget = compiled.budget_for(kernel)
            row = dict(kernel=str(kernel), registers=kernel.registers, local=kernel.spills)
            row["binary"] = driver.attribute(function, BINARY_VERSION)
            if budget is None:
                yield {**row, "wrong": "no plan"}
                continue
            blocks = driver.blocks(function, budget.threads, budget.shared)
            row |= dict(threads=budget.threads, shared=budget.shared, planned=budget.blocks, blocks=blocks)
            yield row | (dict(wrong="fewer blocks than planned") if blocks < budget.blocks else {})


def plans() -> list[dict[str, Any]]:
    """The plans noted beside the kernels."""
    return [
        dict(kernel=f"{budget.kernel}<{budget.arguments}>", threads=budget.threads, shared=budget.shared)
        | dict(planned=budget.blocks)
        for budgets in compiled.budgets().values()
        for budget in budgets
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--list", action="store_true", help="without a GPU: the plans alone")
    options = parser.parse_args()
    module = Path(_C.__file__).read_bytes()
    print(f"{len(images(module))} fat binaries in the extension module, {len(plans())} plans")
    if options.list:
        save(options.out, dict(plans=plans()))
        return 0 if images(module) else 1
    found = list(rows(Driver(), module))
    save(options.out, dict(kernels=found))
    for row in found:
        if "wrong" in row:
            print(f"{row['kernel']}: {row['wrong']}, {row.get('blocks', '?')} of {row.get('planned', '?')}")
    print(f"{len(found)} kernels, {sum('wrong' not in row for row in found)} as planned")
    return 0 if found and not any("wrong" in row for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
