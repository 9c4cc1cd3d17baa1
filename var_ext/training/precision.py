"""Arithmetic of a training: autocast, the scale of the loss in fp16, TF32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The forward pass in a precision of `DTYPES`."""
    dtype = DTYPES[precision]
    return torch.autocast(device.type, None if precision == "fp32" else dtype, enabled=precision != "fp32")


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Inside the block float32 matmuls and convolutions of GPUs may round their inputs to TF32, or may not."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


class LossScale:
    """Scale of the loss in fp16, whose gradients would underflow: the policy of the published trainer.

    It starts at 2^11, doubles after 1000 steps in a row with finite gradients up to 2^15, and halves when one is not,
    whose step is skipped. What decides is the norm of the gradient over all parameters and ranks, so that they agree.
    (`torch.amp.GradScaler` decides by what a rank sees, which is a part where weights are shared out.)
    """

    START, GROW_AFTER, MOST = 2.0**11, 1000, 2.0**15

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.scale, self.finite = self.START if enabled else 1.0, 0

    @torch.no_grad()
    def unscale(self, module: nn.Module) -> None:
        """Divide the gradients of the scaled loss."""
        if self.enabled:
            for p in module.parameters():
                if p.grad is not None:
                    p.grad.mul_(1 / self.scale)

    def accepts(self, norm: Tensor) -> bool:
        """Whether to step with gradients of this norm; adapts the scale."""
        if not self.enabled:
            return True
        if not torch.isfinite(norm):
            self.scale, self.finite = self.scale / 2, 0
            return False
        self.finite += 1
        if self.finite == self.GROW_AFTER:
            self.scale, self.finite = min(2 * self.scale, self.MOST), 0
        return True

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.scale, "finite": self.finite}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scale, self.finite = state["scale"], state["finite"]
