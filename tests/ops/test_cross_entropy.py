from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.ops import oracle
from tests.threads import threads
from var_ext import _C, backend, ops
from var_ext.ops._native import view

SHAPES = [(1, 1), (7, 2), (3, 5, 33), (4, 129), (2, 3, 1, 64), (0, 7), (2, 4096), (5, 4099)]
SMOOTHINGS = [0.0, 0.1, 1.0]


def given(shape: tuple[int, ...], spread: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, targets, and the gradient of the losses."""
    *rows, classes = shape
    return spread * torch.randn(shape), torch.randint(classes, rows), torch.randn(rows)


def both(logits: Tensor, targets: Tensor, grad: Tensor, smoothing: float) -> list[Tensor]:
    """Losses and the gradient of the logits."""
    leaf = logits.detach().requires_grad_()
    losses = ops.cross_entropy(leaf, targets, smoothing=smoothing)
    return [losses.detach(), *torch.autograd.grad(losses, leaf, grad)]


def exact(logits: Tensor, targets: Tensor, grad: Tensor, smoothing: float) -> list[Tensor]:
    """From the definition, in float64."""
    logits, grad = logits.double(), grad.double()
    weights = logits.exp() / logits.exp().sum(-1, keepdim=True)
    wanted = (1 - smoothing) * F.one_hot(targets, logits.shape[-1]).double() + smoothing / logits.shape[-1]
    return [-(wanted * weights.log()).sum(-1), grad[..., None] * (weights - wanted)]


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(each_isa: str, shape: tuple[int, ...], smoothing: float) -> None:
    tensors = given(shape)
    for found, right in zip(both(*tensors, smoothing), exact(*tensors, smoothing), strict=True):
        assert found.dtype == torch.float32 and found.is_contiguous()
        oracle.assert_equal_up_to_rounding(found, right)


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_as_good_as_torch(either_backend: str, smoothing: float) -> None:
    logits, targets, grad = given((40, 4096), 8.0)
    leaf = logits.clone().requires_grad_()
    losses = F.cross_entropy(leaf, targets, reduction="none", label_smoothing=smoothing)
    torchs = [losses.detach(), *torch.autograd.grad(losses, leaf, grad)]
    rights = exact(logits, targets, grad, smoothing)
    for found, torch_found, right in zip(both(logits, targets, grad, smoothing), torchs, rights, strict=True):
        oracle.assert_as_good_as_torch(found, torch_found, right)


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_extreme_logits(each_isa: str, smoothing: float) -> None:
    """Far from overflow, masked codes, and what is not a number, as in torch."""
    inf, nan = math.inf, math.nan
    rows = [
        [1e30, -1e30, 0.0],
        [-1e4, -1e4, -1e4],
        [0.0, -inf, 5.0],
        [nan, 0.0, 1.0],
        [-inf] * 3,
        [inf, 0.0, 1.0],
    ]
    logits = torch.tensor([[*row, *row[:1] * 17] for row in rows])
    for target in range(3):
        targets = torch.full((len(rows),), target)
        leaf = logits.clone().requires_grad_()
        wanted = F.cross_entropy(leaf, targets, reduction="none", label_smoothing=smoothing)
        (slope,) = torch.autograd.grad(wanted.sum(), leaf)
        losses, found = both(logits, targets, torch.ones(len(rows)), smoothing)
        torch.testing.assert_close(losses, wanted.detach(), equal_nan=True)
        finite = wanted.isfinite()
        torch.testing.assert_close(found[finite], slope[finite], rtol=1e-5, atol=1e-6)
        assert found[3:].isnan().any(-1).all()  # no softmax there


def test_any_strides(each_isa: str) -> None:
    wide, targets, grad = given((6, 10, 20))
    parts = wide.transpose(0, 1)[:, ::2, ::3], targets.t()[:, ::2] % 7, grad[:1, :1].expand(10, 3)
    for found, right in zip(both(*parts, 0.1), exact(*parts, 0.1), strict=True):
        oracle.assert_equal_up_to_rounding(found, right)


def test_thread_count_changes_nothing() -> None:
    tensors = given((301, 4099))
    runs = []
    for count in (1, 2, 3):
        with threads(count):
            runs.append(both(*tensors, 0.1))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


def test_gradients(either_backend: str) -> None:
    logits, targets, _ = given((2, 3, 5))
    for smoothing in SMOOTHINGS:
        assert torch.autograd.gradcheck(
            lambda x, s=smoothing: ops.cross_entropy(x, targets, smoothing=s),
            logits.double().requires_grad_(),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_registration(dtype: torch.dtype) -> None:
    logits, targets, grad = given((2, 3, 5))
    logits, grad = logits.to(dtype), grad.to(dtype)
    torch.library.opcheck(torch.ops.var_ext.cross_entropy, (logits.clone().requires_grad_(), targets, 0.1))
    _, stats = torch.ops.var_ext.cross_entropy(logits, targets, 0.1)
    torch.library.opcheck(torch.ops.var_ext.cross_entropy_backward, (grad, logits, targets, stats, 0.1))


def test_without_a_kernel_it_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient too: that of the registered op's fallback would read the logits several times."""
    monkeypatch.setattr(backend, "use_native", lambda op, device: False)
    logits, targets, _ = given((2, 3, 5))
    node: Any = ops.cross_entropy(logits.requires_grad_(), targets).grad_fn
    assert "cross_entropy" not in node.name()


GOOD: dict[str, Any] = dict(logits=torch.zeros(2, 4), targets=torch.tensor([0, 3]))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(logits=torch.zeros(2, 4).half()), TypeError, "logits must be float32 or float64, got float16"),
        (dict(logits=torch.zeros(())), ValueError, r"logits must have shape \(..., V\).*got \(\)"),
        (dict(logits=torch.zeros(3, 4)), ValueError, r"targets must have shape \(...\) = \(3\), got \(2,\)"),
        (dict(targets=torch.tensor([0, 4])), ValueError, r"targets must be in 0..V-1 = 0..3, got 0..4"),
        (dict(targets=torch.tensor([-100, 3])), ValueError, "targets must be in .*, got -100..3"),
        (dict(targets=torch.zeros(2)), TypeError, "targets must be int64, got float32"),
        (dict(targets=torch.zeros(2, device="meta").long()), ValueError, "one device, got.*targets on meta"),
        (dict(smoothing=1.5), ValueError, r"smoothing must be in \[0, 1\], got 1.5"),
    ],
)
def test_bad_input(either_backend: str, change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"cross_entropy: .*{message}"):
        ops.cross_entropy(**{**GOOD, **change})


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        (
            "logits",
            torch.zeros(2, 4).bfloat16(),
            "logits must be one of float32, got bfloat16|logits must be float32",
        ),
        ("logits", torch.zeros(2, 0), r"logits must have shape \(..., V\), V at least 1, got \(2, 0\)"),
        ("logits", torch.zeros(4, 2).t(), "logits must be contiguous"),
        ("targets", torch.zeros(3).long(), "targets must have the shape of logits without its last axis"),
        ("losses", torch.zeros(2, 1), "losses must have the shape of logits without its last axis"),
        ("stats", torch.zeros(2), r"stats must have shape .*got \(2,\)"),
    ],
)
def test_kernel_refuses(name: str, wrong: Tensor, message: str) -> None:
    rows = dict(losses=torch.zeros(2), stats=torch.zeros(2, 2))
    with pytest.raises(ValueError, match=f"^cross_entropy: {message}"):
        _C.cross_entropy(*(view(t) for t in {**GOOD, **rows, name: wrong}.values()), 0.0)


def test_backward_kernel_refuses() -> None:
    given = [view(t) for t in (torch.zeros(2), *GOOD.values(), torch.zeros(2, 2))]
    with pytest.raises(
        ValueError, match=r"^cross_entropy_backward: grad_logits must have the shape of logits"
    ):
        _C.cross_entropy_backward(*given, view(torch.zeros(2, 5)), 0.0)


@pytest.mark.parametrize("wrong", [-100, -8, 4, 10**6])
def test_a_compiled_pass_refuses_targets_out_of_range(wrong: int) -> None:
    """They are places in memory: before the mend a compiled pass read and wrote beside the logits."""
    logits, targets = torch.zeros(3, 4, requires_grad=True), torch.tensor([0, wrong, 1])
    compiled = torch.compile(lambda x, y: ops.cross_entropy(x, y).sum(), backend="aot_eager", fullgraph=True)
    with pytest.raises(ValueError, match=r"targets must be in 0..V-1 = 0..3"):
        compiled(logits, targets)
    with pytest.raises(ValueError, match=r"targets must be in 0..V-1 = 0..3"):
        torch.ops.var_ext.cross_entropy.default(logits, targets, 0.0)


def test_under_torchs_transforms_it_is_torchs() -> None:
    logits, targets = torch.randn(3, 5), torch.tensor([0, 4, 1])
    wanted = torch.func.grad(lambda x: F.cross_entropy(x, targets))(logits)
    found = torch.func.grad(lambda x: ops.cross_entropy(x, targets).mean())(logits)
    torch.testing.assert_close(found, wanted)
