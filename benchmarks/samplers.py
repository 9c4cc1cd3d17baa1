"""The samplers that are compared: the published code in its own folder, and var_ext, with the same weights."""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, Protocol

import torch
from harness.clock import Watch
from torch import Tensor, nn

import var_ext
from var_ext.bench import Watched, psnr
from var_ext.engine import Call, Draw, PublishedDraw, options_for
from var_ext.models import build_vae_var
from var_ext.sampling import Sampler

PRECISIONS = {"cpu": ("fp32", "bf16", "int8"), "cuda": ("fp32", "bf16", "fp16")}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
TINY = dict(patch_nums=(1, 2, 3, 4), V=1024, Cvae=32, ch=32)  # a few seconds for everything
OPTIONS = dict(cfg=1.5, top_k=900, top_p=0.96)  # of the published evaluation
PARTS = ("transformer", "head and sampling", "quantizer", "decoder")

# What the published code patches in torch, to build models faster.
_OVERWRITTEN = (
    nn.Linear, nn.LayerNorm, nn.BatchNorm2d, nn.SyncBatchNorm, nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d,
    nn.ConvTranspose2d,
)  # fmt: skip


@contextlib.contextmanager
def contained(folder: Path) -> Iterator[None]:
    """Makes the folder's modules importable; afterwards removes their names, output and changes to torch."""
    modules, path = dict(sys.modules), list(sys.path)
    own = [vars(cls).get("reset_parameters") for cls in _OVERWRITTEN]
    # one of their names is already taken
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


@torch.no_grad()
def randomize(vae: nn.Module, var: nn.Module, seed: int = 0) -> None:
    """Non-trivial weights for either implementation: logits that prefer some codes, open gates, pixels with
    contrast. `var` comes with its own initialisation, the tokenizer with any.
    """
    torch.manual_seed(seed)
    for module in vae.modules():
        if isinstance(module, nn.Conv2d | nn.GroupNorm | nn.Embedding):
            module.reset_parameters()
    nn.init.normal_(var.class_emb.weight)  # its initialisation would leave the gates almost closed
    nn.init.normal_(var.head.weight, std=2 / var.head.in_features**0.5)
    device, channels = var.head.weight.device, vae.quantize.embedding.weight.shape[1]
    f_hat = 2 * torch.randn(1, channels, 16, 16).to(device)
    last = vae.decoder.conv_out
    contrast = vae.decoder(vae.post_quant_conv(f_hat)).std()
    last.weight.mul_(0.5 / contrast)
    last.bias.zero_()


def finite_psnr(images: Tensor, expected: Tensor) -> float:
    """`var_ext.bench.psnr`, at most 200: JSON has no infinity."""
    return min(200.0, psnr(images.double(), expected.double()))


def published_model(folder: Path, depth: int, device: torch.device, tiny: bool = False) -> nn.Module:
    """The published class with random weights; its tokenizer is `vae_proxy[0]`."""
    if not (folder / "models" / "__init__.py").is_file():
        raise SystemExit(f"--official must be a checkout of the published code, with models/; got {folder}")
    with contained(folder):
        models = importlib.import_module("models")
        size = dict(TINY) if tiny else {}
        vae, var = models.build_vae_var(device=device, depth=depth, init_adaln_gamma=0.5, **size)
    var.rng = torch.Generator(device)  # the published code uses a GPU if there is one
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


class Competitor(Protocol):
    """Draws a batch with one seed, as the published method does."""

    def draw(
        self, labels: Tensor, seed: int, *, watch: Watch | None = None, forced: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Images (B, 3, S, S) in [0, 1] and the drawn tokens (B, L).

        Args:
            watch: marks `PARTS`, the first three once per scale.
            forced: tokens (B, l) of each scale that replace those drawn.
        """
        ...


class Published:
    """The published method, as it is or under autocast, with hooks on the methods that delimit its parts."""

    def __init__(self, var: nn.Module, precision: str) -> None:
        self.var, self.vae, self.autocast = var, var.vae_proxy[0], DTYPES.get(precision)

    def draw(
        self, labels: Tensor, seed: int, *, watch: Watch | None = None, forced: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        drawn: list[Tensor] = []

        def tokens_in(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
            drawn.append(inputs[0])
            return inputs if forced is None else (forced[len(drawn) - 1],)

        with contextlib.ExitStack() as stack:
            stack.callback(self.vae.quantize.embedding.register_forward_pre_hook(tokens_in).remove)
            if watch:
                for owner, method, before, after in (
                    (self.var, "get_logits", "transformer", None),
                    (self.vae.quantize, "get_next_autoregressive_input", "head and sampling", "quantizer"),
                    (self.vae, "fhat_to_img", None, "decoder"),
                ):
                    stack.enter_context(_marked(owner, method, watch, before, after))
            if self.autocast:
                stack.enter_context(torch.autocast(labels.device.type, dtype=self.autocast))
            images = self.var.autoregressive_infer_cfg(len(labels), labels, g_seed=seed, **OPTIONS)
        return images.float(), torch.cat(drawn, dim=1)


class Fast:
    """`var_ext.accelerate` of the published model.

    Args:
        keep: how its weights are kept: "packed" in addition to the model's, "released" with the model's freed, or
            "shared", only fp32.
    """

    def __init__(self, var: nn.Module, precision: str, keep: str = "packed") -> None:
        dtype = None if keep == "shared" else precision
        self.fast = var_ext.accelerate(var, dtype=dtype, release=keep == "released")
        self.engine = self.fast.engine

    def draw(
        self, labels: Tensor, seed: int, *, watch: Watch | None = None, forced: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        if watch is None and forced is None:
            return self.fast.autoregressive_infer_cfg(
                len(labels), labels, g_seed=seed, return_tokens=True, **OPTIONS
            )
        engine, options = self.fast.engine, options_for(self.fast.engine.schedule, **OPTIONS)
        rng = torch.Generator(labels.device).manual_seed(seed)
        edit = None if forced is None else lambda _, k: engine.codebook[forced[k]]
        call = Call(labels, rng, options, edit)
        drawing: Draw = PublishedDraw(rng, options, engine.codebook)
        if watch:
            said = cycle((lambda: None, lambda: watch("head and sampling")))
            drawing = Watched(drawing, lambda: next(said)())
        with contextlib.ExitStack() as stack, torch.inference_mode():
            if watch:
                stack.enter_context(_marked(engine, "_logits", watch, "transformer", None))
            for f_hat in engine.generate(call, drawing):
                if watch:
                    watch("quantizer")
                f_hats = [f_hat]
            images = engine.decode(*f_hats)
            if watch:
                watch("decoder")
        return images, torch.cat(drawing.tokens, dim=1)


class Graphed:
    """`Sampler` on the same weights, on a GPU one captured graph for everything. It has its own random stream."""

    def __init__(self, var: nn.Module, precision: str) -> None:
        self.sampler = var_ext.accelerate(var, dtype=precision).sampler
        own = self.sampler
        self.eager = Sampler(own.vae, own.var, precision=precision, graph=False)

    def draw(
        self, labels: Tensor, seed: int, *, watch: Watch | None = None, forced: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Images, and no tokens: nothing inside a graph can be marked or forced."""
        return drawn(self._call, len(labels), labels.device), labels.new_empty(len(labels), 0)

    def _call(self, labels: Tensor, seeds: Tensor) -> Tensor:
        return self.sampler(labels, seeds, batch_size=len(labels), **OPTIONS)

    def beside_eager(self, labels: Tensor) -> tuple[float, Tensor, Tensor]:
        """The share of equal tokens with and without the graph, and the images of both."""
        seeds = torch.arange(len(labels), device=labels.device)
        tokens, others = (
            sampler.tokens(labels, seeds, batch_size=len(labels), **OPTIONS)
            for sampler in (self.sampler, self.eager)
        )
        images = self.eager(labels, seeds, batch_size=len(labels), **OPTIONS)
        return tokens.eq(others).double().mean().item(), self._call(labels, seeds), images


@contextlib.contextmanager
def _marked(
    owner: Any,
    method: str,
    watch: Watch | None,
    before: str | None,
    after: str | None,
) -> Iterator[None]:
    """`before` ends where this object's method is called; `after` where it returns."""
    original = getattr(owner, method)

    def listening(*args: Any, **kwargs: Any) -> Any:
        if watch and before:
            watch(before)
        result = original(*args, **kwargs)
        if watch and after:
            watch(after)
        return result

    owner.__dict__[method] = listening
    try:
        yield
    finally:
        del owner.__dict__[method]


def make(who: str, var: nn.Module, precision: str) -> Competitor:
    """The competitor of this name, on the weights of a published model; "var_ext released": see `Fast`."""
    if who in ("var_ext released", "var_ext shared"):
        return Fast(var, precision, who.split()[1])
    return {"published": Published, "var_ext": Fast, "var_ext graph": Graphed}[who](var, precision)


def drawer(var: nn.Module, precision: str) -> Callable[[Tensor, Tensor], Tensor]:
    """var_ext's own sampler, labels and seeds -> images: on a GPU one captured graph."""
    sampler = Sampler(var.vae_proxy[0], var, precision=precision)
    return lambda labels, seeds: sampler(labels, seeds, batch_size=len(labels), **OPTIONS)


def drawn(draw: Callable[[Tensor, Tensor], Tensor], batch: int, device: torch.device) -> Tensor:
    """A batch of images of `drawer`."""
    return draw(labels_of(batch, device), torch.arange(batch, device=device))
