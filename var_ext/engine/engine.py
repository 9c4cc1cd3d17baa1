"""The loop over scales (paper, section 3.2)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import is_dataclass
from threading import RLock
from typing import Any, NamedTuple

import torch
from torch import Tensor

from var_ext import backend
from var_ext.engine.cache import Cache
from var_ext.engine.call import Call
from var_ext.engine.compare import check_forward
from var_ext.engine.draw import Draw, Guidance, draw_from
from var_ext.engine.execution import Execution
from var_ext.engine.graph import UNDRAWN, Graphs
from var_ext.engine.layers import on_gpu
from var_ext.engine.precision import Precision
from var_ext.engine.together import Together, put_together
from var_ext.engine.watch import Watch
from var_ext.models.var import VAR, Cached, Modulation
from var_ext.models.vqvae import VQVAE

DECODED_AT_ONCE = 16  # images, on a GPU


class Parts(NamedTuple):
    """What sampling runs: copies of the models with layers in the engine's precision."""

    var: VAR
    vae: VQVAE
    positions: Tensor  # (1, L, C)
    dtype: torch.dtype
    together: Together | None  # the layers that read the condition
    only_known: bool  # no user hooks, patches or modules, whose Python a captured graph would not run

    def modulations(self, cond: Tensor) -> tuple[list[Modulation], Modulation]:
        """Of each block, and of the norm before the head."""
        with self.together.keeping() if self.together else nullcontext():
            return self.var.modulations(cond, self.dtype)

    def decode(self, f_hat: Tensor) -> Tensor:
        """(B, Cvae, P, P) float32 -> images (B, 3, S, S) in [-1, 1]."""
        return self.vae.fhat_to_img(f_hat.to(self.dtype, memory_format=torch.channels_last))


class Engine:
    """Runs a transformer and its tokenizer as copies of them, see `Execution`.

    Weights are cast, packed or quantized at first use, and again after any change to the model's own that torch
    records; see `refresh`.

    Args:
        var: the transformer; `var.vae_proxy[0]` is its tokenizer.
        precision: of transformer and decoder.
        pack: on the CPU keep linear weights packed for oneDNN: faster, and an image does not depend on its batch;
            if the precision is the model's own, this takes memory for a copy of the weights.
        release: free each weight of the model's linear layers and of the decoder once it is packed. The models are
            unusable for anything else then.
        graph: on a GPU sample by captured graphs.
    """

    def __init__(
        self, var: Any, precision: Precision, *, pack: bool, release: bool = False, graph: bool = True
    ) -> None:
        self.var, self.vae, self.precision, self.pack = var, var.vae_proxy[0], precision, pack
        self.release = release and pack
        self._graph = graph
        self._graphs: Graphs | None = None
        self.schedule = var.schedule
        self._parts: Parts | None = None
        self._watch: Watch | None = None
        self._cache, self._lock = Cache(), RLock()
        self.builds = 0  # how often weights were packed

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: packed weights are left out and rebuilt."""
        if self.released:
            raise TypeError("an engine that has released the model's weights cannot be copied or pickled")
        kept = {name: value for name, value in self.__dict__.items() if name != "_lock"}
        return {**kept, "_parts": None, "_watch": None, "_cache": Cache()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=RLock())

    @property
    def released(self) -> bool:
        """Whether the model's own weights are gone."""
        return self.release and self.builds > 0

    def refresh(self) -> None:
        """Repacks the weights at the next call; needed after changes that torch does not record, see `Watch`."""
        if not self.released:
            self._parts = None

    def parts(self) -> Parts:
        """The models as executed, with their current weights; built once for all threads."""
        with self._lock:
            return self._present_parts()

    def _present_parts(self) -> Parts:
        fresh = self.release or (self._watch is not None and self._watch.unchanged())
        if self._parts and fresh:
            return self._parts
        if self.released:
            raise RuntimeError(
                "the model's weights were released before all were packed: load the model again"
            )
        self._parts = None  # free the old ones before building the new ones
        check_forward(self.var)
        self.builds += 1
        unused = (self.vae.encoder, self.vae.quant_conv)
        self._watch = None if self.release else Watch((self.var, self.vae), without=unused)
        execution = Execution(self.precision, pack=self.pack, free=self.release)
        # ordinary tensors work inside and outside inference mode
        with torch.inference_mode(False), torch.no_grad(), _no_autocast(self.device):
            var = execution.copy(self.var)
            vae = execution.copy(self.vae, without=("encoder", "quant_conv", "quantize"))
            together = put_together(var.readers_of_condition(), self.var.readers_of_condition())
            known = execution.only_known
            parts = Parts(var, vae, var.positions(), self.precision.dtype, together, known)
            if known:  # decoding zero images packs each convolution for its map size
                side = self.schedule.side
                parts.decode(torch.empty(0, var.Cvae, side, side, dtype=torch.float32, device=self.device))
        self._parts = parts
        return parts

    @property
    def graphs(self) -> Graphs | None:
        """The captured graphs, created at first use. Never on a CPU, where an engine thus has no reference cycle and
        its weights are freed with it."""
        if self._graph and self._graphs is None:
            self._graphs = Graphs(self)
        return self._graphs

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return self.var.pos_1LC.device

    @property
    def codebook(self) -> Tensor:
        """(V, Cvae) float32."""
        return self.vae.quantize.embedding.weight.detach().float()

    def draw(self, call: Call) -> tuple[Tensor, Tensor]:
        """One batch: images (B, 3, S, S) float32 in [0, 1] and tokens (B, L) int64, ordinary tensors, the caller's.

        On a GPU a captured graph runs from the second call of a kind on. An edit that is not a dataclass, and user
        hooks, patches or modules, always run eagerly: a graph would not run their Python again.

        Raises:
            ValueError: logits had NaN or no finite value; checked after sampling, on a GPU with a host sync.
        """
        if self._captures(call) and self.graphs:
            images, tokens = self.graphs.sample(call)
        else:
            with torch.inference_mode():  # cheaper per call than no_grad
                images, tokens = self.sample(call, draw_from(call.randomness, call.options, self.codebook))
            images, tokens = images.clone(), tokens.clone()  # usable outside inference mode
        check_drawn(tokens, self._graphs)
        return images, tokens

    def _captures(self, call: Call) -> bool:
        if not call.labels.is_cuda or not len(call) or not (call.edit is None or is_dataclass(call.edit)):
            return False
        # the reference has a host sync
        return backend.use_native("sample_tokens", "cuda") and self.parts().only_known

    def sample(
        self, call: Call, draw: Draw, *, cfg: Sequence[Guidance] | Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Images (B, 3, S, S) float32 in [0, 1], or none, and tokens (B, L) int64; arguments as in `generate`."""
        side = self.vae.image_size
        nothing = torch.empty(0, 3, side, side, dtype=torch.float32, device=self.device)
        if not len(call):
            return nothing, torch.empty(0, self.schedule.num_tokens, dtype=torch.int64, device=self.device)
        (f_hat,) = deque(self.generate(call, draw, cfg=cfg), maxlen=1)  # the last
        return self.decode(f_hat) if call.decode else nothing, torch.cat(draw.tokens, dim=1)

    def generate(
        self, call: Call, draw: Draw, *, cfg: Sequence[Guidance] | Tensor | None = None
    ) -> Iterator[Tensor]:
        """f_hat (B, Cvae, P, P) float32 after each scale; the last one is the result.

        Args:
            call: the request; `draw` holds its randomness.
            draw: turns logits into codes.
            cfg: guidance per scale, overrides the options: numbers, tensors (B,), or one (K, B).
        """
        labels, options, conditions = call.labels, call.options, call.conditions
        guidance, guided_scales = options.cfg if cfg is None else cfg, options.guided_scales
        parts = self.parts()
        var, dtype, positions = parts.var, parts.dtype, parts.positions
        batch, schedule = len(labels), self.schedule
        rows = 2 * batch if guided_scales else batch
        attention = var.blocks[0].attn
        memory = (len(var.blocks), 2, rows, schedule.num_tokens, attention.num_heads, attention.head_dim)
        with self._cache.of(memory, dtype, self.device) as cache:
            with _no_autocast(self.device):
                classes = torch.cat((labels, torch.full_like(labels, var.num_classes)))[:rows]
                more = {name: torch.cat((value, value))[:rows] for name, value in conditions.items()}
                cond = var.condition(classes, **more)  # (rows, C)
                start = (cond[:, None] + var.pos_start).detach()
                x = torch.empty_like(start, dtype=dtype)
                x = torch.add(start, positions[:, : var.first_l], out=x)  # sum and cast in one pass
                modulations, head = parts.modulations(cond)
            shape = (batch, self.var.Cvae, schedule.side, schedule.side)
            f_hat = torch.zeros(shape, dtype=torch.float32, device=self.device)
            for k, side in enumerate(schedule.patch_nums):
                with _no_autocast(self.device):  # not around the yield, where the caller's mode applies
                    if k == guided_scales and rows > batch:  # the unconditional half is no longer needed
                        rows, x, cache, cond = batch, x[:batch], cache[:, :, :batch], cond[:batch]
                        modulations = [tuple(vector[:batch] for vector in m) for m in modulations]
                        head = tuple(vector[:batch] for vector in head)
                    attends = (Cached(keys, values, schedule.slices[k].start) for keys, values in cache)
                    stream = var.transform(x, modulations, attends)
                    t = guidance[k] if k < guided_scales else None
                    if var.has_own_logits:
                        logits = var.get_logits(stream.sum(), cond)
                    else:
                        hidden = var.before_head(stream, head)
                        logits, t = self._logits(var.head, hidden, batch, t)
                    codes = draw(logits, k, t)  # (B, l, Cvae)
                    if call.edit:
                        codes = call.edit(codes, k)
                    grid = codes.transpose(1, 2).reshape(batch, self.var.Cvae, side, side)
                    f_hat, pooled = self.vae.quantize.get_next_autoregressive_input(
                        k, len(schedule), f_hat, grid
                    )
                    if k + 1 < len(schedule):
                        words = var.words(pooled.flatten(2).transpose(1, 2)).detach()  # (B, l, C)
                        alike = words.expand(rows // batch, *words.shape)  # both halves
                        x = torch.empty(alike.shape, dtype=dtype, device=self.device)
                        # sum, cast and both halves in one pass
                        x = torch.add(alike, positions[:, schedule.slices[k + 1]], out=x).flatten(0, 1)
                yield f_hat

    def _logits(
        self, head: Callable[[Tensor], Tensor], hidden: Tensor, batch: int, t: Guidance
    ) -> tuple[Tensor, Guidance]:
        """Logits (B, l, V) and None, or of both halves (2B, l, V) and the guidance still to be applied."""
        exact = not self.precision.mixes_hidden or not getattr(head, "affine", False)
        # unpacked float32 matmuls with half the rows round differently from the published ones
        if t is None or (isinstance(t, float) and t == 0 and (self.pack or not exact)):
            return head(hidden[:batch]), None
        # on a GPU one matmul serves both halves, and the sampling kernel mixes their logits
        if exact or isinstance(t, Tensor) or on_gpu(hidden):
            return head(hidden), t
        cond, uncond = hidden.detach().split(batch)
        return head(torch.lerp(uncond, cond, 1 + t)), None  # guidance commutes with a linear head

    def decode(self, f_hat: Tensor) -> Tensor:
        """Images (B, 3, S, S) float32 in [0, 1]; on the CPU one by one, where batches are no faster."""
        parts = self.parts()
        size = 1 if f_hat.device.type == "cpu" else DECODED_AT_ONCE
        side = self.vae.image_size
        images = f_hat.new_full((len(f_hat), 3, side, side), 0.5)
        with _no_autocast(self.device):
            for chunk, target in zip(f_hat.split(size), images.split(size), strict=True):
                # added in float32: 8-bit pixels resolve [-1, 1] twice as finely as bfloat16
                target.add_(parts.decode(chunk), alpha=0.5)
        return images


def _no_autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, enabled=False)


def check_drawn(tokens: Tensor, graphs: Graphs | None = None) -> None:
    """Raises if some of the tokens (B, L) were not drawn."""
    lowest = int(tokens.min()) if tokens.numel() else 0
    if lowest == UNDRAWN and graphs:
        graphs.clear()
        raise RuntimeError("the captured CUDA graph recorded nothing: draw with graph=False, and report it")
    if lowest < 0:
        bad = (tokens < 0).any(dim=1).nonzero().flatten().tolist()
        raise ValueError(
            "each row of logits needs a finite maximum and no NaN, got a row without in image(s) "
            f"{', '.join(map(str, bad))} of the batch: look for NaN or infinity in the weights, or take another "
            "precision"
        )
