"""Checks that a model computes what sampling from it would: no user change may be ignored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from var_ext import _torch
from var_ext.models import VAR, VQVAE

SCALES = 5  # scales compared: every part of the transformer is used in each
GRID = 4  # side of the decoded feature map
TOLERANCE = 1e-3  # relative to the largest value; float32 rounding from reordered sums is far smaller


class UnsupportedModel(TypeError):
    """A model with a change that sampling would ignore."""


def check_forward(var: VAR) -> None:
    """Raises if the class of `var` overrides forward and its result differs from that of the parts used in sampling.

    Compared on the first scales of a random image, in evaluation mode.
    """
    if (
        type(var).forward is VAR.forward
        and "forward" not in var.__dict__
        and not _torch.has_forward_hooks(var)
    ):
        return
    label, known = _first_scales(var, min(SCALES, len(var.schedule)))
    with torch.no_grad(), _undisturbed(var):
        try:
            error = _error(VAR.forward(var, label, known), var(label, known))
        except TypeError as error_:
            raise UnsupportedModel(
                f"{type(var).__name__}.forward cannot be compared with what a sampling calls ({error_}): VAR.forward "
                "already hands other conditions on to condition, so it need not be overridden for them"
            ) from error_
    if not error <= TOLERANCE:
        raise UnsupportedModel(
            f"a sampling calls the parts of a VAR, and {type(var).__name__}.forward computes something else (off by "
            f"{error:.1e} of the largest logit): put the change into condition, modulations, positions, words, "
            "transform, before_head or get_logits, which forward and a sampling share"
        )


def _first_scales(var: VAR, count: int) -> tuple[Tensor, Tensor | None]:
    """Label "no class", which the published forward never drops at random, and the input of the first scales."""
    device, generator = var.pos_1LC.device, torch.Generator().manual_seed(0)
    tokens = [torch.randint(var.V, (1, n), generator=generator).to(device) for n in var.schedule.lengths]
    label = torch.full((1,), var.num_classes, device=device)
    return label, var.vae_proxy[0].quantize.idxBl_to_var_input(tokens[:count])


def _error(value: Tensor, wanted: Tensor) -> float:
    """Largest difference relative to the largest value; NaN if either has one."""
    return float((value - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))


def modified_part(model: nn.Module) -> str | None:
    """A description of what in a model does more than its class says; None: nothing."""
    for name, module in model.named_modules():
        part = name or "the model"
        if _torch.has_forward_hooks(module):
            return f"{part} has a forward hook"
        for method in ("forward", "get_logits", "autoregressive_infer_cfg", "fhat_to_img"):
            if method in module.__dict__:
                return f"{part} has a {method} of its own"
    return None


@torch.no_grad()
def first_difference(given: Any, twin: VAR) -> str | None:
    """A description of the first part of `given` whose output differs from that of `twin`; None: all agree.

    Both predict the first scales of a random image under the label "no class" and decode random features.

    Args:
        given: an instance of the published VAR in float32.
        twin: this project's model with the same weights.
    """
    vae, scales = twin.vae_proxy[0], len(twin.schedule)
    count = min(SCALES, scales) if hasattr(given, "prog_si") else scales
    label, known = _first_scales(twin, count)
    features = torch.randn(1, twin.Cvae, GRID, GRID, generator=torch.Generator().manual_seed(0)).to(
        label.device
    )
    short = count < scales
    with _undisturbed(given, twin), _progress(given, count - 1) if short else nullcontext():
        return (
            _compared(given, twin, lambda model: model(label, known))
            or _compared(given.vae_proxy[0], vae, lambda model: model.fhat_to_img(features))
            or _different_step(given.vae_proxy[0].quantize, vae.quantize)
        )


def _different_step(given: Any, twin: Any) -> str | None:
    generator, device = torch.Generator().manual_seed(0), twin.embedding.weight.device
    scales, side = len(twin.schedule), twin.schedule.side
    for k, size in enumerate(twin.schedule.patch_nums):
        f_hat = torch.randn(1, twin.Cvae, side, side, generator=generator).to(device)
        codes = torch.randn(1, twin.Cvae, size, size, generator=generator).to(device)
        theirs, ours = (
            q.get_next_autoregressive_input(k, scales, f_hat.clone(), codes) for q in (given, twin)
        )
        error = max(map(_error, ours, theirs))
        if not error <= TOLERANCE:
            return f"quantize.get_next_autoregressive_input is off by {error:.1e} of its largest value at scale {k}"
    return None


def _compared(given: nn.Module, twin: VAR | VQVAE, run: Callable[[Any], Tensor]) -> str | None:
    theirs, ours = _outputs(given, run), _outputs(twin, run)
    for name, value in theirs.items():
        mine = ours.get(name)
        if mine is None or mine.shape != value.shape:
            continue
        error = _error(mine, value)
        if not error <= TOLERANCE:
            return f"{name or 'the output'} is off by {error:.1e} of its largest value"
    return None


def _outputs(model: nn.Module, run: Callable[[Any], Tensor]) -> dict[str, Tensor]:
    """Output of each part that returns a tensor, in order of completion; the whole model last."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _given: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                found.setdefault(name, output.detach().float().clone())  # may be modified in place later

        return hook

    handles = [m.register_forward_hook(keep(name)) for name, m in model.named_modules() if name]
    try:
        result = run(model).float()
    finally:
        for handle in handles:
            handle.remove()
    found[""] = result
    return found


@contextmanager
def _undisturbed(*models: VAR | nn.Module) -> Iterator[None]:
    """Evaluation mode, no autocast; torch's random state is preserved."""
    modules = [m for model in models for root in (model, _tokenizer(model)) for m in root.modules()]
    modes, device = [m.training for m in modules], next(models[0].parameters()).device
    for module in modules:
        module.training = False
    try:
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            torch.autocast(device.type, enabled=False),
        ):
            yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


def _tokenizer(model: Any) -> nn.Module:
    return model.vae_proxy[0]


@contextmanager
def _progress(model: Any, scale: int) -> Iterator[None]:
    """The published switch for a prefix of the scales."""
    before, model.prog_si = model.prog_si, scale
    try:
        yield
    finally:
        model.prog_si = before
