"""Bits are integers and there is one product: results are equal, not close."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from tests.ops import oracle
from tests.threads import threads
from var_ext import _C, ops, reference, splitmix64
from var_ext.ops._native import view

SHAPES = [
    (5,), (7, 33), (2, 151, 64), (3, 1, 129), (2, 3, 4, 5, 6),
    (3, 5, 7, 6), (2, 8, 4, 4), (1, 160, 3, 5), (2, 1, 5, 3), (2, 6, 1, 1), (1, 3, 40, 33),
    (0, 16), (4, 0), (0, 8, 4, 4), (2, 3, 0, 4), (2, 0, 3, 4),
]  # fmt: skip
FORMATS = (torch.contiguous_format, torch.channels_last)
KEPT = round(0.7 * 2**16)


def layouts(x: Tensor) -> list[Tensor]:
    """x, and channels-last if it may be."""
    return [x.contiguous(memory_format=f) for f in FORMATS] if x.ndim == 4 else [x]


def keys_of(batch: int) -> tuple[Tensor, Tensor]:
    """Row keys, of both signs, and a counter that overflows with some of them."""
    return torch.randint(-(2**63), 2**63 - 1, (batch,)), splitmix64.counter(2**62 + 12345)


def is_kept(key: int, counter: Tensor, number: int, kept: int) -> bool:
    """Whether an element of a row is."""
    word = oracle.splitmix64(key + int(counter[0]) + splitmix64.GOLDEN * (number // 4 + 1))
    return (word >> 16 * (number % 4) & 0xFFFF ^ 2**15) < kept  # as signed numbers


def mask(shape: tuple[int, ...], keys: Tensor, counter: Tensor, kept: int) -> Tensor:
    """Bool of a shape: maps count channels last."""
    batch, *rest = shape
    order = [*rest[1:], rest[0]] if len(shape) == 4 else rest
    rows = [[is_kept(key, counter, i, kept) for i in range(math.prod(rest))] for key in keys.tolist()]
    found = torch.tensor(rows, dtype=torch.bool).view(batch, *order)
    return found.movedim(-1, 1) if len(shape) == 4 else found


def expected(x: Tensor, keys: Tensor, counter: Tensor, kept: int = KEPT) -> Tensor:
    """The product of float32, rounded to the dtype of x."""
    scale = torch.tensor(2**16 / kept, dtype=torch.float32)
    return (x.float() * mask(tuple(x.shape), keys, counter, kept) * scale).to(x.dtype)


def same(result: Tensor, wanted: Tensor) -> bool:
    """Equal, NaN where NaN is."""
    return result.dtype == wanted.dtype and torch.equal(result.nan_to_num(7), wanted.nan_to_num(7))


def check(result: Tensor, x: Tensor, keys: Tensor, counter: Tensor, kept: int = KEPT) -> None:
    assert same(result.cpu(), expected(x, keys, counter, kept))
    memory_format = FORMATS[x.ndim == 4 and not x.is_contiguous()]
    assert result.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", oracle.LOW)
def test_each_element(either_backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    keys, counter = keys_of(shape[0])
    for x in layouts(torch.randn(shape).to(dtype)):
        check(ops.keyed_dropout(x, keys, counter, KEPT), x, keys, counter)


@pytest.mark.parametrize("dtype", oracle.LOW)
def test_each_variant(each_isa: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        keys, counter = keys_of(shape[0])
        for x in layouts(torch.randn(shape).to(dtype)):
            check(ops.keyed_dropout(x, keys, counter, KEPT), x, keys, counter)


@pytest.mark.parametrize("kept", [1, 2**15 - 1, 2**15, 2**16 - 1])
def test_thresholds(either_backend: str, kept: int) -> None:
    x, (keys, counter) = torch.randn(3, 4000), keys_of(3)
    check(ops.keyed_dropout(x, keys, counter, kept), x, keys, counter, kept)


@pytest.mark.parametrize("shape", [(2, 32, 181, 256), (2, 6, 401, 250), (1, 2**21 + 3), (300, 40)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_chunks(each_isa: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Threads share rows, large results go past the caches, and maps end within a chunk."""
    keys, counter = keys_of(shape[0])
    for x in layouts(torch.randn(shape).to(dtype)):
        wanted = reference.keyed_dropout(x, keys, counter, KEPT)
        for count in (1, 2):
            with threads(count):
                assert torch.equal(ops.keyed_dropout(x, keys, counter, KEPT), wanted)


@pytest.mark.parametrize("dtype", oracle.LOW)
def test_special_values(each_isa: str, dtype: torch.dtype) -> None:
    """A dropped NaN or infinity is NaN, as of a product; subnormal numbers and signs of zero stay."""
    tiny = torch.finfo(dtype).smallest_normal / 4
    x = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, tiny, -tiny, 1.0]).to(dtype).repeat(2, 30)
    keys, counter = keys_of(2)
    for result in (
        ops.keyed_dropout(x, keys, counter, KEPT),
        reference.keyed_dropout(x, keys, counter, KEPT),
    ):
        check(result, x, keys, counter)
        dropped = ~mask((2, 240), keys, counter, KEPT)
        assert result[dropped & ~x.isfinite()].isnan().all()
        assert torch.equal(result.signbit()[~result.isnan()], x.signbit()[~result.isnan()])


def test_any_strides(each_isa: str) -> None:
    keys, counter = torch.arange(12)[::2], splitmix64.counter(3)
    wide = torch.randn(6, 10, 8, 9)
    for x in (wide[:, ::2], wide.transpose(1, 3), wide[:1].expand(6, 10, 8, 9), wide[..., 0].transpose(1, 2)):
        result = ops.keyed_dropout(x, keys, counter, KEPT)
        assert result.is_contiguous() and torch.equal(result, expected(x, keys, counter))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_gradient_has_the_mask_of_the_element(either_backend: str, dtype: torch.dtype) -> None:
    """Whatever the memory formats of x and of its gradient."""
    keys, counter = keys_of(2)
    grad = torch.randn(2, 6, 5, 7).to(dtype)
    for x in layouts(torch.randn(2, 6, 5, 7).to(dtype)):
        for given in layouts(grad):
            leaf = x.detach().requires_grad_()
            y = ops.keyed_dropout(leaf, keys, counter, KEPT)
            (found,) = torch.autograd.grad(y, leaf, given)
            assert torch.equal(found, ops.keyed_dropout(grad, keys, counter, KEPT))
            assert torch.equal(found == 0, y == 0)


def test_the_backward_pass_keeps_no_mask() -> None:
    keys, counter = keys_of(2)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        ops.keyed_dropout(torch.randn(2, 40, requires_grad=True), keys, counter, KEPT)
    assert sorted(t.numel() for t in kept) == [2, 2]


def test_gradients_of_gradients_and_forward_mode(either_backend: str) -> None:
    keys, counter = keys_of(2)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)

    def drop(x: Tensor) -> Tensor:
        return ops.keyed_dropout(x, keys, counter, KEPT)

    assert torch.autograd.gradcheck(drop, (x,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(drop, (x,), check_fwd_over_rev=True)
    x, tangent = x.detach().float(), torch.randn(2, 3, 5)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(drop(forward_ad.make_dual(x, tangent)))
    assert torch.equal(found.primal, drop(x)) and torch.equal(found.tangent, drop(tangent))


def test_checkpointing_draws_the_same(either_backend: str) -> None:
    keys, counter = keys_of(3)
    x = torch.randn(3, 50, requires_grad=True)

    def square(x: Tensor) -> Tensor:
        return ops.keyed_dropout(x, keys, counter, KEPT).square()

    (found,) = torch.autograd.grad(checkpoint(square, x, use_reentrant=False).sum(), x)
    assert torch.equal(found, torch.autograd.grad(square(x).sum(), x)[0])


def test_autocast_leaves_the_dtype(either_backend: str) -> None:
    keys, counter = keys_of(2)
    for dtype in oracle.LOW:
        x = torch.randn(2, 9).to(dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            check(ops.keyed_dropout(x, keys, counter, KEPT), x, keys, counter)


def test_transforms_are_torchs(either_backend: str) -> None:
    """Forward mode and vmap, here over copies of a batch that share the keys of its rows."""
    keys, counter = keys_of(3)
    x, tangent = torch.randn(4, 3, 7), torch.randn(3, 7)

    def drop(x: Tensor) -> Tensor:
        return ops.keyed_dropout(x, keys, counter, KEPT)

    assert torch.equal(torch.func.vmap(drop)(x), torch.stack([drop(one) for one in x]))
    jvp = partial(torch.func.jvp, drop)
    for call in (jvp, torch.compile(jvp, backend="aot_eager", fullgraph=True)):
        value, slope = call((x[0],), (tangent,))
        assert torch.equal(value, drop(x[0])) and torch.equal(slope, drop(tangent))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_registration(dtype: torch.dtype) -> None:
    keys, counter = keys_of(2)
    for shape in ((2, 3, 5), (2, 8, 3, 3)):
        for x in layouts(torch.randn(shape, dtype=dtype)):
            torch.library.opcheck(torch.ops.var_ext.keyed_dropout, (x.requires_grad_(), keys, counter, KEPT))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(x=torch.zeros(())), ValueError, r"x must have shape \(B, ...\), got \(\)"),
        (dict(x=torch.zeros(2, 4).int()), TypeError, "x must be float32.*got int32"),
        (dict(keys=torch.zeros(3).long()), ValueError, r"keys must have shape \(B,\) = \(2\), got \(3,\)"),
        (dict(keys=torch.zeros(2)), TypeError, "keys must be int64, got float32"),
        (dict(keys=[1, 2]), TypeError, "keys must be a tensor.*got list"),
        (dict(counter=torch.tensor(0)), ValueError, r"counter must have shape \(2,\) = \(2\), got \(\)"),
        (dict(counter=torch.zeros(2)), TypeError, "counter must be int64, got float32"),
        (dict(counter=7), TypeError, "counter must be a tensor.*got int"),
        (dict(counter=splitmix64.counter(0, "meta")), ValueError, "one device, got.*counter on meta"),
        (dict(kept=0), ValueError, r"kept must be in 1..65535, of 2\^16, got 0"),
        (dict(kept=2**16), ValueError, "kept must be in 1..65535.*got 65536"),
    ],
)
def test_bad_input(
    either_backend: str, change: dict[str, object], error: type[Exception], message: str
) -> None:
    given = dict(x=torch.zeros(2, 4), keys=torch.zeros(2).long(), counter=splitmix64.counter(0), kept=KEPT)
    with pytest.raises(error, match=f"keyed_dropout: .*{message}"):
        ops.keyed_dropout(**{**given, **change})  # type: ignore[arg-type]


LAST = torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.zeros(2, 4).double()), "x must be one of float32, .*, got float64"),
        (dict(x=torch.zeros(())), r"x must have shape \(B, ...\), got \(\)"),
        (dict(x=torch.zeros(2, 8)[:, ::2]), "x must be contiguous"),
        (dict(out=torch.zeros(2, 5)), r"out must have the shape of x, \(2, 4\), got \(2, 5\)"),
        (dict(out=torch.zeros(2, 4).half()), "out must be float32, got float16"),
        (dict(out=torch.zeros(2, 8)[:, ::2]), "out must be contiguous"),
        (dict(x=LAST, out=torch.zeros(2, 3, 4, 5)), "out must be channels-last, as x is"),
        (dict(x=torch.zeros(2, 3, 4, 5), out=LAST), "out must be contiguous, as x is"),
        (dict(x=torch.zeros(2, 3, 4, 10)[..., ::2], out=LAST), "x must be contiguous or channels-last"),
        (dict(keys=torch.zeros(3).long()), r"keys must have shape \(2,\), got \(3,\)"),
        (dict(keys=torch.zeros(2)), "keys must be int64, got float32"),
        (dict(keys=torch.zeros(4).long()[::2]), "keys must be contiguous"),
        (dict(counter=torch.tensor(0)), r"counter must have shape \(2,\), got \(\)"),
        (dict(counter=torch.zeros(2)), "counter must be int64, got float32"),
        (dict(counter=torch.zeros(4).long()[::2]), "counter must be contiguous"),
        (dict(kept=0), r"kept must be in 1..65535, of 2\^16, got 0"),
        (dict(kept=2**16), "kept must be in 1..65535.*got 65536"),
    ],
)
def test_kernel_refuses(change: dict[str, object], message: str) -> None:
    given = dict(
        x=torch.zeros(2, 4), keys=torch.zeros(2).long(), counter=splitmix64.counter(0), out=torch.zeros(2, 4)
    )
    *tensors, kept = {**given, "kept": KEPT, **change}.values()
    with pytest.raises(ValueError, match=f"^keyed_dropout: {message}"):
        _C.keyed_dropout(*map(view, tensors), kept)
