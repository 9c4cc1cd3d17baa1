"""Draws the images of a plan that are not on disk yet."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

from torch import distributed
from tqdm import tqdm

from var_ext.checkpoints import CheckpointError
from var_ext.export.destinations import Place, place_of, to_uint8
from var_ext.export.plan import Plan, agree
from var_ext.sampling import Sampler

log = logging.getLogger(__name__)

PATIENCE = 3600.0  # seconds without a new part from other ranks
LOOK_EVERY = 0.5  # seconds


def export_images(
    sampler: Sampler,
    plan: Plan,
    out: str | os.PathLike[str],
    *,
    progress: bool = False,
    patience: float = PATIENCE,
) -> Path:
    """Write the images of a plan to disk.

    What is there and whole is kept, so a run that was stopped goes on when it is started again, with any number of
    ranks. With ranks (`rank_and_world`), part i is drawn by rank i modulo their number; they share the folder and need
    no other connection. Rank 0 returns when all is there, the others when their share is.

    Args:
        sampler: draws the images.
        plan: which images; see `evaluation_plan`.
        out: NAME.npz, or a folder for PNGs; see `Npz` and `Folder`.
        progress: show a progress bar, on rank 0; else each part is a line of the log.
        patience: seconds that rank 0 waits for the next part of another rank.

    Returns:
        The path of `out`.

    Raises:
        CheckpointError: other images are there (says what differs), the disk refuses, or a rank gave up.
        ValueError: a label or an option is out of range.
    """
    rank, world = rank_and_world()
    place = place_of(out, plan, sampler.image_size)
    place.check()
    agree(place.plan_file, plan.record(sampler))
    mine = plan.parts[rank::world]
    # this order: rank 0 may remove the parts in between, and then it has finished
    missing = [part for part in mine if not place.complete(part)]
    if not place.finished():
        _draw(sampler, plan, place, mine, missing, progress and rank == 0)
        if rank == 0:
            _wait(place, plan.parts, patience)
    if rank == 0:
        place.finish()
    return place.path


def _draw(
    sampler: Sampler, plan: Plan, place: Place, mine: list[range], missing: list[range], progress: bool
) -> None:
    total, left = sum(map(len, mine)), sum(map(len, missing))
    log.info("%d of %d images to draw for %s", left, total, place.path)
    # only the last part of a plan is shorter, and it comes last: the batches are the parts
    batches = sampler.stream(
        [plan.labels[index] for part in missing for index in part],
        [plan.seeds[index] for part in missing for index in part],
        batch_size=plan.batch_size,
        **plan.resolved(sampler),
    )
    with tqdm(total=total, initial=total - left, desc="images", unit="img", disable=not progress) as bar:
        for part, (_, images) in zip(missing, batches, strict=True):
            place.write(part, to_uint8(images).cpu().numpy())
            bar.update(len(part))


def _wait(place: Place, parts: list[range], patience: float) -> None:
    """Returns when all parts are complete."""
    left, quiet = parts, 0.0
    while still := [part for part in left if not place.complete(part)]:
        if len(still) < len(left):
            quiet = 0.0
        if quiet >= patience:
            raise CheckpointError(
                f"{place.path} lacks {len(still)} of {len(parts)} parts, and no other rank wrote one in {quiet:.0f} s; "
                "the same command again, with any number of ranks, draws them"
            )
        if quiet == 0:
            log.info("waiting for %d of %d parts from other ranks", len(still), len(parts))
        left = still
        time.sleep(LOOK_EVERY)
        quiet += LOOK_EVERY


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of ranks.

    Those of torch.distributed where it runs, else RANK and WORLD_SIZE as torchrun sets them, else 0 of 1.

    Raises:
        ValueError: the variables are no such pair.
    """
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    rank, world = (os.environ.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        raise ValueError(f"RANK must be less than WORLD_SIZE, got {rank!r} and {world!r}")
    return int(rank), int(world)


def local_device(device: str) -> str:
    """For "cuda": the device of this process among those of its machine, which torchrun numbers in LOCAL_RANK."""
    local = os.environ.get("LOCAL_RANK", "")
    return f"cuda:{local}" if device == "cuda" and local.isdecimal() else device
