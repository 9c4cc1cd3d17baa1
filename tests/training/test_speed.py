"""The meter of a run, on a clock of the test's own."""

import time

import pytest
import torch

from var_ext.training.speed import Meter, peak_tflops


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H200", 989), ("NVIDIA H20", 148),
        ("NVIDIA A100-SXM4-80GB", 312), ("Tesla V100-SXM2-16GB", 125), ("NVIDIA L40S", 362), ("Quadro P400", 0),
    ],
)  # fmt: skip
def test_peaks_of_gpus(name: str, peak: float) -> None:
    assert peak_tflops(name) == peak


def test_the_meter_counts_steps_and_not_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    meter = Meter(torch.device("cpu"), 8, tokens=10, flops=5, peak=100.0)
    for _ in range(3):
        with meter.waiting():
            now += 1
        now += 3
    with meter.pause():
        now += 100
    found = meter.read()
    assert found.pop("peak_memory") > 0
    # 24 images in 12 seconds, of which 3 of waiting: 2 * 5 of 100 FLOP/s
    assert found == {"images_per_second": 2.0, "tokens_per_second": 20.0, "data_wait": 25.0, "mfu": 10.0}
    with meter.waiting():
        now += 4
    assert meter.read()["images_per_second"] == 2.0


def test_what_is_not_known_is_left_out() -> None:
    meter = Meter(torch.device("cpu"), 8, flops=5)
    with meter.waiting():
        pass
    assert meter.read().keys() == {"images_per_second", "data_wait", "peak_memory"}
