"""What a config.json may ask for: each argument of the two models has its kind and range, looked at before anything is
built, so that a few bytes more in a file cost no memory and no minutes.

The bounds are far above every published model (depth 36, 10 scales, 512 pixels). Sizes that cost storage alone are
bounded by the file of weights, with which `model_folder.fill` compares every shape before it takes memory.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from typing import Any

from var_ext.schedule import SCALES_256

DEPTH, LEVELS, SCALES, SIDE, PHI = 256, 12, 64, 1024, 256
PIXELS = 16384  # side of an image

_Check = tuple[str, Callable[[Any], bool]]  # what is wanted, and whether a value is it


def _whole(low: int, high: int) -> _Check:
    def fits(value: Any) -> bool:
        return type(value) is int and low <= value <= high  # True is none

    return f"a whole number in {low}..{high}", fits


def _number(low: float, high: float) -> _Check:
    def fits(value: Any) -> bool:
        return type(value) in (int, float) and low <= value <= high  # NaN is not

    return f"a number in {low:g}..{high:g}", fits


def _list(count: int, low: int, high: int) -> _Check:
    each, fits_each = _whole(low, high)

    def fits(value: Any) -> bool:
        return isinstance(value, list | tuple) and 1 <= len(value) <= count and all(map(fits_each, value))

    return f"a list of 1 to {count} values, each {each}", fits


_FLAG: _Check = ("true or false", lambda value: isinstance(value, bool))
_SHARE, _SIDES = _number(0, 1), _list(SCALES, 1, SIDE)

VAE: Mapping[str, _Check] = {
    "vocab_size": _whole(1, 2**24), "z_channels": _whole(1, 2**14), "ch": _whole(1, 2**14), "dropout": _SHARE,
    "beta": _number(0, 1e6), "using_znorm": _FLAG, "quant_conv_ks": _whole(1, 99), "quant_resi": _number(-4, 4),
    "share_quant_resi": _whole(0, PHI), "default_qresi_counts": _whole(0, PHI), "v_patch_nums": _SIDES,
    "test_mode": _FLAG, "ch_mult": _list(LEVELS, 1, 2**10),
}  # fmt: skip
VAR: Mapping[str, _Check] = {
    "num_classes": _whole(1, 2**24), "depth": _whole(1, DEPTH), "embed_dim": _whole(1, 2**17),
    "num_heads": _whole(1, 2**12), "mlp_ratio": _number(1e-3, 100), "drop_rate": _SHARE, "attn_drop_rate": _SHARE,
    "drop_path_rate": _SHARE, "norm_eps": _number(0, 1), "shared_aln": _FLAG, "cond_drop_rate": _SHARE,
    "attn_l2_norm": _FLAG, "patch_nums": _SIDES, "flash_if_available": _FLAG, "fused_if_available": _FLAG,
}  # fmt: skip


def check_vae(config: Mapping[str, Any]) -> None:
    """Raises ValueError for the first argument of VQVAE that is out of range or of another kind. Unknown ones are left
    to the constructor, which names them."""
    _check(config, VAE)
    sides, levels = config.get("v_patch_nums", SCALES_256), len(config.get("ch_mult", range(5)))
    pixels = max(sides) * 2 ** (levels - 1)
    if pixels > PIXELS:
        raise ValueError(f"the side of an image must be at most {PIXELS} pixels, got {pixels}")


def check_var(config: Mapping[str, Any]) -> None:
    """The same of VAR."""
    _check(config, VAR)


def _check(config: Mapping[str, Any], known: Mapping[str, _Check]) -> None:
    for name, (wanted, fits) in known.items():
        if name in config and not fits(config[name]):
            raise ValueError(f"{name} must be {wanted}, got {reprlib.repr(config[name])}")
