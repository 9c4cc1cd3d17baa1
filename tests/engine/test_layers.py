"""Layers as they would run on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from var_ext import _torch
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
    monkeypatch.setattr(_torch, "addmm_gelu", on_cuda(calls))
    fused = layer.gelu(x)
    assert calls == ([] if dtype == torch.float32 else [(x.numel() // 24, 24)])
    # apart the product is rounded to 8 or 11 bits before the activation, whose slope is at most 1.13
    off = {torch.float32: 0, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype] * 1.13
    torch.testing.assert_close(fused, apart, rtol=off, atol=off)
    assert fused.shape == (*shape[:-1], 40)
    no_bias = layers.linear(nn.Linear(24, 40, bias=False), Precision("", dtype), pack=False)
    assert no_bias.gelu(x).shape == fused.shape
    monkeypatch.setattr(_torch, "addmm_gelu", None)  # as in a torch that may still come
    assert torch.equal(layer.gelu(x), apart)
    assert len(calls) == (dtype != torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize(
    ("geometry", "products"),
    [
        ({}, 2),
        ({"bias": False}, 2),
        ({"stride": 2}, 0),
        ({"padding": 1}, 0),
        ({"groups": 2}, 0),
        ({"dilation": 3}, 2),
    ],
    ids=str,
)
def test_a_convolution_of_single_pixels_is_a_product(geometry, products, layout, dtype, monkeypatch):
    """Of views, channels last, so that the bias rides in it; any other stays a convolution."""
    given: list[torch.Tensor] = []
    linear = F.linear
    monkeypatch.setattr(layers, "on_gpu", lambda weight: True)
    monkeypatch.setattr(F, "linear", lambda x, *rest: given.append(x) or linear(x, *rest))
    module = nn.Conv2d(6, 8, 1, **geometry)
    layer = layers.convolution(module, precision=Precision("", dtype), pack=False, free=False)
    for size in ((2, 6, 5, 4), (1, 6, 1, 1)):
        x = torch.randn(size).to(dtype).to(memory_format=layout)
        y, wanted = layer(x), module(x.float())
        # weights, bias and result are rounded to 8 bits: sums of six products and a bias
        torch.testing.assert_close(y.float(), wanted, rtol=0, atol=2**-6 if dtype == torch.bfloat16 else 1e-6)
        if products:
            assert given[-1].ndim == 2 and y.is_contiguous(memory_format=torch.channels_last)
            if layout == torch.channels_last:
                assert given[-1].data_ptr() == x.data_ptr()
    assert len(given) == products
