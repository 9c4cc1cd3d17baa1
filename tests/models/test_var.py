"""The transformer beyond the golden cases: compilation, prefixes, sampling against teacher forcing, arguments."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.models.conftest import small_pair
from var_ext import backend
from var_ext.engine import Call, Engine, named_precision, options_for
from var_ext.models.modules import Dropout
from var_ext.models.var import Stream, Whole


def teacher_forcing(vae, var, batch=3):
    tokens = torch.randint(vae.vocab_size, (batch, var.L))
    x = vae.quantize.idxBl_to_var_input([tokens[:, s] for s in var.schedule.slices])
    return tokens, x


@pytest.mark.parametrize("choice", backend.CHOICES)
@pytest.mark.parametrize("shared", [False, True])
def test_a_block_compiles_without_graph_breaks(choice, shared):
    _, var = small_pair(shared_aln=shared)
    block = var.blocks[0]
    x, cond = (torch.randn(2, var.L, var.C), torch.randn(2, 6 * var.C if shared else var.C))

    def forward(x, cond):
        stream = block(Stream(x), block.modulation(cond, x.dtype), Whole(var.schedule))
        return stream.x + stream.gate[:, None] * stream.branch

    with backend.force(choice):
        torch._dynamo.reset()
        compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
        # the same float32 arithmetic in another order
        torch.testing.assert_close(compiled(x, cond), forward(x, cond), rtol=1e-4, atol=1e-5)
        (mine,) = torch.autograd.grad(compiled(x.requires_grad_(), cond).sum(), x)
        (eager,) = torch.autograd.grad(forward(x, cond).sum(), x)
        torch.testing.assert_close(mine, eager, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_sampling_logits_equal_those_of_teacher_forcing(pair):
    vae, var = pair
    var.eval()
    tokens, x = teacher_forcing(vae, var)
    labels = torch.tensor([0, 4, 2])
    cached = []

    def draw(logits, k, cfg):
        cached.append(logits[:3])
        return vae.quantize.embedding(tokens[:, var.schedule.slices[k]])

    engine = Engine(var, named_precision("fp32", labels.device), pack=False)
    for _ in engine.generate(Call(labels, None, options_for(var.schedule, cfg=1.0)), draw):
        pass
    # the cache replaces the mask: the same sums in another order
    torch.testing.assert_close(torch.cat(cached, dim=1), var(labels, x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("scales", [1, 2, 3, 4])
def test_a_prefix_of_the_scales_gives_the_first_logits(pair, scales):
    vae, var = pair
    var.eval()
    tokens, x = teacher_forcing(vae, var)
    labels = torch.tensor([1, 2, 3])
    short = vae.quantize.idxBl_to_var_input([tokens[:, s] for s in var.schedule.slices[:scales]])
    end = var.schedule.slices[scales - 1].stop
    torch.testing.assert_close(var(labels, short), var(labels, x)[:, :end], rtol=1e-4, atol=1e-5)


def test_labels_are_dropped_in_training_only():
    vae, var = small_pair(cond_drop_rate=1.0)
    _, x = teacher_forcing(vae, var)
    labels = torch.tensor([0, 1, 2])
    with torch.no_grad():
        no_class = var.eval()(torch.full((3,), var.num_classes), x)
        assert not torch.allclose(var(labels, x), no_class)
        torch.testing.assert_close(var.train()(labels, x), no_class)


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    _, var = small_pair(drop_path_rate=0.5)
    drop = var.blocks[-1].drop_path.train()
    gate = drop(torch.ones(4000, 3))
    assert set(gate.unique().tolist()) == {0.0, 2.0}
    assert (gate.std(dim=1) == 0).all()
    assert abs(gate.mean().item() - 1) < 0.06  # 4 standard deviations of 4000 draws
    assert torch.equal(drop.eval()(torch.ones(2, 3)), torch.ones(2, 3))


def test_every_parameter_gets_a_gradient(pair):
    vae, var = pair
    tokens, x = teacher_forcing(vae, var)
    F.cross_entropy(var(torch.tensor([0, 1, 2]), x).flatten(0, 1), tokens.flatten()).backward()
    assert [name for name, p in var.named_parameters() if p.grad is None or not p.grad.any()] == []


@torch.no_grad()
def test_autocast_and_bf16_weights_stay_near_float32(pair):
    vae, var = pair
    var.eval()
    _, x = teacher_forcing(vae, var)
    labels = torch.tensor([0, 1, 2])
    exact = var(labels, x)
    seen = []
    for layer in (var.word_embed, var.head, var.blocks[0].ffn.fc1):
        layer.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        low = var(labels, x)
    # input, blocks, output: all but the input are autocast, as published
    assert seen == [torch.float32, torch.bfloat16, torch.bfloat16]
    # bf16 has 8 bits; errors of a few layers add up
    assert (low - exact).abs().max() < 0.05 * exact.abs().max()
    assert (var.bfloat16()(labels, x) - exact).abs().max() < 0.05 * exact.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("label", [None, 3, -1])
def test_labels_of_sampling_may_be_left_out_or_shared(pair, label):
    _, var = pair
    var.eval()
    images, tokens = var.autoregressive_infer_cfg(2, label, g_seed=1, return_tokens=True)
    assert images.shape == (2, 3, 8, 8) and tokens.shape == (2, var.L)
    assert images.min() >= 0 and images.max() <= 1
    again = var.autoregressive_infer_cfg(2, label, g_seed=1)
    assert torch.equal(images, again)


@torch.no_grad()
@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8, np.uint64])
def test_labels_and_seeds_of_numpy_are_taken(pair, kind):
    _, var = pair
    var.eval()
    wanted = var.autoregressive_infer_cfg(2, torch.tensor([1, 4]), 7)
    for labels in (np.array([1, 4], kind), [kind(1), kind(4)], torch.from_numpy(np.array([1, 4], kind))):
        assert torch.equal(var.autoregressive_infer_cfg(2, labels, kind(7)), wanted)
    one = var.autoregressive_infer_cfg(2, 3, 2**64 - 1)
    for label in (kind(3), np.array(3, kind), torch.tensor(3)):
        assert torch.equal(var.autoregressive_infer_cfg(np.int64(2), label, np.uint64(2**64 - 1)), one)


@pytest.mark.parametrize(
    ("label", "seed", "error", "message"),
    [
        (1.7, 0, TypeError, "label_B must be integers, got float32"),
        (True, 0, TypeError, "label_B must be integers, got bool"),
        (np.array([1.0, 2.0]), 0, TypeError, "label_B must be integers, got float64"),
        (np.array([1, 2, 3]), 0, ValueError, r"label_B must be \(2,\) int64, got \(3,\)"),
        (np.uint64(2**64 - 1), 0, ValueError, r"label_B must be below 2\^63, got \[18446744073709551615\]"),
        (1, 0.5, TypeError, "g_seed must be integers, got float32"),
        (1, 2**64, ValueError, "g_seed must be integers of 64 bits, got 18446744073709551616"),
    ],
)
def test_what_is_no_label_or_seed_is_named(pair, label, seed, error, message):
    with pytest.raises(error, match=message):
        pair[1].autoregressive_infer_cfg(2, label, seed)


@torch.no_grad()
@pytest.mark.parametrize("label", [None, 2, []])
def test_an_empty_batch_gives_no_images(pair, label):
    _, var = pair
    label = torch.tensor(label, dtype=torch.int64) if label == [] else label
    images, tokens = var.eval().autoregressive_infer_cfg(0, label, return_tokens=True)
    assert images.shape == (0, 3, 8, 8) and tokens.shape == (0, var.L)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 0}, "must be at least 1, got 5, 0, 64, 2"),
        ({"embed_dim": 63}, "multiple of num_heads, got 63 and 2"),
        ({"attn_drop_rate": 0.1}, "attn_drop_rate must be 0, got 0.1"),
        ({"patch_nums": (1, 2, 4)}, r"tokenizer's \(1, 2, 3, 4\), got \(1, 2, 4\)"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        small_pair(**options)


def test_wrong_inputs_are_named(pair):
    vae, var = pair
    with pytest.raises(ValueError, match=r"labels must be in 0..5 \(5: no class\), got \[6\]"):
        var.autoregressive_infer_cfg(2, torch.tensor([0, 6]))
    with pytest.raises(ValueError, match=r"label_B must be \(3,\) int64, got \(2,\) torch.int64"):
        var.autoregressive_infer_cfg(3, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"top_p must be in \[0, 1\], got 1.5"):
        var.autoregressive_infer_cfg(1, 0, top_p=1.5)
    with pytest.raises(ValueError, match=r"labels must be in 0..5 \(5: no class\), got \[99\]"):
        var(torch.tensor([99]), None)
    with pytest.raises(ValueError, match=r"= \(2, \*, 8\), got \(1, 4, 8\)"):
        var(torch.tensor([0, 1]), torch.zeros(1, 4, 8))
    with pytest.raises(ValueError, match=r"must have one of \[1, 5, 14, 30\] tokens, got 8"):
        var(torch.tensor([0]), torch.zeros(1, 7, var.Cvae))
    with pytest.raises(ValueError, match=r"images must have shape \(B, 3, S, S\) .* got \(1, 1, 8, 8\)"):
        vae.features(torch.zeros(1, 1, 8, 8))


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_what_is_put_in_place_of_fc1_or_hooked_onto_it_is_called(pair):
    """Adapters, quantized layers and hooks work as on any `nn.Linear`, though the plain layer is not called."""
    ffn = pair[1].blocks[0].ffn
    x = torch.randn(2, 3, ffn.fc1.in_features)
    plain, seen = ffn(x), []
    handle = ffn.fc1.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(ffn(x), plain)  # two ways to the same sums
    handle.remove()
    assert seen == [1]
    doubled = Doubled(ffn.fc1.in_features, ffn.fc1.out_features)
    doubled.load_state_dict(ffn.fc1.state_dict())
    ffn.fc1 = doubled
    expected = ffn.fc2(F.gelu(doubled(x), approximate="tanh"))
    torch.testing.assert_close(ffn(x), expected)


def test_training_with_dropout_compiles_and_drops_the_right_share():
    drop = Dropout(0.25)
    x = torch.ones(40_000)
    y = drop(x)
    # 40000 draws: the share is within 0.25 +- 0.01, 4.6 standard deviations
    assert abs(float((y == 0).double().mean()) - 0.25) < 0.01
    torch.testing.assert_close(y[y != 0], torch.full_like(y[y != 0], 4 / 3))
    torch._dynamo.reset()
    assert torch.compile(drop, fullgraph=True, backend="aot_eager")(x).eq(0).any()
    assert torch.equal(drop.eval()(x), x)


def test_a_block_works_under_checkpointing(pair):
    var = pair[1]
    block, cond = var.blocks[0], torch.randn(2, var.C)
    x = torch.randn(2, var.L, var.C, requires_grad=True)
    modulation = block.modulation(cond, x.dtype)
    given = Stream(x, torch.randn_like(x), torch.randn(2, var.C))
    for reentrant in (False, True):
        out = checkpoint(block, given, modulation, Whole(var.schedule), use_reentrant=reentrant)
        torch.testing.assert_close(out[1], block(given, modulation, Whole(var.schedule)).branch)
