"""Fine-tuning: a new transformer begins with the weights of a trained one, a tokenizer gets other scales, parameters
stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from var_ext.models import VAR, VQVAE

# Arguments of VAR that decide the sizes and the meaning of the weights; all others may differ.
FIXED = ("depth", "embed_dim", "num_heads", "mlp_ratio", "shared_aln", "attn_l2_norm")


@torch.no_grad()
def init_from(var: VAR, source: VAR) -> list[str]:
    """Copy the weights of `source` into `var`; parameters that `source` does not have keep their initial values.

    With another number of classes, class embeddings stay as they are initialized; that of "no class" is copied. With
    another schedule, scale k takes the level embedding of the source's scale k, or of its last one, and the positions
    of that scale, resized from (n, n) to (m, m) by antialiased bicubic interpolation, as in ViT fine-tuning (arXiv
    2010.11929, section 3.2).

    Args:
        var: the transformer to train, on any device.
        source: a trained one.

    Returns:
        A sentence for each thing that was not copied as it is.

    Raises:
        ValueError: depth, width, heads or the kind of a layer differ, or the tokenizer's codes do.
    """
    sizes = [
        f"{name} = {var.config[name]}, got {source.config[name]}"
        for name in FIXED
        if var.config[name] != source.config[name]
    ]
    sizes += [
        f"{what} = {a}, got {b}"
        for what, a, b in (("codes", var.V, source.V), ("code channels", var.Cvae, source.Cvae))
        if a != b
    ]
    if sizes:
        raise ValueError(f"weights to begin with must be of a transformer with {'; '.join(sizes)}")
    notes = []
    if not torch.equal(_codebook(var), _codebook(source)):
        notes.append("the tokenizer has other codes than the one that the weights were trained with")
    values = {name: value for name, value in source.state_dict().items() if name not in _OF_THE_SCHEDULE}
    if var.num_classes != source.num_classes:
        none = values.pop("class_emb.weight")[-1]
        var.class_emb.weight[-1].copy_(none)
        notes.append(f"class embeddings are new: {var.num_classes} classes instead of {source.num_classes}")
    ours, theirs = var.schedule.patch_nums, source.schedule.patch_nums
    if ours != theirs:
        notes.append(
            f"level embeddings are copied and positions resized: scales {_list(ours)} instead of {_list(theirs)}"
        )
    taken = [min(k, len(theirs) - 1) for k in range(len(ours))]
    values["lvl_embed.weight"] = source.lvl_embed.weight[taken]
    maps = [source.pos_1LC[:, where] for where in source.schedule.slices]
    values["pos_1LC"] = torch.cat(
        [_resized(maps[k], side) for k, side in zip(taken, ours, strict=True)], dim=1
    )
    values["pos_start"] = _resized(source.pos_start, ours[0])
    own = var.state_dict()
    for name, value in values.items():
        own[name].copy_(value)
    return notes


def _codebook(var: VAR) -> Tensor:
    weight: Tensor = var.vae_proxy[0].quantize.embedding.weight
    return weight.detach().cpu()


_OF_THE_SCHEDULE = {"lvl_1L", "attn_bias_for_masking"}  # buffers


def with_scales(vae: VQVAE, patch_nums: Sequence[int]) -> VQVAE:
    """A tokenizer with the same weights and other scales: published weights of 256 px serve 512 px so.

    Raises:
        ValueError: each scale has a convolution phi of its own, and their number differs.
    """
    if tuple(patch_nums) == vae.schedule.patch_nums:
        return vae
    if vae.config["share_quant_resi"] == 0 and len(patch_nums) != len(vae.schedule):
        raise ValueError(
            f"patch_nums must be {len(vae.schedule)} scales, for each of which this tokenizer has a phi, got "
            f"{_list(patch_nums)}"
        )
    other = VQVAE(**{**vae.config, "v_patch_nums": tuple(patch_nums)})
    entries = vae.state_dict()
    del entries["quantize.ema_vocab_hit_SV"]  # (scales, V), a statistic of training
    other.load_state_dict(entries, strict=False)
    return other.eval()


def _resized(positions: Tensor, side: int) -> Tensor:
    """(1, n n, C) -> (1, side side, C)."""
    before = round(positions.shape[1] ** 0.5)
    if before == side:
        return positions
    grid = positions.float().unflatten(1, (before, before)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", antialias=True, align_corners=False)
    return grid.flatten(2).transpose(1, 2).to(positions.dtype)


def _list(values: Iterable[int]) -> str:
    return ", ".join(map(str, values))


def matching(names: Iterable[str], patterns: Sequence[str], option: str, kind: str) -> list[str]:
    """The names that match one of `patterns`: * and ? as in file names, {0-7} a range of numbers.

    Args:
        option, kind: of the patterns and of what is named, in the error.

    Raises:
        ValueError: a pattern matches none.
    """
    known, found = list(names), set[str]()
    for pattern in patterns:
        these = {name for name in known if any(fnmatchcase(name, one) for one in _expanded(pattern))}
        if not these:
            raise ValueError(
                f"{option}: {pattern!r} matches no {kind}; names are like {', '.join(known[:3])}"
            )
        found |= these
    return [name for name in known if name in found]


def freeze(model: nn.Module, patterns: Sequence[str]) -> int:
    """Parameters whose names match one of `patterns` ("blocks.0.*", "*emb*"), see `matching`, are not trained.

    Returns:
        How many numbers that are.

    Raises:
        ValueError: a pattern matches no parameter, or nothing would be left to train.
    """
    named = dict(model.named_parameters())
    frozen = 0
    for name in matching(named, patterns, "freeze", "parameter"):
        frozen += named[name].numel() if named[name].requires_grad else 0
        named[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in named.values()):
        raise ValueError(f"freeze: {', '.join(patterns)} leave nothing to train")
    return frozen


def _expanded(pattern: str) -> list[str]:
    """ "blocks.{0-2}.*" as three patterns."""
    found = re.search(r"\{(\d+)-(\d+)\}", pattern)
    if found is None:
        return [pattern]
    first, last = int(found[1]), int(found[2])
    before, after = pattern[: found.start()], pattern[found.end() :]
    return [one for number in range(first, last + 1) for one in _expanded(f"{before}{number}{after}")]
