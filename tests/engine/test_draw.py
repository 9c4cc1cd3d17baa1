"""The published random stream without a host sync, and logits that cannot be sampled."""

from __future__ import annotations

import pytest
import torch

from tests.models.conftest import small_pair
from var_ext import Sampler
from var_ext.engine import Call, Engine, named_precision, options_for
from var_ext.engine.draw import guided_logits, look_up, multinomial

CPU = torch.device("cpu")


@pytest.mark.parametrize(("rows", "codes"), [(1, 1), (7, 24), (680, 4096), (64, 4097)])
def test_multinomial_draws_what_torch_draws(rows, codes):
    logits = 3 * torch.randn(rows, codes)
    logits[:, 1::3] = -torch.inf  # as top-k leaves them
    probabilities = logits.softmax(dim=-1)
    ours, torchs = (torch.Generator().manual_seed(5) for _ in range(2))
    for _ in range(3):
        drawn = multinomial(probabilities, ours)
        assert torch.equal(drawn, probabilities.multinomial(1, replacement=True, generator=torchs)[:, 0])
    assert torch.equal(ours.get_state(), torchs.get_state())
    torch.manual_seed(3)
    drawn = multinomial(probabilities, None)
    torch.manual_seed(3)
    assert torch.equal(drawn, probabilities.multinomial(1, replacement=True)[:, 0])


def test_a_row_of_nan_is_drawn_as_minus_one():
    probabilities = torch.full((3, 5), 0.2)
    probabilities[1] = torch.nan
    assert (multinomial(probabilities, None) == -1).tolist() == [False, True, False]


def test_a_token_of_minus_one_looks_up_some_code():
    codebook = torch.randn(24, 8)
    tokens = torch.tensor([[3, -1], [0, 23]])
    codes = look_up(codebook, tokens)
    assert torch.equal(codes[1], codebook[tokens[1]]) and codes.isfinite().all()


def test_guidance_from_a_table_is_that_of_a_number():
    """A captured graph reads cfg from memory: the same products, bit for bit."""
    logits = 5 * torch.randn(4, 3, 100)
    for cfg in (1.5, 4 / 9, 1 / 3, 0.0):
        table = torch.full((2,), cfg, dtype=torch.float64)
        assert torch.equal(guided_logits(logits, table), guided_logits(logits, cfg))


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("mode", ["fp32", "bf16"])
def test_weights_of_nan_end_in_an_error_that_names_the_images(mode, published):
    _, var = small_pair()
    engine = Engine(var.eval(), named_precision(mode, CPU), pack=True)
    options, labels = options_for(var.schedule, cfg=1.5, top_k=12, top_p=0.9), torch.tensor([0, 3, 1])
    randomness = torch.Generator().manual_seed(0) if published else torch.arange(3)
    good = engine.draw(Call(labels, randomness, options))[1]
    with torch.no_grad():
        var.class_emb.weight[3] = torch.nan
    with pytest.raises(
        ValueError, match="each row of logits needs a finite maximum and no NaN, got a row without"
    ):
        engine.draw(Call(labels, randomness, options))
    others = torch.tensor([0, 2, 1])
    assert engine.draw(Call(others, randomness, options))[1].shape == good.shape


def test_scales_of_nan_are_an_error_too():
    vae, var = small_pair()
    with torch.no_grad():
        var.class_emb.weight[3] = torch.nan
    with pytest.raises(ValueError, match="needs a finite maximum and no NaN"):
        Sampler(vae, var, precision="fp32").scales([3], [0])
