"""Schedules against the published formula, optimizer groups against published names, the moving average."""

import pytest
import torch

from var_ext.models import VAR, VQVAE
from var_ext.training.optim import Ema, averaged, cosine_factor, linear_factor, param_groups, set_rates


def test_the_linear_schedule_has_the_published_values() -> None:
    def factor(step: int) -> float:
        return linear_factor(step, 1001, warmup=0.1, end=0.1)

    assert factor(0) == pytest.approx(0.005)
    assert factor(50) == pytest.approx((1 + 0.005) / 2)
    assert factor(100) == factor(144) == 1.0
    # at 5 % of the rest the published line starts at exactly 1, at the end it is wpe
    assert factor(145) == pytest.approx(1.0)
    assert factor(1000) == pytest.approx(0.1)
    assert factor(145 + 855 // 2) == pytest.approx(0.55, abs=1e-3)  # half way; 855 is odd


def test_the_cosine_schedule() -> None:
    values = [cosine_factor(step, 101, warmup=0.0, end=0.01) for step in (0, 50, 100)]
    assert values == pytest.approx([1.0, 0.505, 0.01])


@pytest.mark.parametrize("total", [1, 2, 3])
def test_schedules_of_a_few_steps_are_finite(total: int) -> None:
    for step in range(total):
        for schedule in (linear_factor, cosine_factor):
            assert 0 < schedule(step, total, warmup=0.5, end=0.1) <= 1


@pytest.mark.parametrize("shared_aln", [False, True])
def test_decay_spares_the_published_names(shared_aln: bool) -> None:
    vae = VQVAE(vocab_size=8, z_channels=4, ch=32, ch_mult=(1,), v_patch_nums=(1, 2))
    var = VAR(
        vae, num_classes=2, depth=2, embed_dim=16, num_heads=2, shared_aln=shared_aln, attn_l2_norm=True,
        patch_nums=(1, 2),
    )  # fmt: skip
    names = {id(parameter): name for name, parameter in var.named_parameters()}
    groups = {group["decay"]: {names[id(p)] for p in group["params"]} for group in param_groups(var)}
    assert groups[True] | groups[False] == set(names.values())
    for spared in (
        "pos_start",
        "pos_1LC",
        "lvl_embed.weight",
        "blocks.0.attn.scale_mul_1H11",
        "blocks.1.attn.q_bias",
    ):
        assert spared in groups[False]
    for decayed in ("class_emb.weight", "word_embed.weight", "head.weight", "blocks.0.attn.mat_qkv.weight"):
        assert decayed in groups[True]
    assert ("blocks.0.ada_gss" in groups[False]) == shared_aln
    assert not any(name.endswith("bias") for name in groups[True])


def test_rates_reach_the_right_groups() -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(param_groups(model))
    set_rates(optimizer, 0.5, 0.25)
    assert [(g["decay"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [
        (True, 0.5, 0.25),
        (False, 0.5, 0.0),
    ]


def test_the_moving_average_warms_up_and_keeps_buffers_as_they_are() -> None:
    model = torch.nn.BatchNorm1d(3)
    ema = Ema(model, 0.9)
    with torch.no_grad():
        model.weight.fill_(3.0)
        model.running_mean.fill_(5.0)  # type: ignore[union-attr]
    ema.update(model, 0)  # decay (1 + 0) / (10 + 0) = 0.1: 0.1 * 1 + 0.9 * 3
    entries = averaged(model, ema)
    torch.testing.assert_close(entries["weight"], torch.full((3,), 2.8))
    assert entries["running_mean"].tolist() == [5, 5, 5]
    ema.update(model, 10**6)  # decay 0.9: 0.9 * 2.8 + 0.1 * 3
    torch.testing.assert_close(averaged(model, ema)["weight"], torch.full((3,), 2.82))
