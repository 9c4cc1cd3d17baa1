"""The tests that `area_downsample` and `bicubic_upsample` share on CUDA; their test files fill in a subclass each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.cuda.conftest import Gpu
from tests.emulator import emulation
from tests.ops import oracle
from tests.ops.interpolation import VIEWS, Size
from var_ext import _C, ops
from var_ext.ops._native import kernels, view

# Grids of the kernel in shared memory, then larger ones, and one long axis
ODD = [
    ((1, 1), (1, 1)),
    ((5, 5), (5, 5)),
    ((1, 1), (3, 7)),
    ((7, 5), (3, 2)),
    ((3, 2), (7, 5)),
    ((6, 5), (6, 9)),
    ((13, 16), (16, 13)),
    ((16, 16), (9, 11)),
    ((48, 48), (31, 29)),
    ((31, 29), (48, 48)),
    ((1, 2500), (2, 7)),
    ((2, 7), (1, 2500)),
]
DTYPES = (*oracle.LOW, torch.float64)


class CudaInterpolationTests:
    """Fill in `name`, `mode` of F.interpolate and `matrix(out, size)`."""

    name: str
    mode: str
    matrix: Callable[[int, int], Tensor]

    def run(self, gpu: Gpu, x: Tensor, size: Size) -> Tensor:
        return getattr(ops, self.name)(gpu(x), size).cpu()

    def run_backward(self, gpu: Gpu, grad: Tensor, size: Size) -> Tensor:
        return getattr(torch.ops.var_ext, f"{self.name}_backward").default(gpu(grad), *size).cpu()

    def on_cpu(self, name: str, x: Tensor, size: Size) -> Tensor:
        out = torch.empty(*x.shape[:2], *size, dtype=x.dtype)
        getattr(_C, name)(view(x), view(out))
        return out

    @pytest.mark.parametrize("sizes", ODD, ids=str)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_against_float64_and_the_cpu(
        self, gpu: Gpu, sizes: tuple[Size, Size], dtype: torch.dtype
    ) -> None:
        """As near to float64 as torch is; the very bits of the CPU kernel where that fuses products and sums."""
        source, target = sizes
        planes = (1, 2) if source[0] * source[1] > 800 or target[0] * target[1] > 800 else (3, 5)
        x, grad = torch.randn(*planes, *source).to(dtype), torch.randn(*planes, *target).to(dtype)
        mine, back = self.run(gpu, x, target), self.run_backward(gpu, grad, source)
        leaf = x.clone().requires_grad_()
        torchs = F.interpolate(leaf, size=target, mode=self.mode)
        (torchs_back,) = torch.autograd.grad(torchs, leaf, grad)
        rows, columns = type(self).matrix(target[0], source[0]), type(self).matrix(target[1], source[1])
        results = [
            (mine, torchs.detach(), oracle.resampled(x, rows, columns)),
            (back, torchs_back, oracle.resampled(grad, rows.T, columns.T)),
        ]
        for result, torchs_own, truth in results:
            if dtype == torch.float64:
                torch.testing.assert_close(result, truth, rtol=1e-12, atol=1e-12)
            else:
                oracle.assert_as_good_as_torch(result, torchs_own, truth)
        if _C.cpu_info()["selected"].startswith("avx"):
            assert torch.equal(mine, self.on_cpu(self.name, x, target))
            assert torch.equal(back, self.on_cpu(f"{self.name}_backward", grad, source))

    @pytest.mark.parametrize("name", VIEWS)
    @pytest.mark.parametrize("dtype", oracle.LOW)
    def test_strided_views(self, gpu: Gpu, name: str, dtype: torch.dtype) -> None:
        """The values and the layout of the plain call, in both kernels."""
        for sides in ((8, 10), (44, 47)):
            x = VIEWS[name](torch.randn(3, 6, *sides).to(dtype))
            for target in ((5, 2), (9, 13)):
                layout = torch.channels_last if name == "channels last" else torch.contiguous_format
                y, back = self.run(gpu, x, target), self.run_backward(gpu, x, target)
                assert y.is_contiguous(memory_format=layout)
                assert torch.equal(y, self.run(gpu, x.contiguous(), target))
                assert torch.equal(back, self.run_backward(gpu, x.contiguous(), target))

    def test_offsets_beyond_32_bits(self, gpu: Gpu) -> None:
        if gpu.level != "emulated":
            pytest.skip("moves 4 GB, of which the emulator touches a few pages")
        far = 2**31
        for source, target in (((5, 4), (3, 7)), ((40, 41), (41, 40)), ((3, 3), (3, 3))):
            x = torch.randn(2, 3, *source).bfloat16()
            out = torch.zeros(2, 3, *target).bfloat16()
            placed = [
                torch.empty(far + t[0].numel(), dtype=t.dtype)
                .as_strided(t.shape, (far, *t.stride()[1:]))
                .copy_(t)
                for t in (x, out)
            ]
            for name in (self.name, f"{self.name}_backward"):
                getattr(kernels(x), name)(*map(view, placed))
                assert torch.equal(placed[1], self.on_cpu(name, x, target))

    def test_nothing_in_nothing_out(self, gpu: Gpu) -> None:
        assert self.run(gpu, torch.randn(0, 3, 4, 4), (3, 5)).shape == (0, 3, 3, 5)
        assert self.run_backward(gpu, torch.randn(2, 0, 4, 4), (3, 5)).shape == (2, 0, 3, 5)

    def test_infinity_and_nan(self, gpu: Gpu) -> None:
        """What is not finite goes where it goes on the CPU; where nothing changes size, a copy keeps its bits."""
        x = torch.randn(1, 4, 7, 6)
        x[0, 1, 2, 3], x[0, 2, 6, 5], x[0, 3, 0, 0] = torch.inf, torch.nan, -torch.inf
        for target in ((7, 6), (7, 9), (3, 4), (11, 13)):
            for name, mine in (
                (self.name, self.run(gpu, x, target)),
                (f"{self.name}_backward", self.run_backward(gpu, x, target)),
            ):
                torch.testing.assert_close(mine, self.on_cpu(name, x, target), equal_nan=True)

    def test_the_order_of_threads_changes_no_bit(self, gpu: Gpu) -> None:
        x, runs = torch.randn(2, 9, 16, 16), []
        for seed in range(3):
            if gpu.level == "emulated":
                emulation.emulator().seed(seed)
            runs.append((self.run(gpu, x, (13, 13)), self.run_backward(gpu, x, (13, 13))))
        assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))

    def test_one_launch_each(self, gpu: Gpu) -> None:
        if gpu.level != "emulated":
            pytest.skip("the emulator counts launches")
        before = emulation.emulator().launches()
        x = torch.randn(2, 3, 4, 4)
        self.run(gpu, x, (8, 8))
        self.run_backward(gpu, x, (8, 8))
        assert emulation.emulator().launches() - before == 2

    def test_the_kernel_refuses(self, gpu: Gpu) -> None:
        x = gpu(torch.zeros(1, 1, 4, 4))
        for name in (self.name, f"{self.name}_backward"):
            run: Any = getattr(kernels(x), name)
            with pytest.raises(ValueError, match=f"{name}: .* must be float32"):
                run(view(x), view(x.bfloat16()))
            with pytest.raises(ValueError, match=f"{name}: .* must be one of float32.*, got int64"):
                run(view(x.long()), view(x.long()))
            long = _C.TensorView(x.data_ptr(), (1, 1, 1, 2**14 + 1), (0, 0, 0, 0), _C.DType.float32)
            with pytest.raises(ValueError, match=f"{name}: sides must be at most 16384 on CUDA, got 16385"):
                run(long, view(x))
