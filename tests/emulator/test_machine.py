"""The emulator finds what it claims to find: kernels that are broken on purpose, one for each kind of error."""

from __future__ import annotations

import re

import pytest
import torch

from tests.emulator.emulation import emulator

FLOATS, THREADS = 256, 64


def run(kernel: str, seed: int = 0) -> torch.Tensor:
    """A kernel of kernels/broken.cu on the numbers 0, 1, 2..., in an order of threads that `seed` chooses."""
    data = torch.arange(FLOATS, dtype=torch.float32)
    emulator().seed(seed)
    emulator().begin(kernel, [(data.data_ptr(), data.nbytes)])
    emulator().run(kernel, data.data_ptr(), FLOATS if "overrun" in kernel else THREADS)
    return data


@pytest.mark.parametrize("seed", range(5))
def test_right_kernels_pass(seed: int) -> None:
    numbers = torch.arange(64, dtype=torch.float32)
    assert torch.equal(run("reverse", seed)[:64], numbers.flip(0))
    assert torch.equal(run("reverse_in_warp", seed)[:64], numbers.view(2, 32).flip(1).flatten())
    partner = torch.arange(64) ^ 33
    assert torch.equal(run("copy", seed)[::4], 4.0 * partner)
    assert torch.equal(run("atomics", seed)[:64], torch.full((64,), 64.0))


BROKEN = {
    "device_overrun": "thread 63: reads 4 bytes of device memory at 0x[0-9a-f]+, out of bounds",
    "device_write_overrun": "thread 63: writes 4 bytes of device memory at 0x[0-9a-f]+, out of bounds",
    "shared_overrun": r"thread \d+: writes 4 bytes of shared memory at \d+, out of bounds: the block has 8192",
    "misaligned": r"thread \d+: reads 16 bytes of device memory at 0x[0-9a-f]+, which is misaligned",
    "misaligned_copy": r"copies to 16 bytes of shared memory at \d+, which is misaligned",
    "unwritten": "thread 63: reads 4 bytes of shared memory at 252 that nobody has written",
    "no_barrier": "of shared memory at .* (that nobody has written|without a barrier after)",
    "warp_barrier_across_warps": "of shared memory at .* (that nobody has written|without a barrier after)",
    "no_warp_barrier": "of shared memory at .* (that nobody has written|without a barrier after)",
    "shuffle_as_barrier": r"reads 4 bytes of shared memory at \d+ without a barrier after the write of thread \d+",
    "overwritten_too_soon": "shared memory at .* without a barrier after",
    "two_writers": r"writes 4 bytes of shared memory at \d+ without a barrier after the write of thread \d+",
    "copy_without_wait": r"reads 4 bytes of shared memory at \d+ before the wait for an asynchronous copy",
    "copy_waits_for_too_few": r"reads 4 bytes of shared memory at \d+ before the wait for an asynchronous copy",
    "copy_without_barrier": "shared memory at .* (that nobody has written|without a barrier|before the wait)",
    "copy_over_a_tile_in_use": "shared memory at .* (without a barrier after|before the wait)",
    "copy_forgotten": "ends before its asynchronous copy was waited for",
    "barrier_for_some": r"part of the block misses a barrier: thread \d+ waits at .*, thread \d+ has ended",
    "left_before_barrier": "misses a barrier: thread 0 waits at __syncthreads .*, thread 5 has ended",
    "two_barriers_at_once": "misses a barrier: thread 0 waits at __syncthreads .*, thread 32 waits at __syncthreads",
    "shuffle_for_some": "part of the warp misses a barrier: thread 0 waits at __shfl_sync .*, thread 7 has ended",
    "atomic_and_plain": "without a barrier after",
    "atomic_overrun": r"adds to 4 bytes of device memory at 0x[0-9a-f]+, out of bounds",
    "atomic_misaligned": r"adds to 4 bytes of shared memory at \d+, which is misaligned",
    "part_of_a_warp": "a block of part of a warp is not emulated",
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kernel", BROKEN)
def test_broken_kernels_are_found(kernel: str, seed: int) -> None:
    """Whatever the order of threads: the machine reasons about what may happen, not about what did."""
    with pytest.raises(emulator().EmulatorError, match=f"^{kernel}: .*{BROKEN[kernel]}"):
        run(kernel, seed)
    run("reverse", seed)  # and the machine is sound after it


def test_a_finding_names_block_thread_and_line() -> None:
    with pytest.raises(
        emulator().EmulatorError, match=r"unwritten: block \(0, 0, 0\) thread 63: .*\(broken\.cu:\d+\)"
    ):
        run("unwritten")


@pytest.mark.parametrize("kernel", ["too_many_threads", "too_much_shared_memory"])
def test_launches_that_hardware_would_refuse(kernel: str) -> None:
    said = (
        "CUDA error: invalid"
        if "threads" in kernel
        else "these sizes need 204800 bytes of shared memory a block"
    )
    with pytest.raises(RuntimeError, match=f"{kernel}: {said}"):
        run(kernel)


def test_chips_differ_in_shared_memory() -> None:
    try:
        for chip, bytes_ in (("86", 101376), ("120", 101376), ("80", 166912)):
            emulator().chip(chip)
            with pytest.raises(RuntimeError, match=f"204800 bytes .* this GPU has {bytes_}; VAR_EXT_BACKEND"):
                run("too_much_shared_memory")
        emulator().chip("90")
        run("too_much_shared_memory")
    finally:
        emulator().chip("80")
    with pytest.raises(emulator().EmulatorError, match="chip must be 80, 86, 89, 90 or 120, got 70"):
        emulator().chip("70")


def test_bank_conflicts() -> None:
    emulator().trace(True)
    try:
        run("reverse")
        assert emulator().conflicts() == []
        run("strided")
        found = emulator().conflicts()
        assert [ways for _, ways, _ in found] == [32, 32]  # the write and the read
        for where, _, _ in found:
            assert re.fullmatch(r"strided: block \(0, 0, 0\) thread \d+ \(broken\.cu:\d+\)", where)
        run("matrix_rows_in_line")
        assert [ways for _, ways, _ in emulator().conflicts()] == [8]
    finally:
        emulator().trace(False)


def test_a_sample_of_the_blocks() -> None:
    """The first and the last are among them."""
    data = torch.zeros(1000)
    emulator().begin("count_blocks", [(data.data_ptr(), data.nbytes)])
    emulator().sample(5)
    try:
        emulator().run("count_blocks", data.data_ptr(), 1000)
    finally:
        emulator().sample(0)
    assert data[0] == data[999] == 1
    assert 2 < data.sum() <= 5
