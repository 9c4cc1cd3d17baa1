"""The loop over scales (paper, section 3.2)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from var_ext.engine.decoder import Decoder
from var_ext.engine.draw import Draw, Guidance
from var_ext.engine.layers import release
from var_ext.engine.options import Options
from var_ext.engine.precision import Precision
from var_ext.engine.transformer import Modulation, Transformer

Edit = Callable[[Tensor, int], Tensor]  # codes (B, l, Cvae) and scale index -> codes
Mark = Callable[[str, int], None]  # the end of a part of scale k


class Engine:
    """Runs a transformer and its tokenizer, both with the published names of parts.

    Weights are cast, packed or quantized when first needed, and again after a change to the model's own.

    Args:
        var: the transformer; `var.vae_proxy[0]` is its tokenizer.
        precision: of transformer and decoder.
        pack: on the CPU keep linear weights laid out for oneDNN: faster, and an image does not depend on its batch;
            takes the memory of a copy of the weights where the precision is the model's own.
        release: free each weight of the model's linear layers and of the decoder once it is packed. The models are of
            no other use then.
    """

    def __init__(self, var: Any, precision: Precision, *, pack: bool, release: bool = False) -> None:
        self.var, self.vae, self.precision, self.pack = var, var.vae_proxy[0], precision, pack
        self.release = release and pack
        self.schedule = var.schedule
        self._transformer: Transformer | None = None
        self._decoder: Decoder | None = None
        self._made_of: tuple[Any, ...] = ()

    def parts(self) -> tuple[Transformer, Decoder]:
        """Transformer and decoder of the model's present weights."""
        if self.release and self._transformer is not None and self._decoder is not None:
            return self._transformer, self._decoder
        made_of = tuple(_identity(p) for model in (self.var, self.vae) for p in model.parameters())
        if self._transformer is None or self._decoder is None or made_of != self._made_of:
            self._transformer = self._decoder = None  # the old ones go before the new ones come
            # ordinary tensors serve calls in inference mode and out of it
            with torch.inference_mode(False), torch.no_grad(), _no_autocast(self.device):
                self._transformer = Transformer(self.var, self.precision, self.pack, self.release)
                self._decoder = Decoder(self.vae, self.precision, self.pack)
                if self.release:
                    release(self.vae.decoder)
            self._made_of = made_of
        return self._transformer, self._decoder

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return self.var.pos_1LC.device

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
        finest: int | None = None,
    ) -> Iterator[Tensor]:
        """f_hat (B, Cvae, P, P) float32 after each scale; the same memory or not, the last one is the result.

        Args:
            labels: (B,) int64.
            cfg: guidance at each scale, a number or a tensor (B,).
            draw: makes codes of logits.
            guided: how many of the first scales compute the unconditional half; no guidance after them.
            edit: changes codes before they enter f_hat.
            mark: told when the "transformer", the "draw" and the "step" of a scale are done.
            finest: stop after this scale.
        """
        transformer, _ = self.parts()
        batch, schedule = len(labels), self.schedule
        quantize = self.vae.quantize
        rows = 2 * batch if guided else batch
        with _no_autocast(self.device), transformer.cache(rows, schedule.num_tokens) as cache:
            classes = torch.cat((labels, torch.full_like(labels, self.var.num_classes)))[:rows]
            cond = transformer.condition(classes)  # (rows, C)
            x = transformer.first(cond)
            modulations, *head = transformer.modulations(cond)
            f_hat = torch.zeros(
                batch, self.var.Cvae, schedule.side, schedule.side, dtype=torch.float32, device=self.device
            )
            for k, side in enumerate(schedule.patch_nums):
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
                yield f_hat
                if k == (len(schedule) - 1 if finest is None else finest):
                    return
                x = transformer.embed(pooled, schedule.slices[k + 1], rows)

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

    def decode(self, f_hat: Tensor, *, at_once: int | None = None) -> Tensor:
        """Images (B, 3, S, S) float32 in [0, 1].

        Args:
            at_once: how many images to decode in one go; None: on the CPU one, where more are no faster.
        """
        decoder = self.parts()[1]
        size = at_once or (1 if f_hat.device.type == "cpu" else 16)
        side = self.vae.image_size
        images = f_hat.new_empty(len(f_hat), 3, side, side)
        with _no_autocast(self.device):
            for chunk, target in zip(f_hat.split(size), images.split(size), strict=True):
                target.copy_(decoder(chunk))
        return images


def _identity(parameter: Tensor) -> tuple[Any, ...]:
    version = 0 if parameter.is_inference() else parameter._version
    return parameter.data_ptr(), version, parameter.dtype, parameter.device


def _no_autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, enabled=False)
