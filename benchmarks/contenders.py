"""The samplers that race: the published code in its own folder, and var_ext, with the same weights."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from versus import Watch, randomize

import var_ext
from var_ext.models import build_vae_var
from var_ext.sampling import Sampler

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
TINY = dict(patch_nums=(1, 2, 3, 4), V=1024, Cvae=32, ch=32)  # a few seconds for everything
OPTIONS = dict(cfg=1.5, top_k=900, top_p=0.96)  # of the published evaluation
PARTS = ("transformer", "head and sampling", "quantizer", "decoder")

# What the published code overwrites in torch, to build models faster.
_OVERWRITTEN = (
    nn.Linear, nn.LayerNorm, nn.BatchNorm2d, nn.SyncBatchNorm, nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d,
    nn.ConvTranspose2d,
)  # fmt: skip


@contextlib.contextmanager
def contained(folder: Path) -> Iterator[None]:
    """The folder's modules can be imported here; their names, what they print and what they do to torch end here."""
    modules, path = dict(sys.modules), list(sys.path)
    own = [vars(cls).get("reset_parameters") for cls in _OVERWRITTEN]
    # a name of theirs that something else here already has
    for name in [n for n in sys.modules if n.split(".")[0] in ("models", "utils", "dist")]:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        sys.path[:] = path
        for name in [n for n in sys.modules if n.split(".")[0] in ("models", "utils", "dist")]:
            del sys.modules[name]
            if name in modules:
                sys.modules[name] = modules[name]
        for cls, method in zip(_OVERWRITTEN, own, strict=True):
            if method is not None:
                cls.reset_parameters = method
            elif "reset_parameters" in vars(cls):
                del cls.reset_parameters


def published_model(folder: Path, depth: int, device: torch.device, tiny: bool = False) -> nn.Module:
    """The published class with random weights; its tokenizer is `vae_proxy[0]`."""
    if not (folder / "models" / "__init__.py").is_file():
        raise SystemExit(f"--official must be a checkout of the published code, with models/; got {folder}")
    with contained(folder):
        models = importlib.import_module("models")
        size = dict(TINY) if tiny else {}
        vae, var = models.build_vae_var(device=device, depth=depth, init_adaln_gamma=0.5, **size)
    var.rng = torch.Generator(device)  # the published one is made for a GPU wherever there is one
    randomize(vae, var)
    return var.eval()


def our_model(depth: int, device: torch.device, tiny: bool = False) -> nn.Module:
    """The same with the classes of var_ext."""
    size: dict[str, Any] = dict(TINY) if tiny else {}
    vae, var = build_vae_var(device, depth=depth, init_adaln_gamma=0.5, **size)
    randomize(vae, var)
    return var.eval()


def labels_of(batch: int, device: torch.device) -> Tensor:
    """(B,) classes, the same in every program."""
    return torch.arange(batch, device=device) * 37 % 1000


class Contender:
    """A model with the published sampling method, listened to at the methods that part its work.

    Args:
        var: it has `autoregressive_infer_cfg`, `vae_proxy[0]`, and `before_head`, the name of the method that
            makes logits.
        autocast: dtype of the surrounding autocast.
    """

    def __init__(self, var: nn.Module, before_head: str, autocast: torch.dtype | None = None) -> None:
        self.var, self.vae = var, var.vae_proxy[0]
        self.before_head, self.autocast = before_head, autocast

    def draw(
        self, labels: Tensor, seed: int, *, watch: Watch | None = None, forced: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Images (B, 3, S, S) in [0, 1] and the drawn tokens (B, L).

        Args:
            watch: marks `PARTS`, the first three once a scale.
            forced: tokens (B, l) of each scale that go on in place of those drawn.
        """
        device, drawn = labels.device, []

        def tokens_in(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
            drawn.append(inputs[0])
            return inputs if forced is None else (forced[len(drawn) - 1],)

        with contextlib.ExitStack() as stack:
            handle = self.vae.quantize.embedding.register_forward_pre_hook(tokens_in)
            stack.callback(handle.remove)
            if watch:
                listen = [
                    (self.var, self.before_head, "transformer", None),
                    (self.vae.quantize, "get_next_autoregressive_input", "head and sampling", "quantizer"),
                    (self.vae, "fhat_to_img", None, "decoder"),
                ]
                for owner, method, before, after in listen:
                    stack.enter_context(_marked(owner, method, watch, before, after))
            if self.autocast:
                stack.enter_context(torch.autocast(device.type, dtype=self.autocast))
            images = self.var.autoregressive_infer_cfg(len(labels), labels, g_seed=seed, **OPTIONS)
        return images.float(), torch.cat(drawn, dim=1)


@contextlib.contextmanager
def _marked(
    owner: nn.Module, method: str, watch: Watch, before: str | None, after: str | None
) -> Iterator[None]:
    """`before` ends where the method of this one object is called, `after` where it returns."""
    original = getattr(owner, method)

    def listening(*args: Any, **kwargs: Any) -> Any:
        if before:
            watch(before)
        result = original(*args, **kwargs)
        if after:
            watch(after)
        return result

    owner.__dict__[method] = listening
    try:
        yield
    finally:
        del owner.__dict__[method]


def published(var: nn.Module, precision: str) -> Contender:
    """The published code: as it is, or under autocast."""
    return Contender(var, "get_logits", DTYPES.get(precision))


def fast(var: nn.Module, precision: str) -> Contender:
    """var_ext with the weights of a published model: the one place that says how it is made."""
    own, size = var.vae_proxy[0], dict(var.vae_proxy[0].state_dict())
    vae, twin = build_vae_var(
        var.head.weight.device,
        patch_nums=var.patch_nums,
        V=var.V,
        Cvae=var.Cvae,
        ch=size["decoder.conv_out.weight"].shape[1],
        num_classes=var.num_classes,
        depth=var.depth,
    )
    vae.load_state_dict(own.state_dict(), assign=True)
    twin.load_state_dict(var.state_dict(), assign=True)
    return Contender(twin.eval(), "_logits", DTYPES.get(precision))


def precisions_of_fast(device: torch.device) -> tuple[str, ...]:
    """In which precisions `fast` can run here."""
    if not hasattr(var_ext, "accelerate"):
        return ("fp32", "bf16", "fp16") if device.type == "cuda" else ("fp32", "bf16")
    return ("fp32", "bf16", "fp16") if device.type == "cuda" else ("fp32", "bf16", "int8")


def drawer(var: nn.Module, precision: str) -> Callable[[Tensor, Tensor], Tensor]:
    """var_ext's own sampler, labels and seeds -> images."""
    vae = var.vae_proxy[0]
    if "precision" in inspect.signature(Sampler).parameters:
        sampler = Sampler(vae, var, precision=precision)
        return lambda labels, seeds: sampler(labels, seeds, batch_size=len(labels), **OPTIONS)
    sampler, dtype = Sampler(vae, var), DTYPES.get(precision)

    def draw(labels: Tensor, seeds: Tensor) -> Tensor:
        with torch.autocast(labels.device.type, dtype=dtype, enabled=dtype is not None):
            return sampler(labels, seeds, batch_size=len(labels), **OPTIONS)

    return draw


def drawn(draw: Callable[[Tensor, Tensor], Tensor], batch: int, device: torch.device) -> Tensor:
    """A batch of images of `drawer`."""
    return draw(labels_of(batch, device), torch.arange(batch, device=device))
