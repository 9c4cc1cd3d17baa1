"""The precision that sampling runs in."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from var_ext import _torch

NAMES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.bfloat16}


@dataclass(frozen=True)
class Precision:
    """Arithmetic of the transformer and the decoder; the quantizer's is always float32.

    `dtype` is that of activations, cache, and all weights that `int8` does not store as 8-bit integers.
    """

    name: str
    dtype: torch.dtype
    int8: bool = False

    @property
    def mixes_hidden(self) -> bool:
        """Whether guidance may be mixed before the head, which halves its work but rounds differently."""
        return self.dtype in (torch.bfloat16, torch.float16)


def default_precision(device: torch.device) -> str:
    """ "bf16" where the device supports it, else "fp32"."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.cpu.get_capabilities().get("avx512_bf16") else "fp32"


def named_precision(name: str | torch.dtype, device: torch.device) -> Precision:
    """The precision of this name, or of a dtype.

    Raises:
        ValueError: the name is unknown, or the device does not support it.
    """
    if isinstance(name, torch.dtype):
        name = next((n for n, dtype in NAMES.items() if dtype == name), str(name).removeprefix("torch."))
    if name not in NAMES:
        raise ValueError(f"precision must be one of {', '.join(NAMES)}, got {name!r}")
    on = device.type
    if name == "int8" and (on != "cpu" or not torch.backends.mkldnn.is_available()):
        raise ValueError(f"precision int8 is for linear layers on the CPU through oneDNN, got device {on}")
    if name == "int8" and not _torch.multiplies_int8():
        raise ValueError(
            f"precision int8 needs torch.ops.onednn.qlinear_pointwise, which torch {torch.__version__} does not have: "
            "take bf16 or fp32"
        )
    if name == "fp16" and on == "cpu" and not _torch.multiplies_fp16():
        raise ValueError(
            "precision fp16 needs a GPU or a CPU with its arithmetic (avx512_fp16), got neither: take bf16"
        )
    if name == "bf16" and on == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError(
            "precision bf16 needs a GPU of compute capability 8.0 or newer, got an older one: take fp16"
        )
    return Precision(name, NAMES[name], int8=name == "int8")


def precision_in_force(weight: torch.Tensor) -> Precision:
    """The dtype of the surrounding autocast, else of the model's weights."""
    on = weight.device.type
    dtype = torch.get_autocast_dtype(on) if torch.is_autocast_enabled(on) else weight.dtype
    name = next((n for n, known in NAMES.items() if known == dtype), str(dtype).removeprefix("torch."))
    return Precision(name, dtype)
