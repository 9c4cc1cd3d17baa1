"""FLOPs of sampling, counted from the architecture: two for each multiply-add of matmuls and convolutions.

python benchmarks/flops.py          # GFLOP of one 256 px image, d16 to d30, and of DiT-XL/2 beside them

Norms, activations, the quantizer's ten convolutions of 32 channels and token sampling are left out: under 1%.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from var_ext.schedule import SCALES_256

VAR_WIDTHS = (160, 160, 320, 320, 640)  # of the tokenizer's levels, finest first
SD_WIDTHS = (128, 256, 512, 512)  # of the autoencoder that DiT decodes with


@dataclass(frozen=True)
class Sampling:
    """FLOPs of one image.

    products[k], attention[k], head[k]: linear layers of the blocks, attention and classifier at scale k;
    conditioning: the AdaLN projections, once per image; embedding: codes to words.
    """

    products: tuple[int, ...]
    attention: tuple[int, ...]
    head: tuple[int, ...]
    conditioning: int
    embedding: int
    decoder: int

    @property
    def transformer(self) -> int:
        """All but the decoder."""
        scales = sum(self.products) + sum(self.attention) + sum(self.head)
        return scales + self.conditioning + self.embedding

    @property
    def total(self) -> int:
        return self.transformer + self.decoder


def sampling(
    depth: int,
    patch_nums: Sequence[int] = SCALES_256,
    *,
    width: int | None = None,
    codes: int = 4096,
    channels: int = 32,
    guided: bool = True,
    mixed: bool = False,
    widths: Sequence[int] = VAR_WIDTHS,
    merged: bool = True,
) -> Sampling:
    """One image of VAR.

    Args:
        depth: blocks; width 64 depth where none is given.
        patch_nums: sides of the token maps.
        codes, channels: of the codebook.
        guided: whether the unconditional half is computed as well.
        mixed: whether the halves are mixed before the head.
        widths, merged: see `decoder`.
    """
    c, rows = width or 64 * depth, 2 if guided else 1
    lengths = [side * side for side in patch_nums]
    seen = list(accumulate(lengths))
    return Sampling(
        # q, k, v, the projection after them, and two layers of 4C: 12 C^2 weights a block
        products=tuple(2 * 12 * c * c * depth * rows * n for n in lengths),
        attention=tuple(2 * 2 * n * m * c * depth * rows for n, m in zip(lengths, seen, strict=True)),
        head=tuple(2 * c * codes * n * (1 if mixed else rows) for n in lengths),
        conditioning=2 * (6 * depth + 2) * c * c * rows,
        embedding=2 * channels * c * (seen[-1] - lengths[0]),
        decoder=decoder(widths, patch_nums[-1], channels, merged=merged),
    )


def decoder(
    widths: Sequence[int],
    grid: int,
    channels: int,
    *,
    blocks: int = 3,
    attends: bool = True,
    merged: bool = True,
    kernel: int = 3,
) -> int:
    """Of one image, the convolution before the decoder included: (channels, grid, grid) -> (3, S, S).

    Args:
        widths: of the levels, finest first.
        blocks: residual blocks of a level.
        attends: whether attention follows each block of the coarsest level; it always stands between the middle blocks.
        merged: nearest x2 and its 3x3 convolution as one transposed 4x4: 16 of 36 products.
        kernel: of the convolution before the decoder.
    """
    pixels, last = grid * grid, widths[-1]
    total = _conv(channels, channels, pixels, kernel) + _conv(channels, last, pixels)
    total += 2 * _residual(last, last, pixels) + _attention(last, pixels)
    before = last
    for level, width in reversed(list(enumerate(widths))):
        for a, b in pairwise([before, *[width] * blocks]):
            total += _residual(a, b, pixels)
            if attends and level == len(widths) - 1:
                total += _attention(b, pixels)
        if level:
            total += 2 * 16 * width * width * pixels if merged else _conv(width, width, 4 * pixels)
            pixels *= 4
        before = width
    return total + _conv(widths[0], 3, pixels)


def _conv(a: int, b: int, pixels: int, kernel: int = 3) -> int:
    return 2 * kernel * kernel * a * b * pixels


def _residual(a: int, b: int, pixels: int) -> int:
    shortcut = 0 if a == b else _conv(a, b, pixels, 1)
    return _conv(a, b, pixels) + _conv(b, b, pixels) + shortcut


def _attention(c: int, pixels: int) -> int:
    return _conv(c, 4 * c, pixels, 1) + 2 * 2 * pixels * pixels * c


def dit_step(
    depth: int = 28,
    width: int = 1152,
    tokens: int = 256,
    patch: int = 2,
    latent: int = 4,
    guided: bool = True,
) -> int:
    """One denoising step of one image, DiT-XL/2 at 256 px where nothing else is said."""
    products = 2 * 12 * width * width * tokens * depth
    attention = 2 * 2 * tokens * tokens * width * depth
    # projections of the class and the time, of every block and of the last norm
    conditioning = 2 * (6 * depth + 2) * width * width
    ends = 2 * tokens * width * patch * patch * (latent + 2 * latent)
    return (products + attention + conditioning + ends) * (2 if guided else 1)


def dit_decoder() -> int:
    """Of the Stable Diffusion autoencoder at 256 px."""
    return decoder(SD_WIDTHS, 32, 4, attends=False, merged=False, kernel=1)


def main() -> None:
    for depth in (16, 20, 24, 30):
        cost = sampling(depth)
        print(
            f"d{depth}: linear layers and head {(sum(cost.products) + sum(cost.head)) / 1e9:.0f}, attention "
            f"{sum(cost.attention) / 1e9:.0f}, AdaLN {cost.conditioning / 1e9:.1f}, decoder {cost.decoder / 1e9:.0f} "
            f"(published: {decoder(VAR_WIDTHS, 16, 32, merged=False) / 1e9:.0f}), all {cost.total / 1e9:.0f} GFLOP"
        )
    print(f"DiT-XL/2: a step {dit_step() / 1e9:.0f}, decoder {dit_decoder() / 1e9:.0f} GFLOP")


if __name__ == "__main__":
    main()
