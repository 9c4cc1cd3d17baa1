"""The loop over scales (paper, section 3.2)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor

from var_ext import backend
from var_ext.engine.decoder import Decoder
from var_ext.engine.draw import Draw, Edit, Guidance, Randomness, draw_from
from var_ext.engine.graph import UNDRAWN, Graphs
from var_ext.engine.options import Options
from var_ext.engine.precision import Precision
from var_ext.engine.transformer import Modulation, Transformer
from var_ext.engine.watch import Watch

Mark = Callable[[str, int], None]  # the end of a part of scale k


DECODED_AT_ONCE = 16  # images, on a GPU


class Engine:
    """Runs a transformer and its tokenizer, both with the published names of parts.

    Weights are cast, packed or quantized when first needed, and again after a change to the model's own that torch has
    a record of; see `refresh`.

    Args:
        var: the transformer; `var.vae_proxy[0]` is its tokenizer.
        precision: of transformer and decoder.
        pack: on the CPU keep linear weights laid out for oneDNN: faster, and an image does not depend on its batch;
            takes the memory of a copy of the weights where the precision is the model's own.
        release: free each weight of the model's linear layers and of the decoder once it is packed. The models are of
            no other use then.
        graph: on a GPU draw by captured graphs.
    """

    def __init__(
        self, var: Any, precision: Precision, *, pack: bool, release: bool = False, graph: bool = True
    ) -> None:
        self.var, self.vae, self.precision, self.pack = var, var.vae_proxy[0], precision, pack
        self.release = release and pack
        self.graphs = Graphs(self) if graph else None
        self.schedule = var.schedule
        self._transformer: Transformer | None = None
        self._decoder: Decoder | None = None
        self._watch: Watch | None = None
        self.builds = 0  # how often weights were packed

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: packed weights stay behind and are made anew."""
        if self.released:
            raise TypeError("an engine that has released the model's weights cannot be copied or pickled")
        return {**self.__dict__, "_transformer": None, "_decoder": None, "_watch": None}

    @property
    def released(self) -> bool:
        """Whether the model's own weights are gone."""
        return self.release and self.builds > 0

    def refresh(self) -> None:
        """Packs the weights anew at the next call: after writes through `.data`, which leave no trace."""
        if not self.released:
            self._transformer = self._decoder = None

    def parts(self) -> tuple[Transformer, Decoder]:
        """Transformer and decoder of the model's present weights."""
        fresh = self.release or (self._watch is not None and self._watch.unchanged())
        if self._transformer and self._decoder and fresh:
            return self._transformer, self._decoder
        if self.released:
            raise RuntimeError(
                "the model's weights were released before all were packed: load the model again"
            )
        self._transformer = self._decoder = None  # the old ones go before the new ones come
        self.builds += 1
        unused = (self.vae.encoder, self.vae.quant_conv)
        self._watch = None if self.release else Watch((self.var, self.vae), without=unused)
        # ordinary tensors serve calls in inference mode and out of it
        with torch.inference_mode(False), torch.no_grad(), _no_autocast(self.device):
            transformer = Transformer(self.var, self.precision, self.pack, self.release)
            decoder = Decoder(self.vae, self.precision, self.pack, self.release)
        self._transformer, self._decoder = transformer, decoder
        return transformer, decoder

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return self.var.pos_1LC.device

    @property
    def codebook(self) -> Tensor:
        """(V, Cvae) float32."""
        return self.vae.quantize.embedding.weight.detach().float()

    def draw(
        self,
        labels: Tensor,
        randomness: Randomness,
        options: Options,
        *,
        edit: Edit | None = None,
        decode: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """One batch, on a GPU from the second of its kind on as a captured graph: images (B, 3, S, S) float32 in
        [0, 1], tokens (B, L) int64, both ordinary tensors that last.

        Args:
            labels: (B,) int64, checked.
            randomness: seeds (B,) int64, or a generator for the batch; None: torch's global one.
            options: what to draw.
            edit: changes codes before they enter f_hat; on a GPU a dataclass is captured, anything else runs eagerly.
            decode: without it there are no images, (0, 3, S, S).

        Raises:
            ValueError: logits had NaN or no finite value; on a GPU too this comes after the call, which waits for it.
        """
        if self.graphs and self._captures(labels, edit):
            images, tokens = self.graphs.sample(labels, randomness, options, edit=edit, decode=decode)
        else:
            with torch.inference_mode():  # its calls are cheaper than under no_grad
                draw = draw_from(randomness, options, self.codebook)
                images, tokens = self.sample(labels, options, draw, edit=edit, decode=decode)
            images, tokens = images.clone(), tokens.clone()  # of use outside inference mode
        self._check(tokens)
        return images, tokens

    def _captures(self, labels: Tensor, edit: Edit | None) -> bool:
        if not labels.is_cuda or not len(labels) or not (edit is None or is_dataclass(edit)):
            return False
        return backend.use_native("sample_tokens", "cuda")  # the reference looks at the device

    def _check(self, tokens: Tensor) -> None:
        """Raises if some token was not drawn."""
        lowest = int(tokens.min()) if tokens.numel() else 0
        if lowest == UNDRAWN:
            assert self.graphs is not None
            self.graphs.clear()
            raise RuntimeError(
                "the captured CUDA graph recorded nothing: draw with graph=False, and report it"
            )
        if lowest < 0:
            bad = (tokens < 0).any(dim=1).nonzero().flatten().tolist()
            raise ValueError(
                "each row of logits needs a finite maximum and no NaN, got a row without in image(s) "
                f"{', '.join(map(str, bad))} of the batch: look for NaN or infinity in the weights, or take another "
                "precision"
            )

    def sample(
        self,
        labels: Tensor,
        options: Options,
        draw: Draw,
        *,
        edit: Edit | None = None,
        mark: Mark | None = None,
        decode: bool = True,
        cfg: Sequence[Guidance] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Images (B, 3, S, S) float32 in [0, 1], and their tokens (B, L) int64; arguments as in `generate`.

        Without `decode` there are no images, (0, 3, S, S). `cfg` takes the place of that of the options.
        """
        side = self.vae.image_size
        nothing = torch.empty(0, 3, side, side, device=self.device)
        if not len(labels):
            return nothing, torch.empty(0, self.schedule.num_tokens, dtype=torch.int64, device=self.device)
        scales = self.generate(labels, cfg or options.cfg, draw, guided=options.guided, edit=edit, mark=mark)
        (f_hat,) = deque(scales, maxlen=1)  # the last
        return self.decode(f_hat) if decode else nothing, torch.cat(draw.tokens, dim=1)

    def generate(
        self,
        labels: Tensor,
        cfg: Sequence[Guidance],
        draw: Draw,
        *,
        guided: int,
        edit: Edit | None = None,
        mark: Mark | None = None,
    ) -> Iterator[Tensor]:
        """f_hat (B, Cvae, P, P) float32 after each scale; the last one is the result.

        Args:
            labels: (B,) int64.
            cfg: guidance at each scale, a number or a tensor (B,).
            draw: makes codes of logits.
            guided: how many of the first scales compute the unconditional half; no guidance after them.
            edit: changes codes before they enter f_hat.
            mark: told when the "transformer", the "draw" and the "step" of a scale are done.
        """
        transformer, _ = self.parts()
        batch, schedule = len(labels), self.schedule
        quantize = self.vae.quantize
        rows = 2 * batch if guided else batch
        with transformer.cache(rows, schedule.num_tokens) as cache:
            with _no_autocast(self.device):
                classes = torch.cat((labels, torch.full_like(labels, self.var.num_classes)))[:rows]
                cond = transformer.condition(classes)  # (rows, C)
                x = transformer.first(cond)
                modulations, *head = transformer.modulations(cond)
            shape = (batch, self.var.Cvae, schedule.side, schedule.side)
            f_hat = torch.zeros(shape, dtype=torch.float32, device=self.device)
            for k, side in enumerate(schedule.patch_nums):
                with _no_autocast(self.device):  # not around the yield: there the caller's holds
                    if k == guided and rows > batch:  # from here on the unconditional half serves nothing
                        rows, x, cache = batch, x[:batch], cache[:, :, :batch]
                        modulations = [Modulation(*(vector[:batch] for vector in m)) for m in modulations]
                        head = [vector[:batch] for vector in head]
                    offset = schedule.slices[k].start
                    hidden = transformer(x, modulations, (head[0], head[1]), cache, offset)  # (rows, l, C)
                    logits, t = self._logits(transformer, hidden, batch, cfg[k] if k < guided else None)
                    if mark:
                        mark("transformer", k)
                    codes = draw(logits, k, t)  # (B, l, Cvae)
                    if edit:
                        codes = edit(codes, k)
                    if mark:
                        mark("draw", k)
                    grid = codes.transpose(1, 2).reshape(batch, self.var.Cvae, side, side)
                    f_hat, pooled = quantize.get_next_autoregressive_input(k, len(schedule), f_hat, grid)
                    if mark:
                        mark("step", k)
                    if k + 1 < len(schedule):
                        x = transformer.embed(pooled, schedule.slices[k + 1], rows)
                yield f_hat

    def _logits(
        self, transformer: Transformer, hidden: Tensor, batch: int, t: Guidance
    ) -> tuple[Tensor, Guidance]:
        """Logits (B, l, V) and None, or of both halves (2B, l, V) and the guidance still to be applied."""
        exact = not self.precision.mixes_hidden
        # unpacked float32 products of half the rows round otherwise than the published ones
        if t is None or (isinstance(t, float) and t == 0 and (self.pack or not exact)):
            return transformer.head(hidden[:batch]), None
        if exact:
            return transformer.head(hidden), t
        cond, uncond = hidden[:batch], hidden[batch:]
        if isinstance(t, Tensor):
            cond, weight = cond.float(), t.float()[:, None, None]
            return transformer.head((cond + weight * (cond - uncond)).to(hidden.dtype)), None
        return transformer.head(torch.lerp(uncond, cond, 1 + t)), None  # guidance commutes with a linear head

    def decode(self, f_hat: Tensor) -> Tensor:
        """Images (B, 3, S, S) float32 in [0, 1]; on the CPU one after the other, where more at once are no faster."""
        decoder = self.parts()[1]
        size = 1 if f_hat.device.type == "cpu" else DECODED_AT_ONCE
        side = self.vae.image_size
        images = f_hat.new_empty(len(f_hat), 3, side, side)
        with _no_autocast(self.device):
            for chunk, target in zip(f_hat.split(size), images.split(size), strict=True):
                target.copy_(decoder(chunk))
        return images


def _no_autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, enabled=False)
