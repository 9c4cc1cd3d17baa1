"""`evaluate_tokenizer`: how well a tokenizer gives images back, and whether it uses its codes, scale by scale."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from var_ext.data import ImageDataset, ImageLoader
from var_ext.data.picture_dataset import PictureDataset
from var_ext.evaluation.features import Space
from var_ext.evaluation.frechet import gaussian_distance
from var_ext.evaluation.moments import Moments
from var_ext.evaluation.similarity import LEAST, psnr, ssim
from var_ext.evaluation.tokenizer_report import Distance, ScaleRow, TokenizerReport
from var_ext.export import to_uint8
from var_ext.models import VQVAE
from var_ext.models.keyed import Draws, Rows, row_keys
from var_ext.models.remedies import perturb, residuals
from var_ext.training.losses import LPIPS
from var_ext.training.usage import allowed, perplexity

SHOWN = 6  # images in the picture of a report


@torch.no_grad()
def evaluate_tokenizer(
    vae: VQVAE,
    data: ImageDataset,
    *,
    count: int | None = None,
    batch_size: int = 32,
    spaces: Sequence[Space] = (),
    lpips: Callable[[Tensor, Tensor], Tensor] | None = None,
    perturbed_tokens: float | None = 0.5,
    perturbed_codes: int = 8,
    partial: bool = True,
    seed: int = 0,
    workers: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> TokenizerReport:
    """Measures a tokenizer on images.

    Reconstructions are compared as floats in [0, 1], clipped; for Fréchet distances they are truncated to bytes, as
    exports are. That of Inception's features is rFID, to the same crops. The distance of perturbed ones (pFID) says how
    well the decoder bears wrong tokens, of which a transformer draws some (arXiv 2503.08354): a share of all tokens is
    replaced, each by one of its nearest codes.

    Args:
        vae: the tokenizer; left on the device, in evaluation mode.
        data: images of its size.
        count: how many, evenly spaced in the data, whose classes follow each other; None is all.
        batch_size: images computed at once; figures do not depend on it but for rounding.
        spaces: of the Fréchet distances, of reconstructions and perturbed ones to the images.
        lpips: such as `training.losses.load_lpips`: (images, reconstructions), both (B, 3, S, S) in [-1, 1] -> (B,);
            None leaves it out.
        perturbed_tokens, perturbed_codes: the share, None leaves it out, and how many nearest codes there are to take.
        partial: whether images of fewer scales are decoded too, for PSNR and SSIM of each scale and the picture of the
            report; False: all scales alone, in a fraction of the time.
        seed: of the perturbation, which is drawn for each image alone.
        workers: processes that read images.

    Raises:
        ValueError: images of another size, too small for LPIPS, none, or fewer than two for a distance; numbers out of
            range.
        DataError: an image is broken.
    """
    _check(vae, data, count, batch_size, perturbed_tokens, perturbed_codes)
    if isinstance(lpips, LPIPS):
        lpips.check_size(data.image_size, data.image_size, ": leave out lpips")
    total = len(data) if count is None else min(count, len(data))
    if spaces and total < 2:
        raise ValueError(f"a Fréchet distance needs at least 2 images, got {total}")
    vae.to(device).eval()
    quantizer, schedule = vae.quantize, vae.schedule
    hits = torch.zeros(len(schedule), vae.vocab_size, dtype=torch.float64)
    decoded = range(len(schedule)) if partial else [len(schedule) - 1]  # up to which scale
    # PSNR and SSIM of each number of scales; L1, squared error and LPIPS of all scales
    by_scale = torch.zeros(2, len(decoded), dtype=torch.float64)
    errors = torch.zeros(3, dtype=torch.float64)
    moments = [{name: Moments() for name in ("images", "reconstructions", "perturbed")} for _ in spaces]
    shown: list[Tensor] = []
    show = evenly(min(SHOWN, total), total).tolist()
    indices, rows = evenly(total, len(data)).split(batch_size), torch.arange(total).split(batch_size)
    loader = ImageLoader(data, workers=workers, device=device)
    batches = tqdm(loader.batches(indices, [0]), total=len(rows), desc="images", disable=not progress)
    for part, (images, _) in zip(rows, batches, strict=True):
        x = images[:, 0]  # (B, 3, S, S)
        features = vae.features(x).float()
        tokens, _, scales = quantizer.quantize(features, schedule, per_scale=True)
        assert scales is not None
        hits += quantizer.hits(tokens).double().cpu()
        steps = [(vae.fhat_to_img(scales[k]).float() + 1) / 2 for k in decoded]
        real, last = (x + 1) / 2, steps[-1]
        for k, step in enumerate(steps):
            by_scale[:, k] += torch.stack([psnr(step, real).sum(), ssim(step, real).sum()]).cpu()
        difference = (last - real).double()
        errors[0] += float(difference.abs().mean((1, 2, 3)).sum())
        errors[1] += float(difference.square().mean((1, 2, 3)).sum())
        if lpips is not None:
            errors[2] += float(lpips(x, last * 2 - 1).double().sum())
        if spaces:
            compared = {"images": real, "reconstructions": as_bytes(last)}
            if perturbed_tokens is not None:
                keys = row_keys(seed, slice(int(part[0]), int(part[-1]) + 1), x.device)
                compared["perturbed"] = as_bytes(
                    perturbed(vae, features, tokens, scales, keys, perturbed_tokens, perturbed_codes)
                )
            for space, mine in zip(spaces, moments, strict=True):
                for name, each in compared.items():
                    mine[name].add(space.features(each))
        for place, row in enumerate(part.tolist()):
            if partial and row in show:
                shown.append(torch.stack([each[place] for each in (real, *steps)]).cpu())  # (1 + K, 3, S, S)
    psnrs, ssims = (by_scale / total).tolist()
    l1, l2, perceptual = (errors / total).tolist()
    found = [
        ScaleRow(
            side=side,
            tokens=total * side * side,
            codes=int(used),
            allowed=allowed(total * side * side, vae.vocab_size),
            perplexity=each,
            psnr=psnrs[k] if partial else None,
            ssim=ssims[k] if partial else None,
        )
        for k, (side, used, each) in enumerate(
            zip(schedule.patch_nums, (hits > 0).sum(1), perplexity(hits).tolist(), strict=True)
        )
    ]
    return TokenizerReport(
        data=f"{data.spec}, split {data.split!r}",
        reading=f"{data.geometry} and {data.decode}" if isinstance(data, PictureDataset) else "",
        count=total,
        image_size=vae.image_size,
        vocab_size=vae.vocab_size,
        psnr=psnrs[-1],
        ssim=ssims[-1],
        l1=l1,
        l2=l2,
        lpips=perceptual if lpips is not None else None,
        lpips_name=None if lpips is None else getattr(lpips, "name", "unnamed"),
        distances=tuple(distance_of(space.name, mine) for space, mine in zip(spaces, moments, strict=True)),
        perturbed_tokens=perturbed_tokens,
        perturbed_codes=min(perturbed_codes, vae.vocab_size),
        scales=tuple(found),
        shown=torch.stack(shown) if partial else None,
    )


def as_bytes(images: Tensor) -> Tensor:
    """Images in [0, 1] as a file of an export has them, truncated to multiples of 1/255."""
    return to_uint8(images).permute(0, 3, 1, 2).float() / 255


def distance_of(name: str, moments: dict[str, Moments]) -> Distance:
    """Of reconstructions and of perturbed ones, if there are any, to the images."""
    reference = moments["images"].gaussian()
    found = {
        key: gaussian_distance(*moments[key].gaussian(), *reference)
        for key in ("reconstructions", "perturbed")
        if moments[key].count
    }
    return Distance(name, **found)


def evenly(count: int, total: int) -> Tensor:
    """`count` of the numbers 0..total-1, (count,) int64."""
    return torch.arange(count) * total // count


def perturbed(
    vae: VQVAE, features: Tensor, tokens: Tensor, scales: Tensor, keys: Tensor, share: float, near: int
) -> Tensor:
    """Images (B, 3, S, S) in [0, 1] from perturbed tokens, see `models.remedies.perturb`."""
    schedule = vae.schedule
    rest = residuals(features, scales, schedule.patch_nums)
    kept = torch.full((len(tokens),), len(schedule), device=tokens.device)
    rows = Rows(keys.device)
    rows.keys = keys
    uniform = Draws(rows, 0).uniform(2 * schedule.num_tokens)
    f_hat = perturb(vae.quantize, rest, tokens, kept, uniform, share, near)
    return (vae.fhat_to_img(f_hat).float() + 1) / 2


def _check(
    vae: VQVAE, data: ImageDataset, count: int | None, batch_size: int, share: float | None, near: int
) -> None:
    if data.image_size != vae.image_size:
        raise ValueError(f"images must be of the tokenizer's {vae.image_size} px, got {data.image_size}")
    if vae.image_size < LEAST:
        raise ValueError(f"SSIM needs images of at least {LEAST} px, got {vae.image_size}")
    if len(data) == 0 or batch_size < 1 or (count is not None and count < 1):
        raise ValueError(
            f"images, count and batch_size must be at least 1, got {len(data)}, {count} and {batch_size}"
        )
    if not 0 <= (share or 0) <= 1 or near < 1:
        raise ValueError(
            f"perturbed_tokens must be in [0, 1] and perturbed_codes at least 1, got {share} and {near}"
        )
