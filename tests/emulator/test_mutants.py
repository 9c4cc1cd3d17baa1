"""The reading of `mutants.py`: what it removes from a kernel."""

from __future__ import annotations

import pytest

from tests.emulator.mutants import KERNELS, mutants_of, suites_of

SOURCE = """\
    __syncthreads();
    // __syncthreads(); in a comment
    ptx::cp_async_wait<stages - 1>();
    const bool seen = column < end;  // mask
    if (row < rows) store(row);  // mask
    __syncwarp();
"""


def test_what_is_removed() -> None:
    changes = [(mutant.line, mutant.new.strip()) for mutant in mutants_of("x.cu", SOURCE)]
    assert changes == [
        (1, "if (!#) __syncthreads();"),
        (3, "if (!#) ptx::cp_async_wait<stages - 1>();"),
        (4, "const bool seen = # || (column < end);  // mask"),
        (5, "if (# || (row < rows)) store(row);  // mask"),
        (6, "if (!#) __syncwarp();"),
    ]


def test_a_mask_must_be_readable() -> None:
    with pytest.raises(ValueError, match=r"x\.cu:1: a mask must read"):
        list(mutants_of("x.cu", "score = column < end ? score : 0;  // mask"))


def test_all_kernels_can_be_read() -> None:
    """Every barrier is found: none shares its line with something else."""
    for path in [*KERNELS.glob("*.cu"), *KERNELS.glob("*.cuh")]:
        if path.name == "ptx.cuh":
            continue
        text = path.read_text(encoding="utf-8")
        code = "\n".join(line.split("//")[0] for line in text.split("\n"))
        names = ("__syncthreads(", "__syncwarp(", "cp_async_wait<", "wait_for_previous(")
        calls = sum(code.count(name) for name in names)
        assert calls == sum(mutant.new.startswith("if (!#)") for mutant in mutants_of(path.name, text)), (
            path.name
        )
        if calls:
            assert suites_of(path.name), path.name
