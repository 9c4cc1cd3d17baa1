"""The compile gate: nvcc takes every kernel for every chip without a warning, within the budget beside it, made of the
instructions that its plan names."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.build.tools import SEARCH
from tests.cuda import compiled
from tests.cuda.compiled import Budget, Kernel

# In short one chip, and files with products of the tensor cores, with norms, with integers; at length all.
SHORT = ("adaln", "block_causal_attention", "quantize_rows")
ALL = tuple(source.stem for source in compiled.sources())
each_gate = pytest.mark.parametrize(
    ("target", "files"),
    [
        pytest.param(compiled.targets()[-1], SHORT, id="short"),
        *(pytest.param(target, ALL, id=target, marks=pytest.mark.slow) for target in compiled.targets()),
    ],
)
with_nvcc = pytest.mark.skipif(
    not (shutil.which("nvcc", path=SEARCH) or Path("/usr/local/cuda/bin/nvcc").exists()),
    reason="there is no nvcc: install the CUDA toolkit",
)


def complaints(kernel: Kernel, budget: Budget | None, target: str) -> list[str]:
    if budget is None:
        return [f"{kernel}: no budget"]
    wrong, is_tuned = [], target in compiled.tuned()
    if is_tuned and kernel.registers > budget.registers:
        wrong.append(f"{kernel.registers} registers, {budget.registers} allowed")
    if kernel.spills > (0 if is_tuned else 128) or (is_tuned and kernel.stack):
        wrong.append(f"{kernel.spills} bytes of spills, a stack frame of {kernel.stack}")
    if kernel.shared:
        wrong.append(f"{kernel.shared} bytes of static shared memory; all of it is to be dynamic")
    for chip in compiled.chips_of(target):
        blocks = compiled.resident_blocks(budget.threads, kernel.registers, budget.shared, chip)
        planned = budget.small if compiled.CHIPS[chip].is_small else budget.blocks
        if blocks < planned:
            wrong.append(f"{blocks} blocks on a multiprocessor of {chip}, {planned} planned")
    return [f"{kernel} on sm_{target}: {what}" for what in wrong]


@with_nvcc
@each_gate
def test_budgets(target: str, files: tuple[str, ...]) -> None:
    wrong, seen = [], set()
    for result in compiled.compile_all(target, files):
        for kernel in result.kernels:
            budget = compiled.budget_for(kernel)
            seen.add(budget)
            wrong += complaints(kernel, budget, target)
    assert not wrong, "\n".join(wrong)
    if files == ALL:
        unused = [b for budgets in compiled.budgets().values() for b in budgets if b not in seen]
        assert not unused, f"budgets of no kernel: {unused}"


@with_nvcc
@each_gate
def test_instructions(target: str, files: tuple[str, ...]) -> None:
    wrong = []
    for result in compiled.compile_all(target, files):
        code = compiled.instructions(result.cubin)
        for kernel in result.kernels:
            there = code[kernel.symbol]
            assert "EXIT" in there, f"{kernel}: the disassembly cannot be read"
            budget = compiled.budget_for(kernel)
            wanted = budget.instructions(kernel.arguments) if budget else []
            wrong += [
                f"{kernel} on sm_{target}: no {name}"
                for name in wanted
                if not any(f".{name}." in f".{instruction}." for instruction in there)
            ]
            if target.startswith("9") and "ACQBULK" not in there:  # griddepcontrol.wait
                wrong.append(f"{kernel} on sm_{target}: does not wait for the kernel before it")
            local = [name for name in there if name.split(".")[0] in ("LDL", "STL")]
            wrong += [f"{kernel} on sm_{target}: {name}, local memory" for name in local]
    assert not wrong, "\n".join(wrong)


def test_every_kernel_begins_with_the_wait_for_the_one_before() -> None:
    """A launch may start its blocks before that one has ended: see csrc/cuda/launch.cuh."""
    kernel = re.compile(r"__global__\s+void\s+__launch_bounds__.*?\b(\w+_kernel)\(.*?\) \{\n(.*?)\n", re.S)
    found = [m for path in compiled.SOURCES.glob("*.cu*") for m in kernel.finditer(path.read_text("utf-8"))]
    assert {name for name, _ in (m.groups() for m in found)} == set(compiled.budgets())
    assert [m[1] for m in found if m[2].strip() != "ptx::wait_for_previous();"] == []


# Instructions for each product: what addresses, masks and the softmax cost beside the tensor cores. Of backward the
# inner loop counts (on sm_90a 4.6 and 4.3 before each address was one XOR of a thread's own). Forward has the body of
# its loop twice, for edges and for the rest, so all of it counts (13.9 before).
INSTRUCTIONS = [
    (
        "block_causal_attention_backward",
        "attention_backward_dq_kernel",
        "__nv_bfloat16, 64",
        compiled.inner_loop,
        3.8,
    ),
    (
        "block_causal_attention_backward",
        "attention_backward_dkv_kernel",
        "__nv_bfloat16, 64",
        compiled.inner_loop,
        3.6,
    ),
    (
        "block_causal_attention",
        "attention_forward_kernel",
        "__nv_bfloat16, 64, 2, BlockCausalTiles, StoredQueries",
        compiled.whole_kernel,
        11.8,
    ),
]


@with_nvcc
@pytest.mark.parametrize(
    ("file", "name", "arguments", "count", "most", "target"),
    [
        pytest.param(*row, target, id=f"{row[1]}-{target}", marks=[] if short else [pytest.mark.slow])
        for row in INSTRUCTIONS
        for target in compiled.targets()
        for short in [row[0] in SHORT and target == compiled.targets()[-1]]
    ],
)
def test_instructions_a_product(
    file: str,
    name: str,
    arguments: str,
    count: Callable[[Path, str], tuple[int, int]],
    most: float,
    target: str,
) -> None:
    (result,) = compiled.compile_all(target, (file,))
    (kernel,) = (k for k in result.kernels if (k.name, k.arguments) == (name, arguments))
    instructions, products = count(result.cubin, kernel.symbol)
    assert instructions / products <= most, f"{instructions} for {products}"


REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1kI6__halfLi64EEvPT_' for 'sm_80'
ptxas info    : Function properties for _Z1kI6__halfLi64EEvPT_
    {stack} bytes stack frame, {spills} bytes spill stores, {spills} bytes spill loads
ptxas info    : Used {registers} registers, used 1 barriers, {shared} bytes smem, 360 bytes cmem[0]
"""
BUDGET = Budget("k", "", 128, 128, 32768, 4, ())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(registers=129), "129 registers, 128 allowed"),
        (dict(spills=8), "16 bytes of spills"),
        (dict(stack=16), "a stack frame of 16"),
        (dict(shared=64), "64 bytes of static shared memory"),
    ],
)
def test_a_kernel_over_budget_is_found(change: dict[str, int], message: str) -> None:
    text = REPORT.format(**{**dict(stack=0, spills=0, registers=128, shared=0), **change})
    (kernel,) = compiled.read_report(text)
    assert (kernel.name, kernel.arguments) == ("k", "__half, 64")
    assert message in "\n".join(complaints(kernel, BUDGET, "80"))


def test_small_chips_hold_fewer_blocks() -> None:
    """8.6 and 8.9 by the code of sm_80; 12.0 by its own, which the gate compiles where it is asked to."""
    (kernel,) = compiled.read_report(REPORT.format(stack=0, spills=0, registers=128, shared=0))
    assert complaints(kernel, replace(BUDGET, small=4), "80") == [
        f"k<__half, 64> on sm_80: 3 blocks on a multiprocessor of {chip}, 4 planned" for chip in ("86", "89")
    ]
    large = replace(BUDGET, shared=99 * 1024 + 1, blocks=1)
    assert len(complaints(kernel, large, "80")) == 2
    assert len(complaints(kernel, large, "120")) == len(complaints(kernel, large, "86")) == 1
    assert complaints(kernel, replace(large, small=0), "80") == complaints(kernel, large, "90a") == []
    assert complaints(kernel, replace(large, shared=99 * 1024), "80") == []


def test_chips_that_are_not_tuned_for_may_spill_a_little() -> None:
    (kernel,) = compiled.read_report(REPORT.format(stack=32, spills=64, registers=255, shared=0))
    assert complaints(kernel, replace(BUDGET, blocks=2), "120") == []
    (kernel,) = compiled.read_report(REPORT.format(stack=32, spills=65, registers=255, shared=0))
    assert "130 bytes of spills" in complaints(kernel, BUDGET, "120")[0]


def test_a_kernel_within_budget_passes() -> None:
    (kernel,) = compiled.read_report(REPORT.format(stack=0, spills=0, registers=128, shared=0))
    assert complaints(kernel, BUDGET, "80") == []
    assert complaints(kernel, None, "80") == ["k<__half, 64>: no budget"]


@pytest.mark.parametrize(
    ("chip", "threads", "registers", "shared", "blocks"),
    [("80", 128, 255, 0, 2), ("80", 128, 168, 0, 3), ("80", 128, 128, 0, 4), ("80", 256, 80, 0, 3),
     ("80", 512, 32, 0, 4), ("80", 128, 64, 81 * 1024, 2), ("80", 128, 64, 82 * 1024, 1), ("80", 32, 16, 0, 32),
     ("86", 32, 16, 0, 16), ("89", 32, 16, 0, 24), ("120", 512, 32, 0, 3), ("86", 128, 64, 50176, 2),
     ("86", 128, 64, 50177, 1), ("86", 128, 64, 99 * 1024, 1), ("86", 128, 64, 99 * 1024 + 1, 0)],
)  # fmt: skip
def test_resident_blocks(chip: str, threads: int, registers: int, shared: int, blocks: int) -> None:
    assert compiled.resident_blocks(threads, registers, shared, chip) == blocks


SOURCE = """\
constexpr unsigned few = 64;
// Adds.
// budget <float, 32>: registers <= 40, shared <= 0, blocks >= 6, on sm_86 >= 4
// budget: registers <= 80, shared <= 512, blocks >= 3
// sass: HMMA, LDG.E.128
// sass <float, 32>: FFMA
template <class T, int D>
__global__ void __launch_bounds__(few, D == 32 ? 6 : 3)
    add_kernel(T* data) {}
"""


def test_reading_of_budgets() -> None:
    narrow, wide = compiled.budgets_of(SOURCE)
    sass = (("", "HMMA"), ("", "LDG.E.128"), ("float, 32", "FFMA"))
    assert narrow == Budget("add_kernel", "float, 32", 64, 40, 0, 6, sass, 4)
    assert wide == Budget("add_kernel", "", 64, 80, 512, 3, sass, 1)
    assert narrow.instructions("float, 32") == ["HMMA", "LDG.E.128", "FFMA"]
    assert wide.instructions("__half, 64") == ["HMMA", "LDG.E.128"]
    assert narrow.fits("float, 32")
    assert narrow.fits("float, 32, Tiles")
    assert not narrow.fits("float, 320")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("// budget", "// nothing", "add_kernel: no line `// budget"),
        ("registers <= 80", "registers < 80", "cannot read the budget"),
        ("few = 64", "few = some", "few is no constant"),
        ("__launch_bounds__(few, D == 32 ? 6 : 3)", "", "a kernel must read"),
    ],
)
def test_budgets_that_cannot_be_read(old: str, new: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compiled.budgets_of(SOURCE.replace(old, new))


def test_names() -> None:
    name = "void var_ext::cuda::forward_kernel<__half, 64, 2, var_ext::cuda::FullTiles>(var_ext::Params, unsigned int)"
    assert compiled.split_name(name) == ("forward_kernel", "__half, 64, 2, FullTiles")
    assert compiled.split_name("var_ext::cuda::(anonymous namespace)::plain_kernel(int)") == (
        "plain_kernel",
        "",
    )
