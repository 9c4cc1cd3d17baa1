"""What published scripts use of the models; run with a checkout at hand on their own code: VAR_EXT_OFFICIAL=DIR."""

from __future__ import annotations

import copy
import importlib
import json
import os
import sys
import types
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

import var_ext
from tests.models.conftest import PATCH_NUMS, small_pair
from var_ext import Sampler
from var_ext.models import VAR, VARHF, VQVAE, VQVAEHF, VectorQuantizer2
from var_ext.models.var import gumbel_softmax_with_rng, sample_with_top_k_top_p_

OFFICIAL = os.environ.get("VAR_EXT_OFFICIAL", "")
with_official = pytest.mark.skipif(
    not OFFICIAL, reason="VAR_EXT_OFFICIAL names no checkout of the published code"
)


def test_attributes_of_the_published_class(pair):
    vae, var = pair
    assert var.patch_nums == PATCH_NUMS and var.num_stages_minus_1 == 3 and var.D == var.C == 64
    assert var.begin_ends == [(0, 1), (1, 5), (5, 14), (14, 30)] and var.prog_si == -1
    assert var.vae_quant_proxy[0] is vae.quantize and isinstance(vae.quantize, VectorQuantizer2)
    assert var.uniform_prob.shape == (1, 5) and vae.quantize.quant_resi_ratio == 0.5
    del var.rng
    var.rng = generator = torch.Generator()
    assert var.rng is generator
    copied = copy.deepcopy(var)
    assert isinstance(copied.rng, torch.Generator) and copied.rng is not generator
    assert "rng" not in "".join(var.state_dict())


@torch.no_grad()
def test_blocks_called_the_published_way_sample_as_the_engine_does(pair):
    """The loop of the published method, as the editing notebook has it, on our blocks: the same tokens and images."""
    vae, var = pair
    var.eval()
    rng, batch, labels, cfg = torch.Generator().manual_seed(5), 2, torch.tensor([1, 4]), 2.0
    cond = var.class_emb(torch.cat((labels, torch.full_like(labels, var.num_classes))))
    positions = var.lvl_embed(var.lvl_1L) + var.pos_1LC
    x = cond[:, None] + var.pos_start + positions[:, :1]
    f_hat, drawn = cond.new_zeros(batch, var.Cvae, 4, 4), []
    for block in var.blocks:
        block.attn.kv_caching(True)
    for si, side in enumerate(var.patch_nums):
        shared = var.shared_ada_lin(cond)
        for block in var.blocks:
            x = block(x=x, cond_BD=shared, attn_bias=None)
        logits, t = var.get_logits(x, cond), cfg * si / var.num_stages_minus_1
        logits = (1 + t) * logits[:batch] - t * logits[batch:]
        drawn.append(sample_with_top_k_top_p_(logits, rng=rng, top_k=12, top_p=0.9)[:, :, 0])
        codes = (
            var.vae_quant_proxy[0].embedding(drawn[-1]).transpose(1, 2).reshape(batch, var.Cvae, side, side)
        )
        f_hat, x = var.vae_quant_proxy[0].get_next_autoregressive_input(si, len(var.patch_nums), f_hat, codes)
        if si < var.num_stages_minus_1:
            begin, end = var.begin_ends[si + 1]
            x = var.word_embed(x.view(batch, var.Cvae, -1).transpose(1, 2)) + positions[:, begin:end]
            x = x.repeat(2, 1, 1)
    for block in var.blocks:
        block.attn.kv_caching(False)
    images, tokens = var.autoregressive_infer_cfg(
        batch, labels, g_seed=5, cfg=cfg, top_k=12, top_p=0.9, return_tokens=True
    )
    assert torch.equal(torch.cat(drawn, dim=1), tokens)
    torch.testing.assert_close(vae.fhat_to_img(f_hat).add(1).mul(0.5), images, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"call attn.kv_caching\(True\) first"):
        var.blocks[0](x=x, cond_BD=cond, attn_bias=None)


def test_gumbel_softmax():
    logits = torch.randn(2, 3, 7, requires_grad=True)
    soft, hard = (
        gumbel_softmax_with_rng(logits, hard=h, rng=torch.Generator().manual_seed(1)) for h in (False, True)
    )
    torch.testing.assert_close(soft.sum(-1), torch.ones(2, 3))
    assert torch.equal(hard.detach().argmax(-1), soft.argmax(-1)) and set(
        hard.detach().round().unique().tolist()
    ) == {0, 1}
    assert torch.autograd.grad((hard * torch.arange(7)).sum(), logits)[0].any()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_tokenizer_in_half_precision(dtype):
    vae = small_pair()[0]
    image = torch.rand(2, 3, 8, 8) * 2 - 1
    exact, half = vae.img_to_reconstructed_img(image), copy.deepcopy(vae).to(dtype)
    images = half.img_to_reconstructed_img(image.to(dtype))
    assert all(x.dtype == dtype and x.shape == (2, 3, 8, 8) for x in images)
    f_hat = torch.randn(2, 8, 4, 4)
    assert (half.fhat_to_img(f_hat).float() - vae.fhat_to_img(f_hat)).abs().max() < 0.1
    assert len(exact) == len(images) == 4
    tokens = half.img_to_idxBl(image.to(dtype))
    assert half.idxBl_to_img(tokens, same_shape=True, last_one=True).dtype == dtype


def test_progressive_tokens_of_the_published_trainer(pair):
    vae = pair[0]
    image = torch.rand(2, 3, 8, 8) * 2 - 1
    whole = vae.img_to_idxBl(image)
    vae.quantize.prog_si = 1
    assert [t.shape[1] for t in vae.img_to_idxBl(image)] == [1, 4]
    vae.quantize.prog_si = -1
    assert all(map(torch.equal, vae.img_to_idxBl(image), whole))


def test_the_hubs_classes_save_and_load(tmp_path):
    vae_kwargs = dict(vocab_size=24, z_channels=8, ch=32, ch_mult=(1, 2), v_patch_nums=PATCH_NUMS)
    var = VARHF(vae_kwargs, num_classes=5, depth=2, embed_dim=64, num_heads=2, patch_nums=PATCH_NUMS)
    var.save_pretrained(tmp_path / "var")
    again = VARHF.from_pretrained(tmp_path / "var")
    assert isinstance(again, VAR) and again.patch_nums == PATCH_NUMS
    assert all(map(torch.equal, again.state_dict().values(), var.state_dict().values()))
    vae = VQVAEHF(**vae_kwargs)
    vae.save_pretrained(tmp_path / "vae")
    loaded = VQVAEHF.from_pretrained(tmp_path / "vae")
    assert isinstance(loaded, VQVAE)
    assert all(map(torch.equal, loaded.state_dict().values(), vae.state_dict().values()))
    assert Sampler(again.vae_proxy[0], again, precision="fp32")([1], [2]).shape == (1, 3, 8, 8)


FOREIGN = ("models", "utils", "dist", "trainer")


@pytest.fixture
def official(monkeypatch):
    """The published modules on the path."""

    def forget() -> None:
        for name in [n for n in sys.modules if n.split(".")[0] in FOREIGN]:
            del sys.modules[name]

    monkeypatch.syspath_prepend(OFFICIAL)
    forget()
    monkeypatch.setattr(torch.cuda.amp, "autocast", lambda *_, **__: nullcontext())
    for kind in (nn.Linear, nn.LayerNorm, nn.Conv2d):  # the published builders replace these for good
        monkeypatch.setattr(kind, "reset_parameters", kind.reset_parameters)
    yield
    forget()


def both_pairs():
    """Our models, and instances of the published classes with the same weights; 64 px, all gates open."""
    theirs = importlib.import_module("models")
    torch.manual_seed(0)
    sizes = dict(vocab_size=24, z_channels=8, ch=32, v_patch_nums=PATCH_NUMS)
    more = dict(num_classes=5, depth=2, embed_dim=64, num_heads=2, attn_l2_norm=True, patch_nums=PATCH_NUMS)
    more["drop_path_rate"] = 0.2
    vae = VQVAE(**sizes)
    var = VAR(vae, **more)
    var.init_weights(init_adaln_gamma=1.0, init_head=1.0, init_std=0.2)
    published_vae = theirs.VQVAE(**sizes)
    published_vae.load_state_dict(vae.state_dict())
    published_var = theirs.VAR(published_vae, **more)
    published_var.load_state_dict(var.state_dict())
    return (vae, var), (published_vae, published_var)


@with_official
def test_the_published_model_is_accelerated_and_its_changes_refused(official):
    _, (_, published) = both_pairs()
    arguments = dict(B=2, label_B=torch.tensor([1, 4]), g_seed=3, cfg=2.0, top_k=12, top_p=0.9)
    expected = published.eval().autoregressive_infer_cfg(**arguments)
    torch.testing.assert_close(
        var_ext.accelerate(published).autoregressive_infer_cfg(**arguments), expected, rtol=1e-4, atol=1e-4
    )
    published.blocks[1].ffn.act = nn.ReLU()
    with pytest.raises(TypeError, match=r"blocks.1.ffn.* is off by"):
        var_ext.accelerate(published)


@with_official
@torch.no_grad()
def test_the_editing_notebook_runs_on_our_classes(official):
    """Its function as it stands, with its imports pointed at var_ext: the images that it draws with the published
    classes."""
    cells = json.loads((Path(OFFICIAL) / "demo_zero_shot_edit.ipynb").read_text())["cells"]
    (cell,) = (
        "".join(c["source"])
        for c in cells
        if "def autoregressive_infer_cfg_with_mask" in "".join(c["source"])
    )
    results = []
    for source, (vae, var) in zip(
        (cell.replace("from models", "from var_ext.models"), cell), both_pairs(), strict=True
    ):
        space: dict[str, object] = {}
        exec(source, space)
        image = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
        mask = space["get_edit_mask"](var.patch_nums, 0.2, 0.2, 0.7, 0.7, "cpu")
        results.append([
            space["autoregressive_infer_cfg_with_mask"](
                var.eval(), 2, torch.tensor([5, 2]), g_seed=0, cfg=3, top_k=12, top_p=0.9, more_smooth=smooth,
                input_img_tokens=vae.img_to_idxBl(image, var.patch_nums), edit_mask=mask,
            )
            for smooth in (False, True)
        ])  # fmt: skip
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-4)
    # magnifies last bits, and sums run in another order here
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-2, atol=1e-2)


@with_official
def test_the_published_trainer_trains_our_classes(official, monkeypatch):
    """VARTrainer with its import pointed at var_ext: its losses and gradient norms, progressive stages too."""
    pairs, logs = both_pairs(), []
    optimizers = importlib.import_module("utils.amp_sc")
    monkeypatch.setitem(
        sys.modules, "utils.misc", types.SimpleNamespace(MetricLogger=None, TensorboardLogger=None)
    )
    for kind, (vae, var) in zip(("var_ext.models", "models"), pairs, strict=True):
        with monkeypatch.context() as imports:
            imports.setitem(sys.modules, "models", importlib.import_module(kind))
            sys.modules.pop("trainer", None)
            trainers = importlib.import_module("trainer")
        names, parameters = zip(*var.named_parameters(), strict=True)
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05)
        trainer = trainers.VARTrainer(
            "cpu", PATCH_NUMS, tuple(16 * p for p in PATCH_NUMS), vae, var, var,
            optimizers.AmpOptimizer(0, optimizer, names, parameters, 2.0), 0.0,
        )  # fmt: skip
        var.train()
        log: list[dict[str, float]] = []
        metrics = types.SimpleNamespace(
            log_iters=range(100), update=lambda log=log, **values: log.append(values)
        )
        board = types.SimpleNamespace(update=lambda **_: None)
        torch.manual_seed(7)
        for step, scale in enumerate([3, 3, 3, 1, 1, 2, 2, 3, 3, 3]):
            generator = torch.Generator().manual_seed(step)
            images = torch.rand(4, 3, 64, 64, generator=generator) * 2 - 1
            labels = torch.randint(5, (4,), generator=generator)
            trainer.train_step(step, step, True, metrics, board, images, labels, scale, 2.0)
        logs.append(log)
    for ours, theirs in zip(*logs, strict=True):
        assert ours["Lm"] == pytest.approx(theirs["Lm"], rel=1e-4) and ours["tnm"] == pytest.approx(
            theirs["tnm"], rel=1e-3
        )
        assert ours["Lt"] == pytest.approx(theirs["Lt"], rel=1e-4) and ours["Accm"] == theirs["Accm"]
