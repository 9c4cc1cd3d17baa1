"""How fast a run is: images and tokens a second, the share of waiting for data, memory, FLOPs in use."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Name of a GPU -> its peak in dense bf16 and fp16, TFLOP/s, by data sheets; the longest name that fits counts.
PEAKS = {
    "V100": 125, "T4": 65, "A10": 125, "A30": 165, "A40": 149.7, "A100": 312, "L4": 121, "L40": 181, "L40S": 362,
    "H20": 148, "H100": 989, "H100 PCIe": 756, "H100 NVL": 835, "H200": 989, "B200": 2250,
}  # fmt: skip


def peak_tflops(name: str) -> float:
    """Peak of the GPU of this name in bf16 or fp16, TFLOP/s; 0 where it is not known."""
    words = f" {name.replace('-', ' ')} "
    known = [gpu for gpu in PEAKS if f" {gpu} " in words]
    return PEAKS[max(known, key=len)] if known else 0.0


class Meter:
    """Speed since the last reading.

    Args:
        device: of this rank.
        images: of a step, of all ranks.
        tokens: of an image, 0 where there are none.
        flops: of an image.
        peak: FLOP/s of all ranks, 0 where it is not known.
    """

    def __init__(
        self, device: torch.device, images: int, *, tokens: int = 0, flops: int = 0, peak: float = 0.0
    ) -> None:
        self.device, self.images, self.tokens, self.flops, self.peak = device, images, tokens, flops, peak
        self.start()

    def start(self) -> None:
        """Forget what was measured since the last reading."""
        self.steps, self.waited, self.began = 0, 0.0, time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for the batch of a step."""
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began
        self.steps += 1

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Around what is no training: validation, checkpoints."""
        began = time.perf_counter()
        yield
        self.began += time.perf_counter() - began

    def read(self) -> dict[str, float]:
        """images_per_second and tokens_per_second of all ranks; data_wait, the share of the time (%); peak_memory of
        this rank (GB); mfu, FLOPs over the chips' peak (%). What does not apply or is not known is left out."""
        seconds = time.perf_counter() - self.began
        images = self.images * self.steps / seconds
        found = {"images_per_second": images, "data_wait": 100 * self.waited / seconds}
        if self.tokens:
            found["tokens_per_second"] = self.tokens * images
        if self.flops and self.peak:
            found["mfu"] = 100 * self.flops * images / self.peak
        self.start()
        return {**found, "peak_memory": self._memory() / 2**30}

    def _memory(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
