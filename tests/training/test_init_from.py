from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny import SCALES, tiny
from var_ext.models import VAR, VQVAE
from var_ext.training.init_from import freeze, init_from, with_scales

LONGER = (1, 2, 3, 4, 6)


def another(vae: VQVAE, **changes: Any) -> VAR:
    return VAR(
        vae,
        **{
            "num_classes": 5,
            "depth": 2,
            "embed_dim": 64,
            "num_heads": 1,
            "attn_l2_norm": True,
            "patch_nums": SCALES,
            **changes,
        },
    )


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b)


def test_the_same_sizes_give_the_same_model() -> None:
    vae, source = tiny()
    var = another(vae).eval()
    assert init_from(var, source) == []
    assert all(same(value, var.state_dict()[name]) for name, value in source.state_dict().items())


def test_other_classes_are_new_and_none_is_kept() -> None:
    vae, source = tiny()
    var = another(vae, num_classes=3)
    before = var.class_emb.weight[:3].clone()
    assert init_from(var, source) == ["class embeddings are new: 3 classes instead of 5"]
    assert same(var.class_emb.weight[:3], before)
    assert same(var.class_emb.weight[3], source.class_emb.weight[5])
    assert same(var.blocks[1].ffn.fc1.weight, source.blocks[1].ffn.fc1.weight)


def test_other_scales_take_levels_by_index_and_resized_positions() -> None:
    _, source = tiny()
    var = another(with_scales(source.vae_proxy[0], LONGER), patch_nums=LONGER)
    (note,) = init_from(var, source)
    assert "scales 1, 2, 3, 4, 6 instead of 1, 2, 4" in note
    assert same(var.lvl_embed.weight, source.lvl_embed.weight[[0, 1, 2, 2, 2]])
    ours, theirs = (m.pos_1LC[0].split([n * n for n in m.schedule.patch_nums]) for m in (var, source))
    assert same(ours[0], theirs[0]) and same(ours[1], theirs[1]) and same(ours[3], theirs[2])
    assert ours[4].shape == (36, 64)
    assert same(var.pos_start, source.pos_start)


def test_resized_positions_keep_a_constant_and_a_slope() -> None:
    """Interpolation of what does not depend on the place changes nothing; a slope stays monotone."""
    _, source = tiny(patch_nums=(1, 4))
    vae, _ = tiny(1, patch_nums=(1, 7))
    with torch.no_grad():
        source.pos_1LC[:, 1:] = torch.arange(4.0).repeat_interleave(4)[None, :, None] * torch.tensor(
            [0.0, 1.0]
        ).repeat(32)
        source.pos_1LC[:, 1:, ::2] = 2.5
    var = another(vae, patch_nums=(1, 7))
    init_from(var, source)
    rows = var.pos_1LC[0, 1:].unflatten(0, (7, 7))
    torch.testing.assert_close(rows[..., ::2], torch.full((7, 7, 32), 2.5), rtol=1e-5, atol=1e-5)
    assert (rows[1:, :, 1] > rows[:-1, :, 1]).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(depth=3), "depth = 3, got 2"),
        (dict(embed_dim=128, num_heads=2), "embed_dim = 128, got 64; num_heads = 2, got 1"),
        (dict(shared_aln=True), "shared_aln = True, got False"),
        (dict(attn_l2_norm=False), "attn_l2_norm = False, got True"),
    ],
)
def test_other_sizes_are_refused(changes: dict, message: str) -> None:
    vae, source = tiny()
    with pytest.raises(ValueError, match=f"must be of a transformer with {message}"):
        init_from(another(vae, **changes), source)


def test_a_tokenizer_with_other_scales_has_the_same_weights() -> None:
    vae, _ = tiny()
    other = with_scales(vae, LONGER)
    ours, theirs = other.state_dict(), vae.state_dict()
    assert all(same(ours[name], theirs[name]) for name in theirs if name != "quantize.ema_vocab_hit_SV")
    assert other.schedule.patch_nums == LONGER and with_scales(vae, SCALES) is vae
    with pytest.raises(
        ValueError, match="patch_nums must be 3 scales, for each of which this tokenizer has a phi, got 1, 2"
    ):
        with_scales(tiny(share=0)[0], (1, 2))


def test_another_tokenizer_is_told() -> None:
    _, source = tiny()
    vae, _ = tiny(1)
    assert init_from(another(vae), source) == [
        "the tokenizer has other codes than the one that the weights were trained with"
    ]


def test_other_codes_are_refused() -> None:
    _, source = tiny()
    vae, _ = tiny()
    vae.vocab_size = 17
    with pytest.raises(ValueError, match="codes = 17, got 16"):
        init_from(another(vae), source)


def test_freeze() -> None:
    _, var = tiny()
    count = freeze(var, ["blocks.{0-1}.ffn.*", "pos_*"])
    frozen = {name for name, p in var.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in var.named_parameters() if ".ffn." in n or n.startswith("pos_")}
    assert count == sum(p.numel() for n, p in var.named_parameters() if n in frozen)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["block.*"], "'block.\\*' matches no parameter; names are like"),
        (["*"], r"\* leave nothing to train"),
    ],
)
def test_freeze_refuses(patterns: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        freeze(tiny()[1], patterns)
