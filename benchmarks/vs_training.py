"""A training step beside the published code: same weights, machine, process and dtype, in turns.

    python benchmarks/vs_training.py --official DIR           # DIR: a checkout of github.com/FoundationVision/VAR
    python benchmarks/vs_training.py --official DIR --tiny --laps 1 --depths 1 --json /tmp/tiny.json      # seconds

Forward, loss and backward of the transformer, without the optimizer; bf16 is `torch.autocast` for both. Loss and
gradients are compared first, and a competitor with wrong ones is not timed: in bf16 with those of the published code
in fp32. Nothing is dropped, so that both compute the same. A third competitor is var_ext with torch's products.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness.clock import Watch, in_turn
from harness.comparison import Comparison, chosen, numbers, parser_of
from harness.report import facts
from samplers import DTYPES, labels_of, our_model, published_model
from torch import Tensor, nn
from torch.nn import functional as F

from var_ext import backend
from var_ext.training.tally import token_losses

PRECISIONS = {"cpu": ("fp32", "bf16"), "cuda": ("fp32", "bf16", "fp16")}
# of the loss and of all gradients together, relative to the published code in fp32
WANTED = {"fp32": (1e-5, 1e-3), "bf16": (1e-2, 0.1), "fp16": (1e-2, 0.1)}


@contextmanager
def torchs_products() -> Iterator[None]:
    """Inside, layers of var_ext multiply with torch."""
    before = backend.multiplies
    backend.multiplies = lambda device_type, *, bf16: False
    try:
        yield
    finally:
        backend.multiplies = before


class Step:
    """Forward, loss and backward of a transformer; `call` marks them and leaves the gradients."""

    def __init__(self, who: str, var: nn.Module, precision: str) -> None:
        self.who, self.var, self.precision = who, var, precision

    def call(self, batch: tuple[Tensor, Tensor, Tensor], watch: Watch | None = None) -> Tensor:
        """The mean loss of labels (B,), inputs (B, L - 1, Cvae) and targets (B, L)."""
        labels, x, targets = batch
        mark: Any = watch or (lambda part: None)
        self.var.zero_grad(set_to_none=True)
        dtype = DTYPES.get(self.precision)
        with torch.autocast(x.device.type, dtype, enabled=dtype is not None):
            logits = self.var(labels, x)
        mark("forward")
        if self.who == "published":
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        else:
            loss = token_losses(logits, targets, 0.0).mean()
        mark("loss")
        loss.backward()
        mark("backward")
        return loss.detach()


class WithTorchsProducts(Step):
    def call(self, batch: tuple[Tensor, Tensor, Tensor], watch: Watch | None = None) -> Tensor:
        with torchs_products():
            return super().call(batch, watch)


def batch_of(var: nn.Module, size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(size, var.L - var.first_l, var.Cvae)
    targets = torch.randint(var.V, (size, var.L))
    return labels_of(size, device), x.to(device), targets.to(device)


def gradients(var: nn.Module) -> Tensor:
    """All in one vector, in the order of the names."""
    named = sorted((name, p) for name, p in var.named_parameters())
    return torch.cat(
        [torch.zeros(p.numel()) if p.grad is None else p.grad.float().cpu().flatten() for _, p in named]
    )


def wrong(steps: list[Step], published: Step, batch: tuple[Tensor, Tensor, Tensor]) -> list[str]:
    """The reason not to time var_ext."""
    right_loss, failures = published.call(batch), []
    right = gradients(published.var)
    for step in steps:
        loss = step.call(batch)
        error = float((loss - right_loss).abs() / right_loss)
        off = float((gradients(step.var) - right).norm() / right.norm())
        wanted, wanted_off = WANTED[step.precision]
        print(f"{step.who} {step.precision}: loss off by {error:.1e}, gradients by {off:.1e}")
        if step.who != "published" and not (error <= wanted and off <= wanted_off):
            failures.append(f"{step.who} {step.precision}: wanted {wanted:.0e} and {wanted_off:.0e}")
    return failures


def main() -> None:
    parser = parser_of(__doc__, laps=5, batch_sizes=[4], memory=False)
    parser.add_argument("--official", type=Path, required=True, help="folder of the published code")
    parser.add_argument("--depths", type=numbers, default=[8, 16])
    options = chosen(parser, PRECISIONS)
    device = options.device
    model = dict(depth=options.depths[-1], tiny=options.tiny)
    comparison = Comparison("training", __file__, options, about=facts(device), model=model)
    for depth in options.depths:
        official = published_model(options.official, depth, device, options.tiny)
        ours = our_model(depth, device, options.tiny)
        ours.load_state_dict(official.state_dict())
        official.cond_drop_rate = 0.0  # in evaluation too it would drop labels
        steps = [
            kind(who, var, precision)
            for precision in options.precisions
            for who, kind, var in (
                ("published", Step, official),
                ("var_ext", Step, ours),
                ("var_ext, torch's products", WithTorchsProducts, ours),
            )
        ]
        for size in options.batch_sizes:
            batch = batch_of(ours, size, device)
            if failures := wrong(steps, Step("published", official, "fp32"), batch):
                raise SystemExit("not timed, for var_ext is wrong:\n" + "\n".join(failures))
            calls = {(step.who, step.precision): partial(step.call, batch) for step in steps}
            for (who, precision), result in in_turn(calls, options.laps, comparison.clock).items():
                comparison.add(result, who=who, precision=precision, batch=size, depth=depth)
        del official, ours, steps, calls
        gc.collect()
    comparison.save(finished=True)


if __name__ == "__main__":
    main()
