"""The loop over scales: batches, precisions, guidance, hooks, changes of weights."""

from __future__ import annotations

import copy
import gc
import pickle
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.models.conftest import small_pair
from var_ext import Sampler
from var_ext.bench import Watched
from var_ext.engine import Call, Engine, SeededDraw, named_precision, options_for
from var_ext.engine.execution import Execution
from var_ext.engine.layers import Int8Linear, PackedLinear, linear

CPU = torch.device("cpu")
MODES = ["fp32", "bf16", "int8"]
LABELS = torch.arange(9) % 5
SEEDS = 7 * torch.arange(9)


def engine_of(pair, mode: str, pack: bool = True) -> Engine:
    return Engine(pair[1].eval(), named_precision(mode, CPU), pack=pack)


@torch.inference_mode()
def sample(engine: Engine, labels=LABELS, seeds=SEEDS, *, edit=None, **options):
    chosen = options_for(engine.schedule, **{"cfg": 2.0, "top_k": 12, "top_p": 0.9, **options})
    draw = SeededDraw(seeds, chosen, engine.vae.quantize.embedding.weight.float())
    return engine.sample(Call(labels, seeds, chosen, edit=edit), draw)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cfg", [0.0, 2.0])
def test_images_do_not_depend_on_their_batch_in_a_single_bit(pair, mode, cfg):
    engine = engine_of(pair, mode)
    images, tokens = sample(engine, cfg=cfg)
    for rows in (slice(0, 1), slice(3, 8)):
        part = sample(engine, LABELS[rows], SEEDS[rows], cfg=cfg)
        assert torch.equal(part[1], tokens[rows]) and torch.equal(part[0], images[rows])


@pytest.mark.parametrize("pack", [False, True])
def test_float32_gives_the_tokens_of_the_training_pass(pair, pack):
    """Whatever is packed, fused or cached: logits of both ways to them agree, so draws do."""
    engine, var = engine_of(pair, "fp32", pack), pair[1]
    kept = []

    def edit(codes, k):
        kept.append(codes)
        return codes

    _, tokens = sample(engine, cfg=0.0, top_k=1, top_p=0.0, edit=edit)
    given = [tokens[:, s] for s in var.schedule.slices]
    with torch.no_grad():
        logits = var(LABELS, pair[0].quantize.idxBl_to_var_input(given))
    best = logits.topk(2, dim=-1).values
    sure = best[..., 0] - best[..., 1] > 1e-4  # far above the rounding of float32
    assert torch.equal(logits.argmax(dim=-1)[sure], tokens[sure]) and sure.double().mean() > 0.9
    assert [codes.shape[1] for codes in kept] == list(var.schedule.lengths)


@pytest.mark.parametrize(("mode", "off"), [("bf16", 0.03), ("int8", 0.1)])
def test_low_precision_stays_near_float32(pair, mode, off):
    """Relative to the spread of logits: bfloat16 has 8 bits, int8 has 7 and two roundings a layer."""
    logits = {}
    for name in ("fp32", mode):
        engine, kept = engine_of(pair, name), []

        def draw(found, k, cfg, kept=kept):
            kept.append(found[:3].float())
            return torch.zeros(3, found.shape[1], pair[1].Cvae)

        with torch.inference_mode():
            for _ in engine.generate(Call(LABELS[:3], None, options_for(engine.schedule)), draw):
                pass
        logits[name] = torch.cat(kept, dim=1)
    error = (logits[mode] - logits["fp32"]).square().mean().sqrt() / logits["fp32"].std()
    assert 0 < error < off


@pytest.mark.parametrize("mode", MODES)
def test_mixing_before_the_head_is_guidance(pair, mode):
    """Logits of the mixture are the mixture of logits, up to the rounding of the precision."""
    engine, seen = engine_of(pair, mode), []
    head = engine.parts().var.head
    hidden = torch.randn(6, 4, pair[1].C, dtype=engine.precision.dtype)
    with torch.inference_mode():
        logits, left = engine._logits(head, hidden, 3, 1.7)
        cond, uncond = head(hidden).float().chunk(2)
    seen = logits.float()
    if mode == "fp32":
        assert left == 1.7 and seen.shape[0] == 6
        seen, left = (1 + left) * seen[:3] - left * seen[3:], None
    expected = 2.7 * cond - 1.7 * uncond
    assert left is None and seen.shape == expected.shape
    tolerance = {"fp32": 1e-5}.get(mode, 2.0**-7 * 4.4)  # each half is rounded before it is scaled
    assert (seen - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("mode", MODES)
def test_the_draw_mixes_where_the_device_keeps_guidance(pair, mode, monkeypatch):
    """What a graph reads anew, and all guidance on a GPU: the draw's kernel gets both halves."""
    engine, t = engine_of(pair, mode), torch.tensor([1.7, -0.25, 4.0], dtype=torch.float64)
    head, hidden = engine.parts().var.head, torch.randn(6, 4, pair[1].C, dtype=engine.precision.dtype)
    with torch.inference_mode():
        logits, left = engine._logits(head, hidden, 3, t)
        assert left is t and torch.equal(logits, head(hidden))
        monkeypatch.setattr("var_ext.engine.engine.on_gpu", lambda tensor: True)
        logits, left = engine._logits(head, hidden, 3, 1.7)
        assert left == 1.7 and torch.equal(logits, head(hidden))


@pytest.mark.parametrize("until", [0, 2, 4])
def test_halves_without_guidance_are_not_computed(pair, until):
    engine, rows = engine_of(pair, "fp32"), []
    pair[1].blocks[0].attn.register_forward_hook(lambda module, given, out: rows.append(len(out)))
    _, tokens = sample(engine, cfg_until=until)
    assert rows == [18] * until + [9] * (4 - until)
    ramp = [2.0 * engine.schedule.ratio(k) if k < until else 0.0 for k in range(4)]
    assert torch.equal(sample(engine, cfg=ramp)[1], tokens)


def test_a_guidance_of_zero_between_others_keeps_the_halves(pair):
    engine = engine_of(pair, "fp32")
    options = options_for(engine.schedule, cfg=[1.0, 0.0, 2.0, 0.0])
    assert options.guided_scales == 3
    assert sample(engine, cfg=[1.0, 0.0, 2.0, 0.0])[1].shape == (9, 30)


def test_more_smooth_mixes_codes_from_a_stream_an_image(pair):
    engine = engine_of(pair, "fp32")
    plain, tokens = sample(engine)
    smooth, smooth_tokens = sample(engine, more_smooth=True)
    assert torch.equal(tokens[:, :1], smooth_tokens[:, :1])  # the same draws, until the mixture enters f_hat
    assert not torch.equal(plain, smooth)
    assert torch.equal(sample(engine, LABELS[4:5], SEEDS[4:5], more_smooth=True)[0], smooth[4:5])


def test_a_low_temperature_draws_the_likeliest(pair):
    engine = engine_of(pair, "fp32")
    greedy = sample(engine, top_k=1)[1]
    cold = sample(engine, top_k=0, top_p=0.0, temperature=1e-4)[1]
    assert (cold == greedy).double().mean() > 0.99  # but for near-ties
    assert not torch.equal(sample(engine, temperature=[1, 1, 1, 3])[1], sample(engine)[1])


def test_edit_changes_codes(pair):
    engine = engine_of(pair, "fp32")
    plain, _ = sample(engine)
    blank, _ = sample(engine, edit=lambda codes, k: torch.zeros_like(codes))
    assert not torch.equal(plain, blank) and torch.equal(blank[0], blank[1])


@pytest.mark.parametrize("mode", MODES)
def test_a_change_of_weights_is_seen(mode):
    pair = small_pair()
    engine = engine_of(pair, mode)
    before = sample(engine)[0]
    assert torch.equal(sample(engine)[0], before)
    parts = engine.parts()
    with torch.no_grad():
        pair[1].blocks[1].ffn.fc2.weight.mul_(-2)
    assert engine.parts() != parts
    assert not torch.equal(sample(engine)[0], before)
    with torch.no_grad():
        pair[0].decoder.conv_out.bias.add_(0.25)
    after = sample(engine)[0]
    pair[0].decoder.conv_out.bias = nn.Parameter(pair[0].decoder.conv_out.bias.detach() + 0.25)
    last = sample(engine)[0]
    assert not torch.equal(last, after)
    with torch.no_grad():
        pair[1].head.weight.data.neg_()  # leaves no trace
    engine.refresh()
    assert not torch.equal(sample(engine)[0], last)
    calls: list[int] = []
    pair[1].blocks[0].attn.proj.register_forward_hook(lambda *_: calls.append(1))
    sample(engine)
    assert len(calls) == 4


class Wrapped(nn.Module):
    """As adapters are."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("mode", MODES)
def test_adapters_and_hooks_are_called(mode):
    pair = small_pair()
    plain = sample(engine_of(pair, mode))[0]
    proj = pair[1].blocks[0].attn.proj
    pair[1].blocks[0].attn.proj = Doubled(proj.in_features, proj.out_features)
    pair[1].blocks[0].attn.proj.load_state_dict(proj.state_dict())
    assert not torch.equal(sample(engine_of(pair, mode))[0], plain)
    calls = []
    for layer in (pair[1].blocks[1].ffn.fc1, pair[0].decoder.conv_in, pair[0].decoder.up[1].upsample.conv):
        layer.register_forward_hook(lambda *_: calls.append(1))
    sample(engine_of(pair, mode), LABELS[:1], SEEDS[:1])
    assert len(calls) == 4 + 2


def test_layers_are_what_the_precision_says():
    module = nn.Linear(24, 40)
    x = torch.randn(3, 5, 24)
    kinds = {mode: linear(module, named_precision(mode, CPU), pack=True, int8=True) for mode in MODES}
    assert isinstance(kinds["fp32"], PackedLinear) and isinstance(kinds["int8"], Int8Linear)
    exact = module(x)
    for mode, off in (("fp32", 1e-6), ("bf16", 0.02), ("int8", 0.03)):
        y = kinds[mode](x.to(named_precision(mode, CPU).dtype))
        assert y.shape == exact.shape and (y.float() - exact).abs().max() < off * exact.abs().max()
    assert not isinstance(linear(module, named_precision("fp32", CPU), pack=False), PackedLinear)


def test_rows_of_nan_stay_nan_in_int8():
    layer = linear(nn.Linear(8, 8), named_precision("int8", CPU), pack=True, int8=True)
    x = torch.randn(3, 8, dtype=torch.bfloat16)
    x[1, 2] = torch.nan
    y = layer(x)
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


def test_the_loop_copies_no_cache(pair):
    """Between the first logits and the last nothing is concatenated, and keys and values stay where they are."""
    engine, names, caches = engine_of(pair, "bf16"), [], set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(str(func))
            if "cached_attention" in str(func):
                caches.add(args[1].data_ptr())
            return func(*args, **(kwargs or {}))

    kept = []
    with Watch(), torch.no_grad():
        options = options_for(engine.schedule, cfg=2.0, top_k=12)
        draw = Watched(SeededDraw(SEEDS, options, engine.codebook), lambda: kept.append(len(names)))
        for _ in engine.generate(Call(LABELS, SEEDS, options), draw):
            pass
    loop = names[kept[0] :]
    assert len(caches) == len(pair[1].blocks)  # one place a block, at every scale
    assert not [name for name in loop if "cat" in name.split(".")[1]]


def test_copies_and_pickles_pack_anew(pair):
    engine = engine_of(pair, "int8")
    images = sample(engine)[0]
    for other in (copy.deepcopy(engine), pickle.loads(pickle.dumps(engine))):
        assert other.var is not engine.var and torch.equal(sample(other)[0], images)
    released = Engine(pair[1], named_precision("bf16", CPU), pack=True, release=True)
    copy.deepcopy(released).parts()
    released.parts()
    with pytest.raises(TypeError, match="released the model's weights cannot be copied"):
        copy.deepcopy(released)


def test_released_weights_leave_adapters_alone():
    """What has to be called keeps its weights; what failed halfway says so."""
    pair = small_pair()
    pair[1].blocks[0].attn.proj = Wrapped(pair[1].blocks[0].attn.proj)
    expected = sample(engine_of(pair, "bf16"))[0]
    engine = Engine(pair[1], named_precision("bf16", CPU), pack=True, release=True)
    assert torch.equal(sample(engine)[0], expected)
    assert (
        pair[1].blocks[0].attn.proj.inner.weight.numel() and not pair[1].blocks[0].attn.mat_qkv.weight.numel()
    )
    half, pair[1].head = Engine(small_pair()[1], named_precision("bf16", CPU), pack=True, release=True), None
    half.vae.decoder = None
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        half.parts()
    with pytest.raises(RuntimeError, match="released before all were packed: load the model again"):
        half.parts()


def test_autocast_around_a_sampling_is_the_callers_between_scales(pair):
    engine = engine_of(pair, "fp32")
    options = options_for(engine.schedule)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        draw = SeededDraw(SEEDS, options, engine.codebook)
        for _ in engine.generate(Call(LABELS, SEEDS, options), draw):
            assert torch.is_autocast_enabled("cpu")
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("release", [False, True])
def test_threads_wait_for_one_packing(release, monkeypatch):
    _, var = small_pair()
    expected = sample(engine_of(small_pair(), "bf16"), LABELS[:2], SEEDS[:2])[0]
    engine = Engine(var.eval(), named_precision("bf16", CPU), pack=True, release=release)
    slow = Execution.copy
    monkeypatch.setattr(Execution, "copy", lambda *given, **more: time.sleep(0.001) or slow(*given, **more))
    with ThreadPoolExecutor(6) as pool:
        drawn = list(pool.map(lambda _: sample(engine, LABELS[:2], SEEDS[:2])[0], range(6)))
    assert engine.builds == 1 and all(torch.equal(images, expected) for images in drawn)


def test_an_engine_goes_with_its_last_reference(pair):
    """Its weights are gigabytes, and the collector of circles may come late."""
    sampler = Sampler(*pair, precision="fp32")
    sampler([0], [1])
    gone = weakref.ref(sampler.engine)
    gc.disable()
    try:
        del sampler
        assert gone() is None
    finally:
        gc.enable()
