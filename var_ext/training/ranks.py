"""The processes that train together: who they are, whose the rows of a batch are, and sums over all of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from var_ext.export import local_device, rank_and_world

PATIENCE = timedelta(days=7)  # for work of one rank that others wait for: tokens, checkpoints


@dataclass(frozen=True)
class Part:
    """Rows that a rank computes at once.

    Attributes:
        rows: of the global batch.
        share: weight of their mean in the mean over the global batch, times the number of ranks, over which
            gradients are averaged; 0 for rows that only keep this rank in step with the others.
        last: whether the optimizer steps after it.
    """

    rows: slice
    share: float
    last: bool


@dataclass(frozen=True)
class Ranks:
    """This process among those of a run.

    Attributes:
        rank, world: which one, of how many; 0 of 1 without a launcher.
        patient: process group for what may take long, None for one process.
        prompt: process group of CPU tensors for what every step agrees on, None for one process.
        saving: process group of the thread that writes checkpoints, None for one process.
    """

    rank: int = 0
    world: int = 1
    patient: Any = None
    prompt: Any = None
    saving: Any = None

    def rows(self, count: int) -> slice:
        """This rank's share of `count` rows: ranks take neighbouring rows, whose numbers differ by at most one."""
        return slice(self.rank * count // self.world, (self.rank + 1) * count // self.world)

    def parts(self, count: int, most: int = 0, *, even: bool = False) -> list[Part]:
        """This rank's rows of `count`, in parts of at most `most` (0: all at once).

        Args:
            even: all ranks get the same number of parts, some of them with a share of 0: needed where every part
                communicates.
        """
        mine = self.rows(count)
        own, largest = mine.stop - mine.start, -(-count // self.world)
        parts = -(-(largest if even else own) // (most or largest))
        ends = [mine.start + own * i // parts for i in range(parts + 1)] if parts else []
        found = []
        for i, (start, stop) in enumerate(pairwise(ends)):
            if stop > start:
                found.append(Part(slice(start, stop), self.world * (stop - start) / count, i == parts - 1))
            elif even:
                first = min(start, count - 1)
                found.append(Part(slice(first, first + 1), 0.0, i == parts - 1))
        return found

    def sum(self, tensor: Tensor) -> Tensor:
        """`tensor`, in place the sum over ranks."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def together(self, mine: Tensor, count: int) -> Tensor:
        """Rows of all ranks, (count, ...), from this rank's."""
        if self.world == 1:
            return mine
        whole = mine.new_zeros(count, *mine.shape[1:])
        whole[self.rows(count)] = mine
        return self.sum(whole)

    def any(self, *mine: bool) -> list[bool]:
        """Each of `mine`, or true where it is on another rank."""
        flags = torch.tensor(mine, dtype=torch.uint8)
        if self.world > 1:
            dist.all_reduce(flags, dist.ReduceOp.MAX, self.prompt)
        return [bool(flag) for flag in flags.tolist()]

    def wait(self) -> None:
        """Until all ranks are here, for as long as it takes."""
        if self.world > 1:
            dist.barrier(self.patient)

    @contextmanager
    def one_first(self) -> Iterator[None]:
        """Inside the block rank 0 is alone; the others follow when it is through."""
        if self.rank:
            self.wait()
        yield
        if not self.rank:
            self.wait()


ALONE = Ranks()


def check_share(images: int, world: int) -> None:
    """ValueError if a step of so many images leaves a rank without any."""
    if images < world:
        raise ValueError(
            f"a step has {images} images for {world} ranks: take a larger batch_size or fewer ranks"
        )


@contextmanager
def join(device: str | torch.device, timeout: float) -> Iterator[tuple[Ranks, torch.device]]:
    """The ranks that torchrun started (or that the caller's process group has), and this one's device.

    Args:
        device: "cpu" (gloo) or "cuda" (NCCL; GPU number LOCAL_RANK); with one process any device.
        timeout: seconds after which a rank that others wait for in a step counts as lost; they end with an error.

    Raises:
        ValueError: the launcher or the device does not serve for several ranks.
    """
    rank, world = rank_and_world()
    device = torch.device(device)
    if world == 1:
        yield ALONE, device
        return
    if str(device) != device.type:
        raise ValueError(
            f"with {world} ranks the device must be cpu or cuda, got {device}: each takes the GPU of its LOCAL_RANK"
        )
    ours = not dist.is_initialized()
    if ours:
        device = _start(device, world, timedelta(seconds=timeout))
    try:
        # the caller's own group may be one that cannot be waited in for long
        patient = dist.new_group(backend="gloo", timeout=PATIENCE)
        prompt = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        saving = dist.new_group(backend="gloo", timeout=PATIENCE)
        yield Ranks(rank, world, patient, prompt, saving), device
    finally:
        if ours:
            dist.destroy_process_group()


def _start(device: torch.device, world: int, timeout: timedelta) -> torch.device:
    missing = [
        name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ
    ]
    if missing:
        raise ValueError(
            f"{world} ranks without {', '.join(missing)} cannot find each other: start them with "
            f"torchrun --nproc-per-node {world} -m var_ext train ..."
        )
    if device.type == "cuda":
        device = torch.device(local_device("cuda"))
        if (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(
                f"rank {os.environ['RANK']} wants {device}, got {torch.cuda.device_count()} GPUs: start as many ranks "
                "a machine (--nproc-per-node) as it has GPUs"
            )
        torch.cuda.set_device(device)
    backend = {"cpu": "gloo", "cuda": "nccl"}[device.type]
    dist.init_process_group(backend, timeout=timeout, device_id=device if backend == "nccl" else None)
    return device
