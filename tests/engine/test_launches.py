"""How many kernels a sampling of the published d16 launches on a GPU, by part: 16 blocks, ten scales, batch 1."""

from __future__ import annotations

import pytest
import torch

from tests.launches import CountedStream, Launches
from var_ext.engine import Call, Engine, Graphs, Precision, layers, options_for
from var_ext.models import VAR, VQVAE
from var_ext.ops import _native
from var_ext.schedule import SCALES_256


def counted(monkeypatch: pytest.MonkeyPatch, precision: Precision) -> Launches:
    """Of what a graph captures. Widths are small: no count depends on them."""
    vae = VQVAE(vocab_size=32, z_channels=8, ch=32, v_patch_nums=SCALES_256)
    var = VAR(
        vae, num_classes=5, depth=16, embed_dim=64, num_heads=2, attn_l2_norm=True, patch_nums=SCALES_256
    )
    vae.decoder.to(memory_format=torch.channels_last)  # as the engine lays weights out on a GPU
    vae.post_quant_conv.to(memory_format=torch.channels_last)
    launches = Launches()
    monkeypatch.setattr(_native, "is_gpu", lambda tensor: True)
    monkeypatch.setattr(_native, "gpu_stream", lambda tensor: CountedStream(launches))
    monkeypatch.setattr(_native, "_multiprocessors_of", lambda device: 132)
    monkeypatch.setattr(layers, "on_gpu", lambda weight: True)
    monkeypatch.setattr(layers, "adds_bias_apart", lambda x: True)
    monkeypatch.setattr(layers, "_has_packed_layers", lambda dtype: False)  # a CPU's
    engine = Engine(var.eval(), precision, pack=True)

    def capture(run, _generators):
        parts = engine.parts()
        for owner, method, part in (
            (parts.var, "transform", "blocks"),
            (parts.var, "modulations", "adaln"),
            (engine, "decode", "decoder"),
        ):
            monkeypatch.setitem(owner.__dict__, method, launches.during(getattr(owner, method), part))
        launches.parts.clear()
        launches.ops.clear()
        with launches:
            outputs = run()
        return lambda: None, outputs

    graphs, options = Graphs(engine, capture), options_for(var.schedule, cfg=4.0, top_k=9, top_p=0.9)
    for _ in range(2):  # the first one is eager and lays weights out
        graphs.sample(Call(torch.tensor([3]), torch.tensor([7]), options))
    return launches


def test_of_a_captured_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = counted(monkeypatch, Precision("bf16", torch.bfloat16))
    per_layer = {op: count / 160 for (part, op), count in launches.ops.items() if part == "blocks" and count}
    # the two largest of ten scales have more queries than a block of attention takes, and qk_norm apart
    assert per_layer == {"adaln": 2, "addmm": 2, "mm": 1, "_addmm_activation": 1, "cached_attention": 1.2}
    assert launches.parts == {"blocks": 1152, "between scales": 75, "adaln": 3, "decoder": 191}


def test_an_unknown_op_is_an_error() -> None:
    x = torch.ones(3)
    with pytest.raises(NotImplementedError, match=r"how many kernels is aten\.sort\.default"), Launches():
        x.sort()
