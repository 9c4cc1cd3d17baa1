from __future__ import annotations

import sys
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import var_ext
from tests.ops import oracle
from tests.threads import threads
from var_ext import _C, ScaleSchedule, backend, ops, reference
from var_ext.ops._native import view

SCHEDULES = [
    (1,),
    (4,),
    (1, 2),
    (1, 1, 1, 2),
    (2, 5, 10),
    (1, 2, 3, 4, 11),
]  # one scale, two, 7, 129 and 151 tokens


class Given(NamedTuple):
    features: Tensor
    codebook: Tensor
    phi_weight: Tensor
    phi_bias: Tensor
    phi_index: list[int]
    schedule: ScaleSchedule


def inputs(
    sides: tuple[int, ...], *, batch: int = 2, channels: int = 4, codes: int = 37, phis: int = 2
) -> Given:
    schedule = ScaleSchedule(sides)
    return Given(
        torch.randn(batch, channels, sides[-1], sides[-1]),
        torch.randn(codes, channels),
        torch.randn(phis, channels, channels, 3, 3) * 0.2,
        torch.randn(phis, channels) * 0.2,
        [k * phis // len(schedule) for k in range(len(schedule))],
        schedule,
    )


def exact(
    given: Given, ratio: float = 0.5, cosine: bool = False, tokens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The loop of Algorithm 1 in float64: tokens (B, L) and f_hat after each scale (K, B, C, P, P).

    With `tokens`, those are taken instead of searched: then it is a smooth function of codebook and phi.
    """
    features, codebook = given.features.detach().double(), given.codebook.double()
    side, batch, channels = given.schedule.side, *features.shape[:2]
    rest, f_hat = features, torch.zeros_like(features)
    found, scales = [], []
    for k, p in enumerate(given.schedule.patch_nums):
        down, up = oracle.area_matrix(p, side), oracle.bicubic_matrix(side, p)
        z = oracle.resampled(rest, down, down).permute(0, 2, 3, 1).reshape(-1, channels)  # (B p p, C)
        if cosine:
            score = -(z @ codebook.T) / (z.norm(dim=-1, keepdim=True) * codebook.norm(dim=-1))
        else:
            score = (z[:, None] - codebook[None]).square().sum(dim=-1)  # (B p p, V)
        index = score.argmin(dim=-1) if tokens is None else tokens[:, given.schedule.slices[k]].reshape(-1)
        codes = codebook[index].view(batch, p, p, channels).permute(0, 3, 1, 2)  # (B, C, p, p)
        n = given.phi_index[k]
        h = oracle.phi(oracle.resampled(codes, up, up), given.phi_weight[n], given.phi_bias[n], ratio)
        f_hat, rest = f_hat + h, rest - h.detach()
        found.append(index.view(batch, p * p))
        scales.append(f_hat)
    return torch.cat(found, dim=1), torch.stack(scales)


@pytest.mark.parametrize("sides", SCHEDULES)
@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("ratio", [0.5, 0.25])
def test_against_float64(either_backend: str, sides: tuple[int, ...], cosine: bool, ratio: float) -> None:
    given = inputs(sides)
    tokens, f_hat, scales = ops.residual_quantize(*given, ratio=ratio, cosine=cosine, per_scale=True)
    true_tokens, true_scales = exact(given, ratio, cosine)
    # few codes in few dimensions: with these seeds no two are equally near up to rounding
    assert torch.equal(tokens, true_tokens)
    assert scales is not None
    oracle.assert_equal_up_to_rounding(scales, true_scales)
    oracle.assert_equal_up_to_rounding(f_hat, true_scales[-1])


def test_per_scale_is_only_on_request(either_backend: str) -> None:
    given = inputs((1, 2, 3))
    tokens, f_hat, nothing = ops.residual_quantize(*given)
    assert nothing is None
    again, same, scales = ops.residual_quantize(*given, per_scale=True)
    assert torch.equal(tokens, again)
    assert torch.equal(f_hat, same)
    assert torch.equal(scales[-1], f_hat)


@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches(either_backend: str, batch: int) -> None:
    tokens, f_hat, scales = ops.residual_quantize(*inputs((1, 2, 3), batch=batch), per_scale=True)
    assert tokens.shape == (batch, 14)
    assert tokens.dtype == torch.int64
    assert f_hat.shape == (batch, 4, 3, 3)
    assert scales.shape == (3, batch, 4, 3, 3)


def test_an_image_does_not_depend_on_its_batch(either_backend: str) -> None:
    given = inputs((1, 2, 5), batch=5)
    together = ops.residual_quantize(*given)[0]
    for i in range(5):
        assert torch.equal(
            ops.residual_quantize(given.features[i : i + 1], *given[1:])[0], together[i : i + 1]
        )


def test_strided_features(either_backend: str) -> None:
    given = inputs((1, 2, 4))
    views = given._replace(
        features=torch.randn(2, 5, 4, 4).permute(0, 2, 3, 1)[..., :4],
        codebook=torch.randn(4, 37).T,
        phi_weight=torch.randn(4, 4, 4, 3, 3)[::2],
    )
    tokens, f_hat, _ = ops.residual_quantize(*views)
    true_tokens, true_scales = exact(views)
    assert torch.equal(tokens, true_tokens)
    oracle.assert_equal_up_to_rounding(f_hat, true_scales[-1])


def test_f_hat_passes_its_gradient_straight_through(either_backend: str) -> None:
    given = inputs((1, 2, 3))
    features = given.features.requires_grad_()
    codebook, weight = given.codebook.requires_grad_(), given.phi_weight.requires_grad_()
    f_hat = ops.residual_quantize(*given)[1]
    grad = torch.randn_like(f_hat)
    grads = torch.autograd.grad(f_hat, [features, codebook, weight], grad, allow_unused=True)
    assert torch.equal(grads[0], grad)
    assert all(g is None or not g.any() for g in grads[1:])


def test_scales_pass_theirs_to_codebook_and_phi(either_backend: str) -> None:
    given = inputs((1, 2, 3))
    for tensor in given[:4]:
        tensor.requires_grad_()
    tokens, _, scales = ops.residual_quantize(*given, per_scale=True)
    weights = torch.randn(scales.shape)
    mine = torch.autograd.grad((scales * weights).sum(), given[:4], allow_unused=True)
    truths = torch.autograd.grad((exact(given, tokens=tokens)[1] * weights).sum(), given[1:4])
    assert mine[0] is None or not mine[0].any()
    for gradient, truth in zip(mine[1:], truths, strict=True):
        # sums over up to 54 places and 3 scales of terms of order one
        torch.testing.assert_close(gradient, truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("sides", "batch", "channels"), [
    ((1,), 3, 1),
    ((1, 2, 5), 2, 20),
    ((2, 3, 16), 2, 32),
    ((1, 1, 1, 2), 1, 33),
])  # fmt: skip
def test_each_variant(each_isa: str, sides: tuple[int, ...], batch: int, channels: int) -> None:
    given = inputs(sides, batch=batch, channels=channels, codes=151)
    given.phi_weight.mul_(3 * channels**-0.5)
    for tensor in given[1:4]:
        tensor.requires_grad_()
    tokens, f_hat, scales = ops.residual_quantize(*given, per_scale=True)
    true_tokens, true_scales = exact(given)
    assert torch.equal(tokens, true_tokens)
    oracle.assert_equal_up_to_rounding(f_hat, true_scales[-1])
    push = torch.randn(scales.shape)
    mine = torch.autograd.grad(scales, given[1:4], push)
    truths = torch.autograd.grad((true_scales * push).sum(), given[1:4])
    for gradient, truth in zip(mine, truths, strict=True):
        torch.testing.assert_close(gradient, truth, rtol=1e-4, atol=2e-4)


def test_torchs_rounding() -> None:
    """f_hat is the reference's, bit for bit, where torch runs oneDNN's AVX-512 kernels."""
    given = inputs((1, 2, 3, 5, 8, 16), channels=32, codes=151)
    mine, torchs = (m.residual_quantize(*given, per_scale=True) for m in (ops, reference))
    assert torch.equal(mine[0], torchs[0])
    if _C.isa().startswith("avx512") and torch.backends.cpu.get_cpu_capability() == "AVX512":
        assert torch.equal(mine[1], torchs[1])
        assert torch.equal(mine[2], torchs[2])


def test_ties_go_to_the_lowest_index(either_backend: str) -> None:
    given = inputs((1, 2, 5), codes=8)
    once = ops.residual_quantize(*given)[0]
    often = ops.residual_quantize(*given._replace(codebook=given.codebook.repeat(9, 1)))[0]
    assert torch.equal(once, often)


def test_thread_count_changes_nothing() -> None:
    for batch in (1, 3):
        given = inputs((1, 2, 5, 16), batch=batch, channels=32, codes=301)
        for tensor in given[1:4]:
            tensor.requires_grad_()
        results = []
        for count in (1, 2, 3):
            with threads(count):
                tokens, f_hat, scales = ops.residual_quantize(*given, per_scale=True)
                results.append([tokens, f_hat, *torch.autograd.grad(scales.square().sum(), given[1:4])])
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_features_that_are_not_numbers(either_backend: str) -> None:
    given = inputs((1, 3))
    given.features[0, 2, 1, 1] = float("nan")
    given.features[1, 1, 0, 2] = float("inf")
    tokens, f_hat, _ = ops.residual_quantize(*given)
    expected = reference.residual_quantize(*given)
    assert torch.equal(tokens, expected[0])
    assert torch.equal(f_hat.isnan(), expected[1].isnan())


def test_what_needs_no_gradient_has_none(either_backend: str) -> None:
    given = inputs((1, 2, 3))
    given.codebook.requires_grad_()
    tokens, f_hat, scales = ops.residual_quantize(*given, per_scale=True)
    assert (tokens.requires_grad, f_hat.requires_grad, scales.requires_grad) == (False, False, True)
    given = given._replace(features=given.features.requires_grad_(), codebook=given.codebook.detach())
    tokens, f_hat, scales = ops.residual_quantize(*given, per_scale=True)
    assert (tokens.requires_grad, f_hat.requires_grad, scales.requires_grad) == (False, True, False)


def test_the_kernel_runs_when_the_backend_is_native(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    for name in ("residual_quantize", "residual_quantize_backward"):
        kernel = getattr(var_ext._C, name)
        monkeypatch.setattr(var_ext._C, name, lambda *a, n=name, k=kernel: (calls.append(n), k(*a)))
    given = inputs((1, 2, 3))
    given.codebook.requires_grad_()
    with backend.force("native"):
        ops.residual_quantize(*given, per_scale=True)[2].sum().backward()
    assert calls == ["residual_quantize", "residual_quantize_backward"]


def test_the_kernel_checks_what_it_is_given() -> None:
    given = inputs((1, 2))
    plan = dict(phi_index=[0, 1], patch_nums=[1, 2], ratio=0.5)
    call = {
        **dict(zip(("features", "codebook", "phi_weight", "phi_bias"), given[:4], strict=True)),
        "tokens": torch.zeros(2, 5, dtype=torch.int64),
        "f_hat": torch.empty(2, 4, 2, 2),
    }
    for change, message in (
        (
            dict(features=given.features[:, :3]),
            r"features must have shape \(2, 4, 2, 2\), got \(2, 3, 2, 2\)",
        ),
        (dict(codebook=given.codebook[:0]), "codebook must have 1 to"),
        (dict(phi_weight=given.phi_weight.mT), "phi_weight must be contiguous"),
        (dict(phi_bias=given.phi_bias[:1]), r"phi_bias must have shape \(2, 4\), got \(1, 4\)"),
        (dict(tokens=call["tokens"][:, :4]), r"tokens must have shape \(B, 5\), got \(2, 4\)"),
        (dict(tokens=torch.zeros(2, 5)), "tokens must be int64, got float32"),
        (dict(f_hat=torch.empty(2, 4, 2, 3)), r"f_hat must have shape \(2, 4, 2, 2\), got \(2, 4, 2, 3\)"),
    ):
        views = {name: view(t) for name, t in {**call, **change}.items()}
        with pytest.raises(ValueError, match=f"residual_quantize: {message}"):
            _C.residual_quantize(**views, **plan, cosine=False, scales=None, scratch=None)
    views = {name: view(t) for name, t in call.items()}
    for change, message in (
        (dict(phi_index=[0, 2]), "phi_index must name one of 2 convolutions, got 2"),
        (dict(phi_index=[0]), "phi_index and patch_nums must have one entry for each scale, got 1 and 2"),
        (dict(patch_nums=[3, 2]), "patch_nums must lie between 1 and the last one, got 3"),
    ):
        with pytest.raises(ValueError, match=f"residual_quantize: {message}"):
            _C.residual_quantize(**views, **{**plan, **change}, cosine=False, scales=None, scratch=None)
    backward = {
        "grad_scales": torch.zeros(2, 2, 4, 2, 2),
        "tokens": torch.full((2, 5), 37),
        "codebook": given.codebook,
        "phi_weight": given.phi_weight,
        "grad_codebook": torch.empty(37, 4),
        "grad_weight": torch.empty(2, 4, 4, 3, 3),
        "grad_bias": torch.empty(2, 4),
    }
    with pytest.raises(ValueError, match=r"residual_quantize_backward: tokens must lie in 0 \.\. 36, got 37"):
        _C.residual_quantize_backward(**{name: view(t) for name, t in backward.items()}, **plan, scratch=None)


def test_registration_of_backward() -> None:
    given = inputs((1, 2))
    tokens = torch.randint(37, (2, 5))
    torch.library.opcheck(
        torch.ops.var_ext.residual_quantize_backward,
        (torch.randn(2, 2, 4, 2, 2), tokens, given.codebook, given.phi_weight, [0, 1], [1, 2], 0.5),
    )


def test_the_composed_gradient_is_the_same() -> None:
    """The gradient in plain PyTorch, which runs where there is no kernel."""
    given = inputs((1, 2, 4))
    tokens = torch.randint(37, (2, 21))
    arguments = (
        torch.randn(3, 2, 4, 4, 4),
        tokens,
        given.codebook,
        given.phi_weight,
        [0, 1, 1],
        [1, 2, 4],
        0.5,
    )
    mine = torch.ops.var_ext.residual_quantize_backward(*arguments)
    composed = sys.modules["var_ext.ops.residual_quantize"]._composed_backward(*arguments)
    torch.testing.assert_close(mine, composed, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("per_scale", [False, True])
def test_registration(per_scale: bool) -> None:
    given = inputs((1, 2, 3))
    options = (given.phi_index, [1, 2, 3], 0.5, False, per_scale)
    torch.library.opcheck(torch.ops.var_ext.residual_quantize, (*given[:4], *options))
    tensors = [t.clone().requires_grad_() for t in given[:4]]
    # opcheck's tracing of gradients adds the outputs up into the first, and tokens are integers: traced below
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.var_ext.residual_quantize, (*tensors, *options), test_utils=utilities)


def test_traced_gradients_are_the_eager_ones() -> None:
    given = inputs((1, 2, 3))
    for tensor in given[:4]:
        tensor.requires_grad_()

    def loss(*tensors: Tensor) -> Tensor:
        _, f_hat, scales = ops.residual_quantize(*tensors, given.phi_index, given.schedule, per_scale=True)
        return f_hat.square().sum() + scales.square().sum()

    eager = torch.autograd.grad(loss(*given[:4]), given[:4])
    traced = torch.autograd.grad(
        torch.compile(loss, backend="aot_eager", fullgraph=True)(*given[:4]), given[:4]
    )
    torch.testing.assert_close(traced, eager)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(codebook=torch.zeros(37)), ValueError, r"codebook must have shape \(V, C\).*got \(37,\)"),
        (dict(codebook=torch.zeros(0, 4)), ValueError, r"codebook must hold a code, got \(0, 4\)"),
        (
            dict(codebook=torch.zeros(37, 3)),
            ValueError,
            r"features must have shape.*\(\*, 3, 3, 3\), got \(2, 4, 3, 3\)",
        ),
        (dict(features=torch.zeros(2, 4, 3, 2)), ValueError, r"features must have shape.*got \(2, 4, 3, 2\)"),
        (
            dict(schedule=ScaleSchedule((1, 2, 4))),
            ValueError,
            r"features must have shape.*4, 4\), got \(2, 4, 3, 3\)",
        ),
        (
            dict(phi_weight=torch.zeros(4, 4, 3, 3)),
            ValueError,
            r"phi_weight must have shape.*got \(4, 4, 3, 3\)",
        ),
        (
            dict(phi_bias=torch.zeros(3, 4)),
            ValueError,
            r"phi_bias must have shape \(N, C\) = \(2, 4\), got \(3, 4\)",
        ),
        (dict(phi_index=[0, 1]), ValueError, r"phi_index must name one of 2 .*3 scales, got \[0, 1\]"),
        (dict(phi_index=[0, 1, 2]), ValueError, r"phi_index must name one of 2 .*got \[0, 1, 2\]"),
        (dict(phi_index=[0, -1, 1]), ValueError, r"phi_index must name one of 2 .*got \[0, -1, 1\]"),
        (dict(features=torch.zeros(2, 4, 3, 3).half()), TypeError, "features must be float32, got float16"),
        (
            dict(phi_weight=torch.zeros(2, 4, 4, 3, 3).double()),
            TypeError,
            "one dtype, got.*phi_weight float64",
        ),
        (dict(codebook=torch.zeros(37, 4, device="meta")), ValueError, "one device, got.*codebook on meta"),
    ],
)
def test_bad_input(either_backend: str, change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"residual_quantize: .*{message}"):
        ops.residual_quantize(*inputs((1, 2, 3))._replace(**change))
