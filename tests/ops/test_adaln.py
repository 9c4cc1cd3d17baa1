from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.ops import oracle
from tests.threads import threads
from var_ext import _C, ops
from var_ext.ops._native import view

SHAPES = [(1, 1, 8), (2, 7, 64), (1, 129, 33), (3, 151, 192), (0, 7, 16), (2, 0, 16)]


def exact(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    x, scale, shift = x.double(), scale.double()[:, None], shift.double()[:, None]
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred / (centred.square().mean(dim=-1, keepdim=True) + eps).sqrt() * (1 + scale) + shift


def inputs(shape: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    batch, _, channels = shape
    x, branch = torch.randn(2, *shape, dtype=dtype)
    scale, shift, gate = torch.randn(3, batch, channels, dtype=dtype)
    return dict(x=x, scale=scale, shift=shift, branch=branch, gate=gate)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", oracle.LOW)
def test_against_float64(either_backend: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    given = inputs(shape, dtype)
    x, scale, shift = given["x"], given["scale"], given["shift"]
    torchs = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    oracle.assert_as_good_as_torch(ops.adaln(x, scale, shift), torchs, exact(x, scale, shift))


@pytest.mark.parametrize("dtype", oracle.LOW)
def test_branch_is_added_first(either_backend: str, dtype: torch.dtype) -> None:
    given = inputs((2, 7, 64), dtype)
    x, scale, shift, branch, gate = given.values()
    summed = x.double() + gate.double()[:, None] * branch.double()
    torch_sum = x + gate[:, None] * branch
    torchs = F.layer_norm(torch_sum, (64,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    new_x, y = ops.adaln(**given)
    oracle.assert_as_good_as_torch(new_x, torch_sum, summed)
    oracle.assert_as_good_as_torch(y, torchs, exact(summed, scale, shift))


def test_strided_arguments(either_backend: str) -> None:
    x = torch.randn(7, 2, 48)[..., ::2].transpose(0, 1)  # (2, 7, 24)
    scale, shift = torch.randn(2, 6, 24)[:, 1].chunk(2)  # (1, 24) views
    scale, shift = scale.expand(2, -1), shift.expand(2, -1)
    result = ops.adaln(x, scale, shift)
    oracle.assert_equal_up_to_rounding(result, exact(x, scale, shift))


def test_a_constant_row_is_only_shifted(either_backend: str) -> None:
    shift = torch.randn(1, 16)
    result = ops.adaln(torch.full((1, 3, 16), 5.0), torch.randn(1, 16), shift)
    torch.testing.assert_close(
        result, shift[:, None].expand(1, 3, 16)
    )  # the variance is 0: eps alone keeps it finite


def test_eps(either_backend: str) -> None:
    given = inputs((1, 2, 8))
    x, scale, shift = given["x"] * 1e-3, given["scale"], given["shift"]
    oracle.assert_equal_up_to_rounding(ops.adaln(x, scale, shift, eps=0.1), exact(x, scale, shift, eps=0.1))


def test_inputs_are_left_alone(either_backend: str) -> None:
    given = inputs((2, 3, 8))
    before = {name: tensor.clone() for name, tensor in given.items()}
    ops.adaln(**given)
    assert all(torch.equal(given[name], before[name]) for name in given)


def test_gradients(either_backend: str) -> None:
    given = [t.requires_grad_() for t in inputs((2, 3, 5), torch.float64).values()]
    assert torch.autograd.gradcheck(ops.adaln, given[:3])
    assert torch.autograd.gradcheck(
        lambda x, scale, shift, branch, gate: ops.adaln(x, scale, shift, branch=branch, gate=gate), given
    )


def torchs(x: Tensor, scale: Tensor, shift: Tensor, branch: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """As a user would write it; also the truth, in float64."""
    h = x + gate[:, None] * branch
    return h, F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def native(x: Tensor, scale: Tensor, shift: Tensor, branch: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    return ops.adaln(x, scale, shift, branch=branch, gate=gate)


# C around multiples of every vector, L around the rows that are taken together and the chunks of a sum
NATIVE = [
    (1, 1, 1),
    (2, 3, 5),
    (1, 31, 16),
    (3, 2, 17),
    (2, 33, 72),
    (1, 65, 31),
    (1, 4, 4097),
    (2, 0, 8),
    (0, 3, 8),
]


@pytest.mark.parametrize("shape", NATIVE)
@pytest.mark.parametrize("dtype", oracle.LOW)
def test_kernels(each_isa: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Forward and backward of each variant, with and without the residual, as near to float64 as torch is."""
    given = list(inputs(shape, dtype).values())
    grads = [torch.randn(shape).to(dtype) for _ in range(2)]
    wide = [t.double() for t in given]
    for mine, torch_result, truth in zip(native(*given), torchs(*given), torchs(*wide), strict=True):
        oracle.assert_as_good_as_torch(mine, torch_result, truth)
    pairs = [
        (native, torchs, given, grads),
        (ops.adaln, lambda x, *rest: torchs(x, *rest, x, rest[0] * 0)[1], given[:3], grads[1:]),
    ]
    for function, plain, args, grad in pairs:
        results = oracle.gradients(function, args, grad)
        torch_results = oracle.gradients(plain, args, grad)
        truths = oracle.gradients(plain, [t.double() for t in args], grad)
        for mine, torch_result, truth in zip(results, torch_results, truths, strict=True):
            # a row of one channel has a gradient of zero, up to the rounding of 1 / sqrt(eps) = 1000
            if shape[2] > 1:
                oracle.assert_as_good_as_torch(mine, torch_result, truth)


LAYOUTS = {
    "unaligned": oracle.unaligned,
    "tokens first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "padded rows": lambda x: F.pad(x, (3, 2))[..., 3:-2],
    "one of six": lambda x: torch.stack([x] * 6, dim=1)[:, 4],
    "strided channels": lambda x: torch.stack([x, x], dim=-1)[..., 0],
    "expanded": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(each_isa: str, layout: str) -> None:
    """What a layout holds decides the result, to the bit; gradients too."""
    given = [LAYOUTS[layout](t) for t in inputs((2, 5, 40)).values()]
    plain = [t.contiguous() for t in given]
    for mine, wanted in zip(native(*given), native(*plain), strict=True):
        assert mine.is_contiguous()
        assert torch.equal(mine, wanted)
    grads = [LAYOUTS[layout](torch.randn(2, 5, 40)) for _ in range(2)]
    leaves = [t.requires_grad_() for t in given]
    results = torch.autograd.grad(native(*leaves), leaves, grads)
    for mine, wanted in zip(results, oracle.gradients(native, plain, grads), strict=True):
        assert torch.equal(mine, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_outputs_are_the_same(each_isa: str, dtype: torch.dtype) -> None:
    """Outputs that are written past the caches equal those of one sample at a time, which are not."""
    given = list(inputs((5, 120, 2048 if dtype == torch.float32 else 4096), dtype).values())
    grads = [torch.randn(given[0].shape).to(dtype) for _ in range(2)]
    whole = [*native(*given), *oracle.gradients(native, given, grads)]
    for i in range(5):
        one, grad = [t[i : i + 1] for t in given], [g[i : i + 1] for g in grads]
        for mine, part in zip(whole, [*native(*one), *oracle.gradients(native, one, grad)], strict=True):
            assert torch.equal(mine[i : i + 1], part)


def test_a_large_mean_costs_no_precision(each_isa: str) -> None:
    x, scale, shift = 1e4 + torch.randn(1, 4, 512), torch.zeros(1, 512), torch.zeros(1, 512)
    # 1e4 holds eps * 1e4 = 1e-3 of rounding in x itself, which is given; the mean's own rounding is as large
    torch.testing.assert_close(ops.adaln(x, scale, shift).double(), exact(x, scale, shift), rtol=0, atol=2e-3)


def test_nan_and_infinity_stay_in_their_row(each_isa: str) -> None:
    given = inputs((1, 5, 40))
    given["x"][0, 1, 3], given["x"][0, 2, 39] = float("nan"), float("inf")
    for mine, wanted in zip(native(*given.values()), torchs(*given.values()), strict=True):
        torch.testing.assert_close(mine, wanted, equal_nan=True, rtol=1e-5, atol=1e-5)


def test_thread_count_changes_no_bit(each_isa: str) -> None:
    given = list(inputs((2, 200, 516)).values())
    grads = list(torch.randn(2, 2, 200, 516))
    runs = []
    for count in (1, 2, 3):
        with threads(count):
            runs.append([*native(*given), *oracle.gradients(native, given, grads)])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def test_the_kernel_checks_its_tensors() -> None:
    x, vector = torch.zeros(2, 3, 8), torch.zeros(2, 8)
    plain = dict(x=x, scale=vector, shift=vector, branch=None, gate=None, h=None, y=x.clone())
    for change, message in [
        (dict(scale=torch.zeros(2, 9)), r"scale must have shape \(2, 8\), got \(2, 9\)"),
        (dict(x=x.double()), "x must be one of float32.*got float64"),
        (dict(y=x.bfloat16()), "y must be float32, got bfloat16"),
        (dict(y=torch.zeros(1, 3, 8).expand(2, -1, -1)), "y must not overlap itself"),
        (dict(x=torch.zeros(2, 3, 16)[..., ::2]), "x must have contiguous channels, got stride 2"),
        (dict(branch=x), "must be given together"),
    ]:
        given = {**plain, **change}
        views = [None if t is None else view(t) for t in given.values()]
        with pytest.raises(ValueError, match=f"adaln: .*{message}"):
            _C.adaln(*views, 1e-6)  # type: ignore[arg-type]


def test_registration() -> None:
    x, scale, shift, branch, gate = (t.requires_grad_() for t in inputs((2, 3, 8)).values())
    torch.library.opcheck(torch.ops.var_ext.adaln, (x, scale, shift, 1e-6))
    torch.library.opcheck(torch.ops.var_ext.adaln_residual, (x, scale, shift, branch, gate, 1e-6))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(x=torch.zeros(7, 8)), ValueError, r"x must have shape \(B, L, C\).*got \(7, 8\)"),
        (
            dict(scale=torch.zeros(2, 9)),
            ValueError,
            r"scale must have shape \(B, C\) = \(2, 8\), got \(2, 9\)",
        ),
        (dict(shift=torch.zeros(3, 8)), ValueError, r"shift must have shape.*got \(3, 8\)"),
        (dict(branch=torch.zeros(2, 4, 8)), ValueError, r"branch must have shape.*got \(2, 4, 8\)"),
        (dict(gate=torch.zeros(8)), ValueError, r"gate must have shape.*got \(8,\)"),
        (dict(gate=None), ValueError, "branch and gate must be given together, got no gate"),
        (dict(branch=None), ValueError, "branch and gate must be given together, got no branch"),
        (dict(x=torch.zeros(2, 3, 8, dtype=torch.int64)), TypeError, "x must be float32.*got int64"),
        (dict(scale=torch.zeros(2, 8).half()), TypeError, "one dtype, got.*scale float16"),
        (dict(gate=torch.zeros(2, 8).double()), TypeError, "one dtype, got.*gate float64"),
        (dict(shift=torch.zeros(2, 8, device="meta")), ValueError, "one device, got.*shift on meta"),
        (dict(x=[1.0]), TypeError, "x must be a tensor.*got list"),
    ],
)
def test_bad_input(
    either_backend: str, change: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"adaln: .*{message}"):
        ops.adaln(**{**inputs((2, 3, 8)), **change})  # type: ignore[arg-type]
