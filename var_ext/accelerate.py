"""The published model, faster: `accelerate` takes an instance of its VAR class and uses this project's engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from var_ext import _torch
from var_ext.checkpoints import CheckpointError
from var_ext.checkpoints.model_folder import build_vae, build_var, fill
from var_ext.checkpoints.sizes import deduce_vae, deduce_var
from var_ext.engine import PRECISIONS, Engine, Precision, precision_in_force, published_sample
from var_ext.engine.compare import UnsupportedModel, first_difference, modified_part
from var_ext.models import VAR
from var_ext.sampling import Sampler

PARTS = ("autoregressive_infer_cfg", "num_classes", "num_heads", "patch_nums", "vae_proxy", "blocks")
TOKENIZER_PARTS = ("encoder", "decoder", "quantize", "quant_conv", "post_quant_conv")


class Accelerated:
    """What `accelerate` returns: the published method, and a `Sampler` for everything else.

    Attributes:
        var: the weights of the given model behind this project's `VAR`.
        sampler: samples by (label, seed), streams, edits; see `Sampler`.
    """

    def __init__(self, var: VAR, dtype: str | torch.dtype | None, release: bool) -> None:
        self.var, self._follows = var, dtype is None
        self.num_classes = var.num_classes
        self._shared: dict[Precision, Engine] = {}
        if dtype is None:
            dtype = precision_in_force(var.pos_start).name
            dtype = dtype if dtype in PRECISIONS else "fp32"
        self.sampler = Sampler(var.vae_proxy[0], var, precision=dtype, release=release)

    @property
    def engine(self) -> Engine:
        """The engine in use: the sampler's, or one in the model's or autocast's precision that shares weights."""
        if not self._follows:
            return self.sampler.engine
        precision = precision_in_force(self.var.pos_start)
        if precision not in self._shared:
            self._shared = {precision: Engine(self.var, precision, pack=False)}  # only one: casts take memory
        return self._shared[precision]

    @torch.no_grad()
    def autoregressive_infer_cfg(
        self,
        B: int,
        label_B: int | Sequence[int] | Tensor | None,
        g_seed: int | None = None,
        cfg: float = 1.5,
        top_k: int = 0,
        top_p: float = 0.0,
        more_smooth: bool = False,
        *,
        seeds: Sequence[int] | Tensor | None = None,
        return_tokens: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The published method: the same random numbers for the same g_seed on the same type of device.

        Args:
            B, label_B, g_seed, cfg, top_k, top_p, more_smooth: as published.
            seeds: (B,) integers: one random stream per image, as in `Sampler`, instead of one for the batch.
            return_tokens: also return the drawn tokens.

        Returns:
            images (B, 3, S, S) float32 in [0, 1]; with `return_tokens` also tokens (B, L) int64.

        Raises:
            ValueError: a label, a seed or an option is out of range, labels or seeds are not (B,), or both g_seed and
                seeds are given.
            TypeError: labels or seeds are not integers.
        """
        images, tokens = published_sample(
            self.engine,
            B,
            label_B,
            g_seed,
            cfg=cfg,
            top_k=top_k,
            top_p=top_p,
            more_smooth=more_smooth,
            seeds=seeds,
        )
        return (images, tokens) if return_tokens else images


def accelerate(
    model: nn.Module,
    dtype: str | torch.dtype | None = None,
    *,
    release: bool = False,
    check: bool = True,
) -> Accelerated:
    """A faster version of a published VAR model, on the same weights.

    The parameters are shared: later in-place changes, as in training, take effect here too (see `Sampler.refresh` for
    writes through `.data`). The published code is not imported; its instance is read through its attributes and the
    names in its state dict.

    Args:
        model: an instance of the published `VAR`, as `build_vae_var` of the published code returns it.
        dtype: None keeps the model's precision, or that of the autocast around a call, and its results. "bf16", "fp16"
            or "int8", or a torch dtype, asks for a faster mode, which keeps a packed copy of the weights; so does
            "fp32" on the CPU.
        check: look for hooks and patches, and compare both models, part by part, in float32 on a few tokens: this
            project implements the published architecture, and no change in `model` may be ignored.
        release: with a dtype, free the model's own weights as they are packed; it is unusable afterwards.

    Raises:
        TypeError: `model` is not a published VAR, or its results differ; the message names the part.
        ValueError: the device does not support the precision, or shared weights would have to be released.
    """
    if release and dtype is None:
        raise ValueError("release needs a dtype, got None: without one the weights themselves are used")
    model = _torch.uncompiled(model)
    vae = _tokenizer_of(model)
    if check:
        _refuse(modified_part(model) or modified_part(vae))
    quantize, heads = vae.quantize, int(model.num_heads)  # type: ignore[arg-type]
    var_entries, vae_entries = (m.state_dict(keep_vars=True) for m in (model, vae))
    patch_nums = tuple(int(side) for side in model.patch_nums)  # type: ignore[union-attr]
    try:
        vae_config = deduce_vae(vae_entries, patch_nums, "the tokenizer")
        for name, attribute in (
            ("using_znorm", "using_znorm"),
            ("beta", "beta"),
            ("quant_resi", "quant_resi_ratio"),
        ):
            vae_config[name] = getattr(quantize, attribute, vae_config.get(name))
        own_vae = build_vae({k: v for k, v in vae_config.items() if v is not None}, "the tokenizer")
        fill(own_vae, vae_entries, "the tokenizer", cast=False)
        var_config = deduce_var(var_entries, "the model", patch_nums=patch_nums, num_heads=heads)
        var_config["norm_eps"] = model.blocks[0].ln_wo_grad.eps  # type: ignore[index,union-attr]
        own = build_var(own_vae, var_config, "the model")
        fill(own, var_entries, "the model", cast=False)
    except (CheckpointError, AttributeError) as error:
        raise TypeError(f"accelerate takes the published VAR, but {error}") from error
    if check and all(p.dtype == torch.float32 for p in (*own.parameters(), *own_vae.parameters())):
        _refuse(first_difference(model, own))
    return Accelerated(own, dtype, release)


def _refuse(what: str | None) -> None:
    if what is not None:
        raise UnsupportedModel(
            f"accelerate draws with the published architecture, but {what}: draw with the model itself, build the "
            "change into a subclass of var_ext.models.VAR, or leave it out on purpose with check=False"
        )


def _tokenizer_of(model: Any) -> Any:
    missing = [name for name in PARTS if not hasattr(model, name)]
    if missing or not isinstance(model, nn.Module):
        raise TypeError(
            f"accelerate takes an instance of the published VAR, got a {type(model).__name__}"
            + (f" without {', '.join(missing)}" if missing else "")
        )
    proxy: Any = model.vae_proxy
    vae = proxy[0]
    missing = [name for name in TOKENIZER_PARTS if not hasattr(vae, name)]
    if missing:
        raise TypeError(
            "accelerate takes a VAR whose vae_proxy holds the published VQVAE, got a "
            f"{type(vae).__name__} without {', '.join(missing)}"
        )
    return vae
