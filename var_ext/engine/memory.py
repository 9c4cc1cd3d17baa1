"""How many images fit into memory at once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from var_ext.engine.precision import Precision

LARGEST_BATCH = 64  # chosen here: matmuls saturate at smaller batches


def bytes_per_image(var: Any, precision: Precision) -> int:
    """Bytes that one more image with guidance needs while sampling; counted, and measured to be within a fifth."""
    schedule, size = var.schedule, precision.dtype.itemsize
    cache = 2 * var.depth * schedule.num_tokens * var.C  # keys and values
    hidden = round(var.C * (4 + 3 + 2 * 4))  # the stream, a branch, qkv, the feed-forward layer twice
    last = max(schedule.lengths)
    vae = var.vae_proxy[0]
    features, pixels = var.Cvae * schedule.side**2, 3 * vae.image_size**2
    bytes_ = size * 2 * (cache + last * hidden) + 4 * (2 * last * var.V + 4 * features + 2 * pixels)
    if var.pos_1LC.is_cuda:  # decoded as a batch there: four full-size feature maps
        bytes_ += size * 4 * vae.decoder.norm_out.num_channels * vae.image_size**2
    return bytes_


def out_of_memory(error: RuntimeError) -> bool:
    """Whether memory ran out; on the CPU torch has no error class for it."""
    return isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error)


def budget(device: torch.device) -> int:
    """Half of the device's free memory, in bytes."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch
        return (torch.cuda.mem_get_info(device)[0] + cached) // 2
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024 // 2
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4


def batch_for(var: Any, precision: Precision, device: torch.device, memory: int | None) -> int:
    """Batch size that fits `memory` bytes; None: `budget`.

    Raises:
        ValueError: not even one image fits.
    """
    given, each = budget(device) if memory is None else memory, bytes_per_image(var, precision)
    if given < each:
        raise ValueError(
            f"the memory budget must be at least {each / 2**20:.1f} MiB, what one image takes, "
            f"got {given / 2**20:.1f} MiB"
        )
    return min(given // each, LARGEST_BATCH)
