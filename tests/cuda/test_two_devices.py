"""Samplers on two GPUs of one process: streams, graphs and current devices must not get mixed up."""

from __future__ import annotations

import pytest
import torch

from tests.cuda.conftest import Gpu
from tests.models.conftest import small_pair
from var_ext.sampling import Sampler


@pytest.mark.parametrize("graph", [False, True])
def test_the_second_device_draws_what_the_first_draws(gpu: Gpu, graph: bool) -> None:
    """Whatever the current device is."""
    if gpu.level == "emulated":
        pytest.skip("the emulator is one device")
    if torch.cuda.device_count() < 2:
        pytest.skip(f"two GPUs are needed, and there is {torch.cuda.device_count()}")
    options = dict(cfg=2.0, top_k=12, top_p=0.9, batch_size=3)
    labels, seeds = [0, 3, 1], [5, -6, 2**40]
    expected = Sampler(*small_pair(), precision="fp32")(labels, seeds, **options)
    for device in ("cuda:0", "cuda:1", "cuda:0"):
        vae, var = small_pair()
        images = Sampler(vae.to(device), var.to(device), precision="fp32", graph=graph)(
            labels, seeds, **options
        )
        assert images.device == torch.device(device)
        torch.testing.assert_close(images.cpu(), expected, rtol=1e-4, atol=1e-4)
        assert torch.cuda.current_device() == 0
