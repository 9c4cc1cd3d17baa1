"""Progressive training as published: scales join one by one, and the learning rate follows another line.

The published trainer counts steps of a stage as it goes; here all is a function of the step, so a resumed run needs
no counter. For 512 px, where it saves time (published recipe; it has no section in the paper).
"""

from __future__ import annotations

NEW_SCALE_WARMUP = 1 / 300  # share of the steps over which a new scale's loss weight rises to 1
NEW_SCALE_START = 0.01


def stage(
    step: int, total: int, *, scales: int, share: float, first: int, warmup: float
) -> tuple[int, float]:
    """The last scale that is trained at `step`, and the weight of its loss.

    Args:
        step: of `total`, from 0.
        scales: how many the schedule has.
        share: of all steps, after which every scale is trained; 0: all from the beginning.
        first: index of the last scale trained at first; until `warmup`, a share of the steps, no other joins.

    Returns:
        Index of the last scale, from 0; its weight, in (0, 1]. The first stage and the last one have weight 1.
    """
    last = scales - 1
    if share <= 0 or first >= last:
        return last, 1.0

    def last_at(step: int) -> int:
        begin, end = warmup * total, share * total
        if step <= begin:
            return first
        return last if step >= end else first + round((step - begin) / (end - begin) * (last - first))

    now = last_at(step)
    if now in (first, last):
        return now, 1.0
    before, joined = 0, step  # stages do not go back, so the step at which this one began is found by halving
    while joined - before > 1:
        middle = (before + joined) // 2
        before, joined = (before, middle) if last_at(middle) == now else (middle, joined)
    done = (step - joined + 1) / (NEW_SCALE_WARMUP * total)
    return now, max(min(done, 1.0), NEW_SCALE_START)


def check_first(first: int, scales: int) -> None:
    """ValueError if no scale would be left to join."""
    if first >= scales - 1:
        raise ValueError(
            f"pg0 must be below {scales - 1}, the index of the last of {scales} scales, for any to join; got {first}"
        )


def factor(passed: float, *, share: float, end: float) -> float:
    """Factor on the learning rate after warm-up: slowly down while scales join, then linearly to `end`.

    Args:
        passed: share of the steps after warm-up that are done, in [0, 1].
        share: as in `stage`.
        end: the factor at the last step.
    """
    middle = (1 + end + (1 - end) * (1 - share)) / 2
    if passed < share or share >= 1:
        return 1 + (middle - 1) * passed / share
    return end + (middle - end) * (1 - passed) / (1 - share)
