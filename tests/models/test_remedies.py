"""Each remedy against its definition, written out in loops, and that none of it touches a finished model."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from var_ext.models import VQVAE, remedies
from var_ext.models.keyed import key_rows, row_keys
from var_ext.models.remedies import Remedies
from var_ext.schedule import ScaleSchedule

PATCH_NUMS = (1, 2, 3, 4)


def tokenizer(**options: object) -> VQVAE:
    torch.manual_seed(0)
    base = {"vocab_size": 24, "z_channels": 8, "ch": 32, "ch_mult": (1, 1), "v_patch_nums": PATCH_NUMS}
    return VQVAE(**{**base, "test_mode": False, **options})  # type: ignore[arg-type]


def passed(vae: VQVAE, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, scales, and the published loss."""
    tokens, _, scales = vae.quantize.quantize(features, vae.schedule, per_scale=True)
    assert scales is not None
    loss = 0.25 * F.mse_loss(scales.detach(), features.expand_as(scales))
    return tokens, scales, loss + F.mse_loss(scales, features.detach().expand_as(scales))


@pytest.mark.parametrize("znorm", [False, True])
def test_with_every_remedy_at_nothing_the_pass_is_the_published_one(znorm: bool) -> None:
    vae, features = tokenizer(using_znorm=znorm), torch.randn(3, 8, 4, 4, requires_grad=True)
    wanted, _, loss = vae.quantize(features)
    vae.quantize.remedies = Remedies()
    found, _, same = vae.quantize(features)
    torch.testing.assert_close(found, wanted)  # the op adds what it sums in another order
    torch.testing.assert_close(same, loss)
    weights = torch.randn_like(found)
    inputs = features, vae.quantize.embedding.weight
    for a, b in ((found, wanted), (same, loss)):
        grads = [
            torch.autograd.grad((y * weights).sum(), inputs, retain_graph=True, allow_unused=True)
            for y in (a, b)
        ]
        for one, two in zip(*grads, strict=True):
            assert (one is None) == (two is None)
            if one is not None:
                torch.testing.assert_close(one, two)


@torch.no_grad()
def test_a_finished_model_knows_of_none() -> None:
    vae, image = tokenizer().eval(), torch.rand(2, 3, 8, 8) * 2 - 1
    before, names = vae(image), list(vae.state_dict())
    vae.quantize.remedies = Remedies(
        scale_dropout=0.9, gradient="rotation", entropy=1.0, perturbed_rows=1.0, anchors=True
    )
    key_rows(vae, "cpu").keys = row_keys(1, slice(0, 2))
    after = vae(image)
    assert torch.equal(before[0], after[0]) and torch.equal(before[2], after[2])
    assert list(vae.state_dict()) == names  # published files load strictly
    assert not torch.equal(vae.train()(image)[0], before[0])


def test_dropout_over_scales_by_hand() -> None:
    vae, features = tokenizer(), torch.randn(5, 8, 4, 4, requires_grad=True)
    quantizer = vae.quantize
    quantizer.remedies = Remedies(scale_dropout=0.6, dropout_start=2)
    rows = key_rows(vae, "cpu")
    rows.keys = row_keys(1, slice(0, 5))
    f_hat, _, loss = quantizer(features)

    _, scales, _ = passed(vae, features)
    draws = quantizer.uniform(5, 2)
    wanted, total = [], torch.zeros(())
    for b in range(5):
        kept = 4 if draws[b, 0] >= 0.6 else 2 + math.floor(3 * draws[b, 1])
        wanted.append(kept)
        assert torch.equal(f_hat[b], scales[kept - 1, b])
    assert len(set(wanted)) == 3 and wanted.count(4) >= 1
    for k in range(4):
        mine = [b for b in range(5) if k < wanted[b]]
        for b in mine:
            total = total + 0.25 * (scales[k, b].detach() - features[b]).square().mean() / len(mine) / 4
            total = total + (scales[k, b] - features[b].detach()).square().mean() / len(mine) / 4
    torch.testing.assert_close(loss, total)
    inputs = (features, quantizer.embedding.weight)
    for found, by_hand in zip(
        torch.autograd.grad(loss, inputs), torch.autograd.grad(total, inputs), strict=True
    ):
        torch.testing.assert_close(found, by_hand)


def test_dropped_scales_are_drawn_alike() -> None:
    kept = remedies.kept_scales(torch.rand(40000, 2, generator=torch.Generator().manual_seed(0)), 10, 0.1, 3)
    counts = kept.bincount(minlength=11) / 40000
    assert counts[:3].sum() == 0
    # 3..10 alike, 0.1 / 8 each: five standard deviations of such a share are 0.003
    assert (counts[3:10] - 0.1 / 8).abs().max() < 0.003
    edge = remedies.kept_scales(torch.tensor([[0.0, 1 - 2**-24], [0.0, 0.0]]), 10, 0.1, 3)
    assert edge.tolist() == [10, 3]


def test_losses_of_parts_add_up_where_some_leave_scales_out() -> None:
    features, scales = torch.randn(6, 8, 4, 4), torch.randn(4, 6, 8, 4, 4)
    kept = torch.tensor([4, 1, 2, 4, 1, 3])
    whole = remedies.kept_losses(features, scales, kept, 0.25)
    shares = (torch.arange(4)[:, None] < kept).float().mean(1)
    parts = [slice(0, 1), slice(1, 5), slice(5, 6)]
    each = [remedies.kept_losses(features[p], scales[:, p], kept[p], 0.25, shares) for p in parts]
    total = sum((p.stop - p.start) / 6 * loss for p, loss in zip(parts, each, strict=True))
    torch.testing.assert_close(total, whole)
    none = remedies.kept_losses(
        features[:1], scales[:, :1], torch.tensor([1]), 0.25
    )  # scales that no row keeps
    torch.testing.assert_close(none, (0.25 + 1) * (scales[0, 0] - features[0]).square().mean() / 4)


def rotation(e: Tensor, q: Tensor) -> Tensor:
    """The matrix that turns e into the direction of q, from its definition: (C,), (C,) -> (C, C)."""
    e, q = e / e.norm(), q / q.norm()
    w = (e + q) / (e + q).norm()
    return torch.eye(len(e), dtype=e.dtype) - 2 * torch.outer(w, w) + 2 * torch.outer(q, e)


def test_the_rotation_gradient_is_the_formula() -> None:
    features = torch.randn(2, 5, 3, 3, dtype=torch.float64, requires_grad=True)
    f_hat, grad = torch.randn_like(features), torch.randn_like(features)
    result = remedies.rotated(features, f_hat)
    assert torch.equal(result, f_hat)
    (found,) = torch.autograd.grad(result, features, grad)
    for b in range(2):
        for y in range(3):
            for x in range(3):
                e, q = features[b, :, y, x].detach(), f_hat[b, :, y, x]
                turn = q.norm() / e.norm() * rotation(e, q)
                torch.testing.assert_close(turn @ e, q)  # it is what the forward pass did
                torch.testing.assert_close(found[b, :, y, x], turn.T @ grad[b, :, y, x])
    (plain,) = torch.autograd.grad(remedies.straight_through(features, f_hat), features, grad)
    assert torch.equal(plain, grad)


def test_the_rotation_bears_vectors_without_direction() -> None:
    e = torch.randn(1, 5, 1, 4)
    q = torch.randn(1, 5, 1, 4)
    e[..., 0], q[..., 1], q[..., 2], q[..., 3] = 0.0, 0.0, -e[..., 2], e[..., 3]
    e.requires_grad_()
    result = remedies.rotated(e, q)
    (grad,) = torch.autograd.grad(result.sum(), e)
    assert torch.equal(result, q) and grad.isfinite().all()
    torch.testing.assert_close(grad[..., 3], torch.ones_like(grad[..., 3]))  # nothing to turn


@pytest.mark.parametrize("znorm", [False, True])
def test_a_quantizer_passes_on_the_rotated_gradient(znorm: bool) -> None:
    vae, features = tokenizer(using_znorm=znorm), torch.randn(2, 8, 4, 4, requires_grad=True)
    vae.quantize.remedies = Remedies(gradient="rotation")
    f_hat = vae.quantize(features)[0]
    grad = torch.randn_like(f_hat)
    (found,) = torch.autograd.grad(f_hat, features, grad)
    e, q = features[1, :, 2, 3].detach(), f_hat[1, :, 2, 3].detach()
    wanted = q.norm() / e.norm() * rotation(e, q).T @ grad[1, :, 2, 3]
    torch.testing.assert_close(found[1, :, 2, 3], wanted)


@pytest.mark.parametrize("cosine", [False, True])
def test_the_entropy_loss_is_its_definition(cosine: bool) -> None:
    z, codes = torch.randn(7, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    chances = torch.zeros(7, 5, dtype=torch.float64)
    for i in range(7):
        for v in range(5):
            near = -(z[i] - codes[v]).square().sum()
            chances[i, v] = torch.exp((F.cosine_similarity(z[i], codes[v], 0) if cosine else near) / 0.7)
        chances[i] /= chances[i].sum()
    sure = torch.stack([-(p * p.log()).sum() for p in chances]).mean()
    mean = chances.mean(0)
    logits = remedies.affinity(z, codes, cosine)
    torch.testing.assert_close(remedies.entropy_loss(logits, 0.7), sure + (mean * mean.log()).sum())
    torch.testing.assert_close(remedies.assignments(logits, 0.7), mean)


def test_entropy_gradients_of_parts_add_up() -> None:
    z = torch.randn(9, 3, dtype=torch.float64, requires_grad=True)
    codes = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)

    def loss(part: slice, mean: Tensor | None = None) -> Tensor:
        return remedies.entropy_loss(remedies.affinity(z[part], codes, False), 0.5, mean)

    def definition() -> Tensor:
        chances = (remedies.affinity(z, codes, False) / 0.5).softmax(-1)
        mean = chances.mean(0)
        return -(chances * chances.log()).sum(-1).mean() + (mean * mean.log()).sum()

    with torch.no_grad():
        mean = remedies.assignments(remedies.affinity(z, codes, False), 0.5)
    for given in (z, codes):
        parts = 2 / 9 * loss(slice(0, 2), mean) + 7 / 9 * loss(slice(2, 9), mean)
        (wanted,) = torch.autograd.grad(definition(), given)
        for found in (loss(slice(0, 9)), parts):
            torch.testing.assert_close(torch.autograd.grad(found, given)[0], wanted)


def test_the_entropy_loss_spreads_tokens_over_codes() -> None:
    """All features at one code: with the loss they part, without it nothing draws them away."""

    def used(weight: float) -> int:
        torch.manual_seed(0)
        z = (0.05 * torch.randn(64, 2)).requires_grad_()
        codes = torch.tensor(
            [[0.0, 0.0], [0.6, 0.0], [0.0, 0.6], [-0.6, 0.0], [0.0, -0.6]], requires_grad=True
        )
        optimizer = torch.optim.Adam([z, codes], lr=0.02)
        for _ in range(60):
            optimizer.zero_grad()
            logits = remedies.affinity(z, codes, False)
            commitment = (z - codes[logits.argmax(1)].detach()).square().mean()
            (commitment + weight * remedies.entropy_loss(logits, 0.2)).backward()
            optimizer.step()
        return len(remedies.affinity(z, codes, False).argmax(1).unique())

    assert used(0.0) == 1
    assert used(0.5) == 5


def test_perturbed_codes_are_near_ones_of_some_rows() -> None:
    vae, features = tokenizer(), torch.randn(40, 8, 4, 4)
    tokens, scales, _ = passed(vae, features)
    rest = remedies.residuals(features, scales, PATCH_NUMS)
    kept = torch.randint(1, 5, (40,))
    uniform = torch.rand(40, 2 * vae.schedule.num_tokens)

    def f_hat(share: float, near: int) -> Tensor:
        return remedies.perturb(vae.quantize, rest, tokens, kept, uniform, share, near)

    clean = scales[kept - 1, torch.arange(40)].detach()
    torch.testing.assert_close(f_hat(0.0, 5), clean)  # a step at a time, the op all at once
    torch.testing.assert_close(f_hat(1.0, 1), clean)  # the nearest code is the token
    changed = tokens.clone()
    codebook = vae.quantize.embedding.weight.detach()
    for k, where in enumerate(vae.schedule.slices):
        z = rest[k].detach().flatten(2).transpose(1, 2)  # (B, p p, C)
        for b in range(40):
            for i, at in enumerate(range(where.start, where.stop)):
                if uniform[b, at] < 0.6:
                    order = (z[b, i] - codebook).square().sum(1).argsort()
                    changed[b, at] = order[int(5 * uniform[b, vae.schedule.num_tokens + at])]
    share = (changed != tokens).float().mean()
    assert abs(share - 0.6 * 0.8) < 0.03  # one in five stays; of 1200 tokens, two standard deviations
    codes = [vae.quantize.codes(k, changed[:, s]) for k, s in enumerate(vae.schedule.slices)]
    summed = torch.stack(vae.quantize.embed_to_fhat(codes))[kept - 1, torch.arange(40)]
    torch.testing.assert_close(f_hat(0.6, 5), summed.detach())


def test_perturbation_changes_what_the_decoder_sees_and_no_loss() -> None:
    vae, features = tokenizer(), torch.randn(64, 8, 4, 4, requires_grad=True)
    wanted, _, loss = vae.quantize(features)
    vae.quantize.remedies = Remedies(perturbed_rows=0.25, perturbed_tokens=1.0, perturbed_codes=8)
    found, _, same = vae.quantize(features)
    torch.testing.assert_close(same, loss)
    differ = (found - wanted).abs().amax((1, 2, 3)) > 1e-3
    assert 4 < differ.sum() < 30
    vae.quantize.remedies.strength = 0.0  # one code, none replaced
    torch.testing.assert_close(vae.quantize(features)[0], wanted)


def test_the_pool_has_residuals_of_each_scale_by_its_side() -> None:
    vae, features = tokenizer(), torch.randn(3, 8, 4, 4)
    vae.quantize.remedies = Remedies(anchors=True)
    vae.quantize(features)
    (pool,) = vae.quantize.remedies.pool
    assert pool.shape == (3, 1 + 2 + 3 + 4, 8) and not pool.requires_grad
    rest = remedies.residuals(features, passed(vae, features)[1].detach(), PATCH_NUMS)
    start = 0
    for z in rest:
        side = z.shape[-1]
        for b in range(3):
            distances = torch.cdist(pool[b, start : start + side], z[b].flatten(1).T)
            assert distances.amin(1).max() < 1e-5
        start += side
    vae.quantize.embedding.requires_grad_(False)  # as in a pass that is for other gradients
    vae.quantize(features)
    assert len(vae.quantize.remedies.pool) == 1


def test_a_row_draws_the_same_in_any_batch() -> None:
    vae, features = tokenizer(), torch.randn(6, 8, 4, 4)
    schedule = ScaleSchedule(PATCH_NUMS)
    vae.quantize.remedies = Remedies(
        scale_dropout=0.5, dropout_start=1, perturbed_rows=0.5, perturbed_codes=6, anchors=True
    )
    rows = key_rows(vae, "cpu")
    rows.keys = row_keys(3, slice(0, 6))
    whole = vae.quantize(features)[0]
    for part in (slice(0, 2), slice(2, 6)):
        rows.keys = row_keys(3, part)
        torch.testing.assert_close(vae.quantize(features[part])[0], whole[part])
    pools = vae.quantize.remedies.pool
    torch.testing.assert_close(torch.cat(pools[1:]), pools[0])
    assert schedule == vae.schedule
