"""Whether a discriminator has won: its gradient teaches the decoder nothing any more, and its own grows stale."""

from __future__ import annotations

import logging
from typing import Any

log = logging.getLogger(__name__)

PATIENCE, AT_LEAST = 0.01, 3  # share of the steps that its loss has to stay low, and steps
RISEN = 4.0  # times the threshold: it is trained again


class Watch:
    """Holds a discriminator back from when its loss has stayed below `least` until it is above 4 x `least`.

    Attributes:
        held: whether its steps are left out.
    """

    def __init__(self, least: float) -> None:
        self.least, self.low, self.held = least, 0, False

    def update(self, loss: float, step: int, total: int, *, tell: bool) -> None:
        """Take in the hinge loss of a step of all ranks; `tell`: log what changes."""
        patience = max(AT_LEAST, round(PATIENCE * total))
        if self.held:
            if loss > RISEN * self.least:
                self.low, self.held = 0, False
                if tell:
                    log.info(
                        "step %d: the discriminator's loss is %.3g again, it is trained again", step, loss
                    )
            return
        self.low = self.low + 1 if loss < self.least else 0
        if self.low >= patience:
            self.held = True
            if tell:
                log.warning(
                    "step %d: the discriminator has won, its loss was below %g for %d steps; it waits until it rises "
                    "above %g. If this comes again: a lower --critic-lr, --critic-augment 1, --bcr 4, --lecam 0.001",
                    step, self.least, patience, RISEN * self.least,
                )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        return {"low": self.low, "held": self.held}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.low, self.held = state["low"], state["held"]
