"""The tokenizer beyond the golden cases: round trips, usage record, other schedules, arguments."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tests.models.conftest import PATCH_NUMS
from var_ext.models import VQVAE
from var_ext.models.vqvae import Upsample


def tokenizer(**options) -> VQVAE:
    torch.manual_seed(0)
    base = {"vocab_size": 24, "z_channels": 8, "ch": 32, "ch_mult": (1, 2), "v_patch_nums": PATCH_NUMS}
    return VQVAE(**{**base, **options})


@torch.no_grad()
@pytest.mark.parametrize("sharing", [0, 1, 4])
@pytest.mark.parametrize("znorm", [False, True])
def test_tokens_rebuild_the_quantized_features(sharing, znorm):
    vae = tokenizer(share_quant_resi=sharing, using_znorm=znorm)
    image = torch.rand(2, 3, 8, 8) * 2 - 1
    features = vae.features(image)
    f_hats = vae.quantize.f_to_idxBl_or_fhat(features, to_fhat=True)
    tokens = vae.img_to_idxBl(image)
    assert [t.shape for t in tokens] == [(2, n) for n in vae.schedule.lengths]
    rebuilt = vae.quantize.embed_to_fhat([vae.quantize.codes(k, t) for k, t in enumerate(tokens)])
    for ours, theirs in zip(rebuilt, f_hats, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)  # the same sums in another order
    images = vae.idxBl_to_img(tokens, same_shape=True)
    for ours, theirs in zip(images, vae.img_to_reconstructed_img(image), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_coarse_to_fine_at_growing_size():
    vae = tokenizer()
    codes = [torch.randn(2, 8, p, p) for p in PATCH_NUMS]
    grown = vae.quantize.embed_to_fhat(codes, all_to_max_scale=False)
    assert [tuple(f.shape) for f in grown] == [(2, 8, p, p) for p in PATCH_NUMS]
    assert torch.equal(vae.quantize.embed_to_fhat(codes, all_to_max_scale=False, last_one=True), grown[-1])


@torch.no_grad()
def test_without_phi_codes_are_added_as_they_are():
    vae = tokenizer(quant_resi=0)
    assert not any("quant_resi" in name for name in vae.state_dict())
    codes = [torch.zeros(1, 8, p, p) for p in PATCH_NUMS]
    codes[-1] = torch.randn(1, 8, 4, 4)
    assert torch.equal(vae.quantize.embed_to_fhat(codes, last_one=True), codes[-1])


def test_training_counts_hits_and_evaluation_does_not():
    vae = tokenizer(test_mode=False)
    image = torch.rand(3, 3, 8, 8) * 2 - 1
    vae.eval()(image)
    assert not vae.quantize.ema_vocab_hit_SV.any()
    _, usages, loss = vae.train()(image, ret_usages=True)
    # the first update takes the counts as they are: 3 images of p x p tokens at each scale
    assert vae.quantize.ema_vocab_hit_SV.sum(1).tolist() == [3 * n for n in vae.schedule.lengths]
    assert len(usages) == 4 and all(0 <= u <= 100 for u in usages)
    loss.backward()
    assert vae.quantize.embedding.weight.grad.any()


def test_one_tokenizer_serves_another_number_of_scales():
    wide = tokenizer(v_patch_nums=(1, 2, 3, 4, 5))
    state = tokenizer().state_dict()
    wide.load_state_dict(state, strict=True)
    assert wide.quantize.ema_vocab_hit_SV.shape[0] == 5
    assert state["quantize.ema_vocab_hit_SV"].shape[0] == 4  # the caller's dict is left alone
    tokens = wide.img_to_idxBl(torch.zeros(1, 3, 8, 8), v_patch_nums=[1, (2, 2), 4])
    assert [t.shape[1] for t in tokens] == [1, 4, 16]


def test_token_maps_of_the_wrong_size_are_named():
    vae = tokenizer()
    tokens = vae.img_to_idxBl(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"tokens of scale 0 must have shape \(B, 1\), got \(1, 16\)"):
        vae.idxBl_to_img(tokens[::-1], same_shape=True)
    with pytest.raises(ValueError, match=r"tokens of scale 0 must have shape \(B, 1\), got \(1, 16\)"):
        vae.quantize.idxBl_to_var_input(tokens[::-1])
    with pytest.raises(ValueError, match="at most 4 token maps, got one more"):
        vae.quantize.idxBl_to_var_input([*tokens, tokens[-1]])


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="must be at least 1, got 0, 8, 3"):
        tokenizer(vocab_size=0)
    with pytest.raises(ValueError, match=r"multiple of 32, got \[24, 48\]"):
        tokenizer(ch=24)
    with pytest.raises(ValueError, match="ascending order, got"):
        tokenizer(v_patch_nums=(4, 2))
    vae = tokenizer()
    with pytest.raises(ValueError, match="token maps must be square, got 2 x 3"):
        vae.img_to_idxBl(torch.zeros(1, 3, 8, 8), v_patch_nums=[(2, 3), 4])
    with pytest.raises(
        ValueError, match=r"features must have shape .* = \(\*, 8, 4, 4\), got \(1, 8, 5, 5\)"
    ):
        vae.img_to_idxBl(torch.zeros(1, 3, 10, 10))


def test_upsampling_is_nearest_then_a_convolution() -> None:
    """One transposed convolution in float64, values and gradients, against the two steps of the definition."""
    up = Upsample(5).double()
    x = torch.randn(2, 5, 4, 7, dtype=torch.float64, requires_grad=True)
    expected = up.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
    result = up(x)
    torch.testing.assert_close(result, expected)
    given = (x, up.conv.weight, up.conv.bias)
    weights = torch.randn_like(expected)
    for mine, torchs in zip(
        torch.autograd.grad(result, given, weights),
        torch.autograd.grad(expected, given, weights),
        strict=True,
    ):
        torch.testing.assert_close(mine, torchs)


def test_hooks_on_the_upsampling_convolution_are_called() -> None:
    up, seen = Upsample(4), []
    x = torch.randn(1, 4, 3, 3)
    plain = up(x)
    up.conv.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(up(x), plain)  # two ways to the same sums
    assert seen == [1]
