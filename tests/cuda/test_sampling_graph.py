"""A whole sampling on the CUDA kernels: as one graph's capture would run them, against the CPU kernels."""

from __future__ import annotations

import pytest
import torch

from tests.cuda.conftest import Gpu
from tests.emulator import emulation
from tests.models.conftest import small_pair
from var_ext.engine import (
    PRECISIONS,
    Call,
    Engine,
    Graphs,
    Precision,
    SeededDraw,
    layers,
    named_precision,
    options_for,
)
from var_ext.engine.graph import capture_cuda_graph
from var_ext.ops import _native

OPTIONS = {"cfg": 2.0, "top_k": 12, "top_p": 0.9}


def rerun(run, _generators):
    """What a graph does, in the emulator: a replay writes where the capture wrote."""
    outputs = run()

    def replay():
        for place, value in zip(outputs, run(), strict=True):
            place.copy_(value)

    return replay, outputs


@pytest.mark.parametrize("mode", ["fp32", "bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_a_sampling_draws_the_tokens_of_the_cpu(gpu: Gpu, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    labels, seeds = torch.tensor([0, 3, 1]), torch.tensor([5, -6, 2**40])
    vae, var = small_pair()
    # heads of 32 channels, as the kernels take them
    device = gpu(labels).device
    options = options_for(var.schedule, **OPTIONS)
    with monkeypatch.context() as on_cpu, torch.inference_mode():
        on_cpu.setattr(_native, "is_gpu", lambda tensor: tensor.is_cuda)
        on_cpu.setattr(layers, "adds_bias_apart", lambda x: False)
        exact = Engine(var.eval(), named_precision("fp32", torch.device("cpu")), pack=True)
        draw = SeededDraw(seeds, options, vae.quantize.embedding.weight)
        expected = exact.sample(Call(labels, seeds, options), draw)
    vae.to(device)
    var.to(device)
    precision = named_precision(mode, torch.device("cuda")) if gpu.level == "hardware" else _precision(mode)
    engine = Engine(var, precision, pack=False)
    graphs = Graphs(engine, capture_cuda_graph if gpu.level == "hardware" else rerun)
    before = set(emulation.Stream.called)
    emulation.Stream.called.clear()
    images, tokens = graphs.sample(Call(gpu(labels), gpu(seeds), options))
    images, tokens = images.cpu(), tokens.cpu()
    same = (tokens == expected[1]).double().mean()
    assert same == 1 if mode == "fp32" else same > 0.8  # in 16 bits some draws fall on a rounding error
    if mode == "fp32":
        torch.testing.assert_close(images, expected[0], rtol=1e-4, atol=1e-4)
    again, _ = graphs.sample(
        Call(gpu(labels), gpu(seeds), options)
    )  # the first was eager, this one is captured
    torch.testing.assert_close(again.cpu(), images, rtol=1e-3, atol=1e-3)
    other, _ = graphs.sample(Call(gpu(labels.flip(0)), gpu(seeds.flip(0)), options))
    torch.testing.assert_close(other.cpu().flip(0), images, rtol=1e-3, atol=1e-3)
    if gpu.level == "emulated":
        kernels = {"adaln", "bias_gelu", "bias_residual", "cached_attention", "group_norm_silu"}
        assert kernels | {"residual_step", "sample_tokens"} <= emulation.Stream.called
    emulation.Stream.called.update(before)


@pytest.mark.parametrize("published", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_weights_of_nan_leave_the_device_alive(gpu: Gpu, published: bool) -> None:
    """They end as on a CPU, in an error after the call; a device assert would end all use of the GPU."""
    vae, var = small_pair()
    device = gpu(torch.zeros(1)).device
    vae.to(device)
    var.to(device)
    engine = Engine(var.eval(), Precision("fp32", torch.float32), pack=False)
    options, labels = options_for(var.schedule, **OPTIONS), torch.tensor([0, 3, 1])
    randomness = torch.Generator(device) if published else gpu(torch.arange(3))
    with torch.no_grad():
        var.class_emb.weight[3] = torch.nan
    for _ in range(3 if gpu.level == "hardware" else 1):  # eager, captured, replayed
        with pytest.raises(
            ValueError, match=r"finite maximum and no NaN, got a row without in image\(s\) 1 of"
        ):
            engine.draw(Call(gpu(labels), randomness, options))
        images, _ = engine.draw(Call(gpu(torch.tensor([0, 2, 1])), randomness, options))
        assert images.isfinite().all()


def _precision(mode: str):
    return Precision(mode, PRECISIONS[mode])
