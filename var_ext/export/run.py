"""Draws the images of a plan that are not on disk yet."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import distributed
from tqdm import tqdm

from var_ext.checkpoints import CheckpointError
from var_ext.export.destinations import Place, place_of, to_uint8
from var_ext.export.plan import Plan, agree
from var_ext.sampling import Sampler

log = logging.getLogger(__name__)

PATIENCE = 3600.0  # seconds without a new part from other ranks
LOOK_EVERY = 0.5  # seconds
ATTEMPTS = 3  # to make parts, where files vanish

Make = Callable[[list[int], list[int]], Iterator[np.ndarray]]

# Variables that launchers set: the rank, the number of ranks, and the rank on this machine. A SLURM job script has a
# rank too, but no number of tasks of a step: it runs once.
LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),  # torchrun
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),  # mpirun of Open MPI
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),  # srun
)


def export_images(
    sampler: Sampler,
    plan: Plan,
    out: str | os.PathLike[str],
    *,
    progress: bool = False,
    patience: float = PATIENCE,
) -> Path:
    """Write the images of a plan to disk.

    Complete files are kept, so a stopped run resumes when started again, with any number of ranks. With ranks
    (`rank_and_world`), part i is drawn by rank i modulo their number; they share the folder and need no other
    connection. Rank 0 returns when everything is done, the others when their share is. A warning in the log names the
    ranks it waits for. The same export twice at once, without ranks, is drawn twice with the same result.

    Args:
        sampler: draws the images.
        plan: which images; see `evaluation_plan`.
        out: NAME.npz, or a folder for PNGs; see `Npz` and `Folder`.
        progress: show a progress bar, on rank 0; else log a line per part.
        patience: seconds that rank 0 waits for the next part of another rank.

    Returns:
        The path of `out`.

    Raises:
        CheckpointError: other images are there (says what differs), the disk fails, or a rank gave up.
        ValueError: a label or an option is out of range.
    """
    place = place_of(out, plan, sampler.image_size)

    def pixels(labels: list[int], seeds: list[int]) -> Iterator[np.ndarray]:
        batches = sampler.stream(labels, seeds, batch_size=plan.batch_size, **plan.resolved(sampler))
        return (to_uint8(images).cpu().numpy() for _, images in batches)

    fill(sampler, place, pixels, progress=progress, patience=patience)
    return place.path


def fill(
    sampler: Sampler, place: Place, make: Make, *, progress: bool, patience: float, together: bool = False
) -> None:
    """Make what a place lacks; arguments and errors as of `export_images`.

    Args:
        make: what goes there, of labels and seeds, in batches of the size of a part.
        together: all ranks, and not only the first, return when everything is there.
    """
    rank, world = rank_and_world()
    plan = place.plan
    place.check()
    make([], [])  # refuses options that are wrong before a record of them is left
    agree(place.plan_file, plan.record(sampler))
    mine = plan.parts[rank::world]
    for _ in range(ATTEMPTS):  # a part of its own that somebody removed is made again
        # this order: rank 0 may remove the parts in between, and then it has finished
        missing = [part for part in mine if not place.complete(part)]
        if not missing or place.finished():
            break
        _draw(place, make, mine, missing, progress and rank == 0)
    if not place.finished() and (rank == 0 or together):
        _wait(place, plan.parts, rank, world, patience)
    if rank == 0:
        place.finish()


def _draw(place: Place, make: Make, mine: list[range], missing: list[range], progress: bool) -> None:
    plan = place.plan
    total, left = sum(map(len, mine)), sum(map(len, missing))
    log.info("%d of %d %s to draw for %s", left, total, place.what, place.path)
    # only the last part of a plan is shorter, and it comes last: the batches are the parts
    batches = make(
        [plan.labels[index] for part in missing for index in part],
        [plan.seeds[index] for part in missing for index in part],
    )
    with tqdm(total=total, initial=total - left, desc=place.what, unit="img", disable=not progress) as bar:
        for part, values in zip(missing, batches, strict=True):
            try:
                place.write(part, values)
            except CheckpointError:  # the same export at the same time may have written it, or finished
                if not place.complete(part) and not place.finished():
                    raise
            bar.update(len(part))


def _wait(place: Place, parts: list[range], rank: int, world: int, patience: float) -> None:
    """Returns when all parts are complete, or the same export has finished elsewhere."""
    left, quiet, told = dict(enumerate(parts)), 0.0, None
    while still := {i: part for i, part in left.items() if not place.complete(part)}:
        if place.finished():
            return
        if len(still) < len(left):
            quiet = 0.0
        ranks = sorted({i % world for i in still})
        if quiet >= patience or ranks == [rank]:  # its own parts were written: somebody removed them
            raise CheckpointError(
                f"{place.path} lacks {len(still)} of {len(parts)} parts, of rank {_few(ranks)} of {world}, and none "
                f"came in {quiet:.0f} s; the same command again, with any number of ranks, draws them"
            )
        if ranks != told:
            log.warning(
                "waiting for rank %s of %d: %d of %d parts of %s to come",
                _few(ranks), world, len(still), len(parts), place.path,
            )  # fmt: skip
        left, told = still, ranks
        time.sleep(LOOK_EVERY)
        quiet += LOOK_EVERY


def _few(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (", ..." if numbers[8:] else "")


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of ranks.

    Those of torch.distributed if it is initialised, else of the launcher's environment: torchrun, mpirun of Open
    MPI, or srun of SLURM, see `LAUNCHERS`; else 0 of 1.

    Raises:
        ValueError: the variables are not a valid pair.
    """
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    rank_name, world_name, _ = _launcher()
    rank, world = os.environ.get(rank_name, "0"), os.environ.get(world_name, "1")
    if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        raise ValueError(f"{rank_name} must be less than {world_name}, got {rank!r} and {world!r}")
    return int(rank), int(world)


def local_device(device: str) -> str:
    """For "cuda": this process's device, by its rank on the machine (see `LAUNCHERS`), or the only one that the
    launcher makes visible."""
    local = os.environ.get(_launcher()[2], "")
    alone = torch.cuda.device_count() == 1
    return f"cuda:{local}" if device == "cuda" and local.isdecimal() and not alone else device


def _launcher() -> tuple[str, str, str]:
    """Names of the variables of the launcher that started this process."""
    for names in LAUNCHERS[1:]:
        if (
            "RANK" not in os.environ
            and "WORLD_SIZE" not in os.environ
            and set(names[:2]) <= os.environ.keys()
        ):
            return names
    return LAUNCHERS[0]
