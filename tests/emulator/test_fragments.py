"""Layouts of the matrix instructions, checked against tables written from the PTX manual.

The tables follow the figures of the PTX ISA manual for mma.m16n8k16 with 16-bit elements and for
ldmatrix.m8n8. They share nothing with collectives.cpp.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.emulator.emulation import emulator

LANES = range(32)


def a_element(lane: int, i: int) -> tuple[int, int]:
    """Row and column of element a_i: rows repeat every two elements, columns move on at a4."""
    group, in_group = lane >> 2, lane % 4
    row = group if i in (0, 1, 4, 5) else group + 8
    column = in_group * 2 + (i & 1) + (8 if i >= 4 else 0)
    return row, column


def b_element(lane: int, i: int) -> tuple[int, int]:
    group, in_group = lane >> 2, lane % 4
    row = in_group * 2 + (i & 1) + (8 if i >= 2 else 0)
    return row, group


def c_element(lane: int, i: int) -> tuple[int, int]:
    group, in_group = lane >> 2, lane % 4
    return (group if i < 2 else group + 8), in_group * 2 + (i & 1)


# Corners of the figures, read off one by one: the formulas above are held to them.
FIGURE = [
    (a_element, 0, 0, (0, 0)), (a_element, 0, 1, (0, 1)), (a_element, 0, 2, (8, 0)), (a_element, 0, 4, (0, 8)),
    (a_element, 0, 7, (8, 9)), (a_element, 3, 1, (0, 7)), (a_element, 31, 3, (15, 7)), (a_element, 31, 7, (15, 15)),
    (b_element, 0, 0, (0, 0)), (b_element, 0, 3, (9, 0)), (b_element, 3, 1, (7, 0)), (b_element, 31, 2, (14, 7)),
    (c_element, 0, 1, (0, 1)), (c_element, 4, 0, (1, 0)), (c_element, 28, 2, (15, 0)), (c_element, 31, 3, (15, 7)),
]  # fmt: skip


@pytest.mark.parametrize(("element", "lane", "i", "place"), FIGURE)
def test_tables(element, lane: int, i: int, place: tuple[int, int]) -> None:  # type: ignore[no-untyped-def]
    assert element(lane, i) == place


def probe(name: str, data: Tensor) -> None:
    emulator().begin(name, [(data.data_ptr(), data.nbytes)])
    emulator().probe(name, data.data_ptr())


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_mma(dtype: str) -> None:
    # small whole numbers: every product and sum is exact in both formats
    a, b, c = (torch.randint(-8, 9, shape).float() for shape in ((16, 16), (16, 8), (16, 8)))
    data = torch.empty(32, 16)
    for lane in LANES:
        data[lane, :8] = torch.stack([a[a_element(lane, i)] for i in range(8)])
        data[lane, 8:12] = torch.stack([b[b_element(lane, i)] for i in range(4)])
        data[lane, 12:] = torch.stack([c[c_element(lane, i)] for i in range(4)])
    probe(f"mma_{dtype}", data)
    wanted = a @ b + c
    for lane in LANES:
        assert torch.equal(data[lane, 12:], torch.stack([wanted[c_element(lane, i)] for i in range(4)]))


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(transposed: bool) -> None:
    matrices = torch.arange(256.0).view(4, 8, 8)
    data = matrices.clone()
    probe("ldmatrix_trans" if transposed else "ldmatrix", data)
    given = data.view(32, 4, 2)
    source = matrices.mT if transposed else matrices
    for lane in LANES:  # "each thread of the first row gets two elements of row 0, and so on"
        assert torch.equal(given[lane], source[:, lane // 4, 2 * (lane % 4) : 2 * (lane % 4) + 2])


def test_shuffles_and_votes() -> None:
    data = torch.zeros(32 * 6)
    data[:32] = torch.arange(32.0)
    probe("collectives", data)
    one, xor, down, up, high, low = data.view(32, 6).unbind(1)
    lanes = torch.arange(32)
    assert (one == 3).all()
    assert torch.equal(xor, (lanes ^ 1).float())
    assert torch.equal(down, (lanes + 1).clamp(max=31).float())  # past the end a lane gets its own
    assert torch.equal(up, (lanes - 1).clamp(min=0).float())
    assert (high == 0xAAAA).all()
    assert (low == 0xAAAA).all()
