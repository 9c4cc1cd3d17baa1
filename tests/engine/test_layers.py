"""Layers as they would run on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from var_ext.engine import Precision, layers


def on_cuda(calls):
    """What torch computes there by `_addmm_activation`: on a CPU its GELU is another."""

    def stand_in(bias, x, weight, *, use_gelu):
        assert use_gelu
        calls.append(x.shape)
        return F.gelu((x.float() @ weight.float() + bias.float()), approximate="tanh").to(x.dtype)

    return stand_in


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 5, 24), (3, 24)])
def test_gelu_goes_into_the_product_in_16_bits(dtype, shape, monkeypatch):
    calls: list[torch.Size] = []
    module, x = nn.Linear(24, 40), torch.randn(shape).to(dtype)
    layer = layers.linear(module, Precision("", dtype), pack=False)
    apart = layer.gelu(x)
    monkeypatch.setattr(layers, "on_gpu", lambda weight: True)
    monkeypatch.setattr(torch, "_addmm_activation", on_cuda(calls))
    fused = layer.gelu(x)
    assert calls == ([] if dtype == torch.float32 else [(x.numel() // 24, 24)])
    # apart the product is rounded to 8 or 11 bits before the activation, whose slope is at most 1.13
    off = {torch.float32: 0, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype] * 1.13
    torch.testing.assert_close(fused, apart, rtol=off, atol=off)
    assert fused.shape == (*shape[:-1], 40)
    no_bias = layers.linear(nn.Linear(24, 40, bias=False), Precision("", dtype), pack=False)
    assert no_bias.gelu(x).shape == fused.shape
    monkeypatch.delattr(torch, "_addmm_activation")  # as a torch may that is still to come
    assert torch.equal(layer.gelu(x), apart)
    assert len(calls) == (dtype != torch.float32)
