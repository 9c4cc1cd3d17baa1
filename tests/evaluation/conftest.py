"""Real digits at 8 px (the size of the scans, where everything is fast) and samplers of known quality."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from var_ext.evaluation import DigitsJudge
from var_ext.evaluation.judge import Labelled


@pytest.fixture(scope="session")
def judge() -> DigitsJudge:
    return DigitsJudge(8)


class PerfectTokenizer(torch.nn.Module):
    """Reconstructs every image exactly."""

    def img_to_reconstructed_img(self, images: Tensor, last_one: bool = True) -> Tensor:
        return images


class ReplaySampler:
    """Stands in for a sampler: draws from given images of the asked class, plus noise of strength `noise`.

    Like a real one it is a pure function of (label, seed).
    """

    num_classes, image_size = 10, 8
    device = torch.device("cpu")

    def __init__(self, source: Labelled, noise: float = 0.0) -> None:
        self.source, self.noise = source, noise
        self.vae = PerfectTokenizer()
        self.defaults = {"cfg": 1.5, "top_k": 900, "top_p": 0.96}
        self.asked: list[dict[str, float]] = []

    def __call__(self, labels: Sequence[int], seeds: Sequence[int], **settings: float) -> Tensor:
        self.asked.append(settings)
        return torch.stack([self.one(*pair) for pair in zip(labels, seeds, strict=True)])

    def one(self, label: int, seed: int) -> Tensor:
        stream = torch.Generator().manual_seed(seed)
        choices = (self.source.labels == label).nonzero().flatten()
        image = self.source.images[choices[torch.randint(len(choices), (), generator=stream)]]
        return (image + self.noise * torch.randn(image.shape, generator=stream)).expand(3, -1, -1)
