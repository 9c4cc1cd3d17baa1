"""An image is the same bit for bit alone and in any batch, with the code channels and scales of published models."""

from __future__ import annotations

import pytest
import torch

from var_ext.models import VAR, VQVAE
from var_ext.sampling import Sampler
from var_ext.schedule import SCALES_256

COUNT = 7


def models() -> tuple[VQVAE, VAR]:
    torch.manual_seed(0)
    vae = VQVAE(vocab_size=64, z_channels=32, ch=32, ch_mult=(1, 2), v_patch_nums=SCALES_256)
    var = VAR(
        vae, num_classes=5, depth=2, embed_dim=64, num_heads=1, attn_l2_norm=True, patch_nums=SCALES_256
    )
    return vae, var.eval()


@pytest.fixture(scope="module", params=["fp32", "bf16", "int8"])
def sampler(request: pytest.FixtureRequest) -> Sampler:
    return Sampler(*models(), precision=request.param)


def test_an_image_alone_is_the_image_in_a_batch(sampler: Sampler, each_isa: str) -> None:
    """Tokens, and the sums of all scales bit for bit."""
    labels, seeds = torch.arange(COUNT) % 5, torch.arange(COUNT)
    tokens = sampler.tokens(labels, seeds)
    steps = list(sampler.scales(labels, seeds))
    for size in (1, 2):
        assert torch.equal(sampler.tokens(labels, seeds, batch_size=size), tokens), size
    for step, one in zip(steps, sampler.scales(labels[:1], seeds[:1]), strict=True):
        assert torch.equal(step[:1], one)


def test_mixed_codes_alone_are_those_in_a_batch(sampler: Sampler) -> None:
    """`more_smooth`: no token hides a difference in the last bit."""
    labels, seeds = torch.arange(COUNT) % 5, torch.arange(COUNT)
    images = sampler(labels, seeds, more_smooth=True)
    for size in (1, 2):
        assert torch.equal(sampler(labels, seeds, more_smooth=True, batch_size=size), images), size
