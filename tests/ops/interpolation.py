"""The tests that `area_downsample` and `bicubic_upsample` share; their test files fill in a subclass each.

An interpolation is a matrix an axis, so its backward pass is the transposed matrices: an oracle for both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import var_ext
from tests.ops import oracle
from tests.threads import threads
from var_ext import backend, ops

Size = tuple[int, int]
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels last": lambda x: x.permute(0, 3, 1, 2),
    "transposed": lambda x: x.transpose(2, 3),
    "sliced": lambda x: x[:, ::2, 1:, ::3],
    "expanded": lambda x: x[:1].expand(4, -1, -1, -1),
}


def _sliced_channels_last(x: Tensor) -> Tensor:
    return x[..., :9].permute(0, 3, 1, 2)


class InterpolationTests:
    """Fill in `name`, `mode` of F.interpolate, `matrix(out, size)`, `few`, and a fixture `pair` of sizes."""

    name: str
    mode: str
    matrix: Callable[[int, int], Tensor]
    few: tuple[tuple[Size, Size], ...]  # pairs for the tests that do not need all

    def run(self, x: Tensor, size: Any) -> Tensor:
        return getattr(ops, self.name)(x, size)

    def exact(self, x: Tensor, size: Size) -> Tensor:
        matrix = type(self).matrix
        return oracle.resampled(x, matrix(size[0], x.shape[2]), matrix(size[1], x.shape[3]))

    def exact_backward(self, grad: Tensor, size: Size) -> Tensor:
        matrix = type(self).matrix
        return oracle.resampled(grad, matrix(grad.shape[2], size[0]).T, matrix(grad.shape[3], size[1]).T)

    def test_forward_and_backward_against_float64(self, either_backend: str, pair: tuple[Size, Size]) -> None:
        source, target = pair
        x = torch.randn(2, 3, *source, requires_grad=True)
        y = self.run(x, target)
        assert y.shape == (2, 3, *target)
        oracle.assert_equal_up_to_rounding(y.detach(), self.exact(x.detach(), target))
        grad = torch.randn_like(y)
        (grad_in,) = torch.autograd.grad(y, x, grad)
        oracle.assert_equal_up_to_rounding(grad_in, self.exact_backward(grad, source))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_low_precision(self, either_backend: str, dtype: torch.dtype) -> None:
        for source, target in self.few:
            x = torch.randn(2, 5, *source).to(dtype).requires_grad_()
            y, expected = self.run(x, target), F.interpolate(x, size=target, mode=self.mode)
            oracle.assert_as_good_as_torch(y.detach(), expected.detach(), self.exact(x.detach(), target))
            grad = torch.randn(y.shape).to(dtype)
            (mine,), (torchs,) = torch.autograd.grad(y, x, grad), torch.autograd.grad(expected, x, grad)
            oracle.assert_as_good_as_torch(mine, torchs, self.exact_backward(grad, source))

    @pytest.mark.parametrize("view", VIEWS)
    def test_strided_views(self, either_backend: str, view: str) -> None:
        x = VIEWS[view](torch.randn(3, 6, 8, 10))
        for target in ((5, 2), (9, 13)):
            y = self.run(x, target)
            layout = torch.channels_last if view == "channels last" else torch.contiguous_format
            assert y.is_contiguous(memory_format=layout)
            oracle.assert_equal_up_to_rounding(y, self.exact(x, target))

    def test_strided_gradient(self, either_backend: str) -> None:
        for source, target in self.few:
            x = torch.randn(2, 3, *source, requires_grad=True)
            channels_last = torch.randn(2, *target, 3).permute(0, 3, 1, 2)
            for grad in (
                channels_last,
                torch.ones(()).expand(2, 3, *target),
            ):  # the second: the gradient of a sum
                (mine,) = torch.autograd.grad(self.run(x, target), x, grad)
                oracle.assert_equal_up_to_rounding(mine, self.exact_backward(grad, source))

    def test_nothing_in_nothing_out(self, either_backend: str) -> None:
        x = torch.randn(0, 3, 4, 4, requires_grad=True)
        y = self.run(x, (3, 5))
        assert y.shape == (0, 3, 3, 5)
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert grad.shape == x.shape

    def test_a_side_means_a_square(self, either_backend: str) -> None:
        x = torch.randn(1, 2, 6, 6)
        assert torch.equal(self.run(x, 4), self.run(x, (4, 4)))

    def test_thread_count_changes_nothing(self) -> None:
        source, target = self.few[0]
        x = torch.randn(8, 32, *source)
        results = []
        for count in (1, 2, 3):
            with threads(count):
                results.append(self.run(x, target))
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])

    def test_gradients(self, either_backend: str) -> None:
        for source, target in self.few[1:]:
            x = torch.randn(1, 2, *source, dtype=torch.float64, requires_grad=True)
            assert torch.autograd.gradcheck(lambda x, target=target: self.run(x, target), [x])

    def test_gradients_of_gradients(self, either_backend: str) -> None:
        for source, target in self.few:
            x = torch.rand(1, 2, *source, dtype=torch.float64, requires_grad=True)
            assert torch.autograd.gradgradcheck(lambda x, target=target: self.run(x, target).square(), (x,))

    @pytest.mark.parametrize("view", [*VIEWS, "contiguous", "sliced channels last"])
    def test_registration(self, view: str) -> None:
        views = {**VIEWS, "contiguous": lambda x: x, "sliced channels last": _sliced_channels_last}
        x = views[view](torch.randn(3, 6, 8, 10)).requires_grad_()
        for name, (h, w) in ((self.name, (5, 3)), (f"{self.name}_backward", (11, 12))):
            torch.library.opcheck(getattr(torch.ops.var_ext, name).default, (x, h, w))

    @pytest.mark.parametrize("view", VIEWS)
    def test_layouts_are_those_of_torch(self, either_backend: str, view: str) -> None:
        for x in (VIEWS[view](torch.randn(3, 6, 8, 10)), _sliced_channels_last(torch.randn(3, 6, 8, 10))):
            assert self.run(x, (5, 3)).stride() == F.interpolate(x, size=(5, 3), mode=self.mode).stride()

    def test_the_kernel_runs_when_the_backend_is_native(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = []
        for name in (self.name, f"{self.name}_backward"):
            kernel = getattr(var_ext._C, name)
            monkeypatch.setattr(var_ext._C, name, lambda *a, n=name, k=kernel: (calls.append(n), k(*a)))
        x = torch.randn(1, 1, *self.few[-1][0], requires_grad=True)
        for choice in backend.CHOICES:
            with backend.force(choice):
                self.run(x, self.few[-1][1]).sum().backward()
            assert calls == [self.name, f"{self.name}_backward"], choice

    @pytest.mark.parametrize(
        ("x", "size", "error", "message"),
        [
            (torch.zeros(3, 4, 4), 2, ValueError, r"x must have shape \(B, C, H, W\).*got \(3, 4, 4\)"),
            (
                torch.zeros(1, 1, 0, 4),
                2,
                ValueError,
                r"x must have H and W of at least 1, got \(1, 1, 0, 4\)",
            ),
            (torch.zeros(1, 1, 4, 4), 0, ValueError, r"size must be a side or \(h, w\).*got 0"),
            (torch.zeros(1, 1, 4, 4), (2, -1), ValueError, r"size must be a side or \(h, w\).*got \(2, -1\)"),
            (
                torch.zeros(1, 1, 4, 4),
                (2, 2, 2),
                ValueError,
                r"size must be a side or \(h, w\).*got \(2, 2, 2\)",
            ),
            (torch.zeros(1, 1, 4, 4, dtype=torch.int32), 2, TypeError, "x must be float32.*got int32"),
            ("a picture", 2, TypeError, "x must be a tensor.*got str"),
        ],
    )
    def test_bad_input(
        self, either_backend: str, x: Any, size: Any, error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error, match=f"{self.name}: .*{message}"):
            self.run(x, size)
