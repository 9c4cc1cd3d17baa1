"""A second condition beside the class, in one place: how much ink a digit has. Trains for a minute on two CPU cores.

python python/examples/second_condition.py        # writes inked.png
"""

import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import var_ext
from var_ext.data import load_dataset
from var_ext.grid import labelled_grid
from var_ext.models import VAR


class InkedVAR(VAR):  # its forward and its sampling take ink, (B,) float32
    def __init__(self, *given, **options) -> None:
        super().__init__(*given, **options)
        self.ink = nn.Linear(1, self.C)

    def condition(self, labels: Tensor, ink: Tensor) -> Tensor:
        known = (
            labels != self.num_classes
        )  # "no class", the unconditional half of guidance, knows no ink either
        return super().condition(labels) + known[:, None] * self.ink(ink[:, None])


def ink_of(images: Tensor) -> Tensor:
    """(B, 3, S, S) in [-1, 1] -> mean brightness, (B,), in standard deviations of the digits'."""
    return (images.mean(dim=(1, 2, 3)) + 0.376) / 0.067


def main(seconds: float = 60) -> tuple[VAR, Tensor]:
    torch.manual_seed(0)
    digits = var_ext.load("digits")
    vae, var = digits.vae, InkedVAR(digits.vae, **digits.var.config).train()
    var.load_state_dict(digits.var.state_dict(), strict=False)  # all but the new layer
    data = load_dataset("digits", "train", 32, augment=1)
    optimizer = torch.optim.AdamW(var.parameters(), 2e-4)
    step, end = 0, time.monotonic() + seconds
    while step == 0 or time.monotonic() < end:
        images, labels = data.with_epoch(step).batch(torch.randint(len(data), (32,)))
        tokens = vae.img_to_idxBl(images)  # of each scale
        logits = var(labels, vae.quantize.idxBl_to_var_input(tokens), ink=ink_of(images))  # (B, L, V)
        F.cross_entropy(logits.flatten(0, 1), torch.cat(tokens, dim=1).flatten()).backward()
        optimizer.step(), optimizer.zero_grad()
        step += 1
    labels, ink = torch.arange(10).repeat(3), torch.tensor([-1.5, 0, 1.5]).repeat_interleave(10)
    drawn = var_ext.Sampler(vae, var)(labels, seeds=7, cfg=1.5, conditions={"ink": ink})  # (30, 3, S, S)
    labelled_grid(drawn, ["little", "usual", "much"], digits.class_names).save("inked.png")
    print(step, "steps; ink drawn for -1.5, 0, 1.5:", *ink_of(2 * drawn - 1).view(3, 10).mean(dim=1).tolist())
    return var, drawn


if __name__ == "__main__":
    main()
