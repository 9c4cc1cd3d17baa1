"""Codebook collapse: where codes start, which ones are moved, and that coarse scales get their share."""

import pytest
import torch

from var_ext.models import VQVAE
from var_ext.training import codebook


@pytest.fixture
def vae() -> VQVAE:
    model = VQVAE(vocab_size=24, z_channels=4, ch=32, ch_mult=(1, 1), v_patch_nums=(1, 2, 4), test_mode=False)
    return model.eval()


@pytest.fixture
def batch() -> torch.Tensor:
    return torch.randn(16, 3, 8, 8).clamp(-1, 1)


def test_shares_follow_the_side_and_add_up(vae: VQVAE) -> None:
    assert codebook._shares(24, vae.schedule) == [3, 7, 14]
    assert sum(codebook._shares(2, vae.schedule)) == 2


def test_residuals_are_what_coarser_scales_leave(vae: VQVAE, batch: torch.Tensor) -> None:
    f = vae.features(batch).detach()
    first, second, last = codebook.residuals(vae, f, vae.schedule)
    assert first.shape == (16, 4) and second.shape == (64, 4) and last.shape == (256, 4)
    torch.testing.assert_close(first, f.mean((2, 3)))
    rest = f - vae.quantize.f_to_idxBl_or_fhat(f, to_fhat=True)[1]
    torch.testing.assert_close(last, rest.permute(0, 2, 3, 1).reshape(-1, 4))


def test_seeded_codes_lie_on_the_data_and_serve_every_scale(vae: VQVAE, batch: torch.Tensor) -> None:
    def error() -> float:
        return float(vae.quantize(vae.features(batch))[2].detach())

    random = error()
    codebook.seed_codebook(vae, batch.split(6), vae.schedule)
    assert error() < 0.5 * random  # random codes have norm 2, features of a fresh encoder far less
    weight = vae.quantize.embedding.weight
    first = codebook.residuals(vae, vae.features(batch), vae.schedule)[0]
    for code in weight[:3]:
        assert (first - code).norm(dim=1).min() < 1e-6
    assert len(weight.unique(dim=0)) > 20
    used = [len(tokens.unique()) for tokens in vae.img_to_idxBl(batch)]
    assert used[0] >= 2 and used[2] >= 8


def test_unused_codes_move_to_residuals_and_used_ones_stay(vae: VQVAE, batch: torch.Tensor) -> None:
    codebook.seed_codebook(vae, batch.split(6), vae.schedule)
    weight = vae.quantize.embedding.weight
    with torch.no_grad():
        weight[5:9] = 1000.0
    before = weight.detach().clone()
    hits = vae.quantize.ema_vocab_hit_SV.fill_(10.0)
    hits[:, 5:9] = 0.0
    moved = codebook.restart_codes(vae, [batch], vae.schedule)
    assert moved.tolist() == [5, 6, 7, 8]
    stayed = [i for i in range(24) if i not in moved]
    assert torch.equal(weight[stayed], before[stayed])
    assert weight[5:9].norm(dim=1).max() < 100


def test_nothing_moves_where_all_codes_are_used(vae: VQVAE, batch: torch.Tensor) -> None:
    vae.quantize.ema_vocab_hit_SV.fill_(1.0)
    before = vae.quantize.embedding.weight.detach().clone()
    assert len(codebook.restart_codes(vae, [batch], vae.schedule)) == 0
    assert torch.equal(vae.quantize.embedding.weight, before)


def test_the_optimizer_forgets_moved_rows_alone() -> None:
    weight = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = torch.optim.Adam([weight])
    weight.sum().backward()
    optimizer.step()
    codebook.forget(optimizer, weight, torch.tensor([1]))
    state = optimizer.state[weight]
    assert (state["exp_avg"].abs().sum(1) > 0).tolist() == [True, False, True]
    assert (state["exp_avg_sq"].abs().sum(1) > 0).tolist() == [True, False, True]
    codebook.forget(torch.optim.Adam([weight]), weight, torch.tensor([1]))  # before its first step


def test_more_codes_than_residuals_are_drawn_with_repetition() -> None:
    pool = torch.arange(6.0).view(3, 2)
    drawn = codebook._draw(pool, 7)
    assert drawn.shape == (7, 2) and len(drawn[:3].unique(dim=0)) == 3
    assert codebook._draw(pool, 0).shape == (0, 2)


def test_a_scale_with_too_few_codes_gets_some_although_none_is_unused(
    vae: VQVAE, batch: torch.Tensor
) -> None:
    codebook.seed_codebook(vae, batch.split(6), vae.schedule)
    hits = vae.quantize.ema_vocab_hit_SV.fill_(10.0)
    hits[0] = 0.0
    hits[0, 4] = 50.0  # the coarsest scale, whose share is 3 codes, uses one
    hits[1:, 7] = 9.0  # used everywhere else, but least
    moved = codebook.restart_codes(vae, [batch], vae.schedule)
    assert moved.tolist() == [7]  # one at a time: 1/32 of 24 codes
    first = codebook.residuals(vae, vae.features(batch), vae.schedule)[0]
    assert (first - vae.quantize.embedding.weight[7]).norm(dim=1).min() < 1e-6


def test_with_a_target_every_scale_is_to_use_so_many(vae: VQVAE, batch: torch.Tensor) -> None:
    codebook.seed_codebook(vae, batch.split(6), vae.schedule)
    vae.quantize.using_znorm = True
    hits = vae.quantize.ema_vocab_hit_SV.fill_(10.0)
    hits[0, 3:] = 0.0  # the coarsest scale uses its share by side, 3 codes, and not half of them
    hits[1:, 7] = 9.0
    assert len(codebook.restart_codes(vae, [batch], vae.schedule)) == 0
    moved = codebook.restart_codes(vae, [batch], vae.schedule, target=0.5)
    assert moved.tolist() == [7]
    first = codebook.residuals(vae, vae.features(batch), vae.schedule)[0]
    assert (first - vae.quantize.embedding.weight[7]).norm(dim=1).min() < 1e-6
    hits[0, 3:12] = 10.0
    assert len(codebook.restart_codes(vae, [batch], vae.schedule, target=0.5)) == 0


def test_the_cure_keeps_codes_at_the_coarsest_scale() -> None:
    """Training on real digits: without the cure the 1x1 map ends with a single code."""
    from var_ext.data import load_dataset
    from var_ext.training import TokenizerRecipe
    from var_ext.training.loop import Moment, epoch_batches
    from var_ext.training.tokenizer import TokenizerTask

    def codes_in_use(**options: int) -> int:
        recipe = TokenizerRecipe.digits().with_options(
            ch_mult="1,1", patch_nums="1,2,4", vocab_size=96, batch_size=32, ema=0, **options
        )
        task = TokenizerTask("digits", recipe)
        torch.manual_seed(0)
        task.start()
        for step, batch in enumerate(task.feed(0, epoch_batches(0, 0, task.num_items, 32)[:20])):
            task.step(Moment(step, 200, 0, False), batch)
        images = load_dataset("digits", "val", 8).batch(range(200))[0]
        return len(task.vae.eval().img_to_idxBl(images)[0].unique())

    assert codes_in_use(codebook_init=0, restart_every=0) <= 2
    assert codes_in_use(restart_every=8) >= 6
