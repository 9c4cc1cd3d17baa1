"""Options of a sampling, precisions by name, and the memory budget."""

from __future__ import annotations

import pytest
import torch

from tests.models.conftest import small_pair
from var_ext import Sampler, ScaleSchedule
from var_ext.engine import default_precision, named_precision, options_for, precision_in_force
from var_ext.engine.draw import gumbel_noise
from var_ext.engine.memory import batch_for, bytes_per_image

SCHEDULE = ScaleSchedule((1, 2, 3, 4))
CPU = torch.device("cpu")


def test_one_value_is_the_published_ramp_and_a_list_is_taken_as_it_is():
    options = options_for(SCHEDULE, cfg=3, top_k=5, top_p=0.5)
    assert options.cfg == (0.0, 1.0, 2.0, 3.0) and options.guided_scales == 4
    assert options.top_k == (5,) * 4 and options.top_p == (0.5,) * 4 and options.temperature == (1.0,) * 4
    assert options_for(SCHEDULE, cfg=[4, 0, 1, 0]).cfg == (4, 0, 1, 0)
    assert options_for(SCHEDULE, cfg=3, cfg_until=2).guided_scales == 2
    assert options_for(SCHEDULE, cfg=0).guided_scales == 0


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"cfg": [1, 2]}, ValueError, "cfg must be one value or one for each of the 4 scales, got 2"),
        ({"top_k": 1.5}, ValueError, "top_k must be whole numbers of 0 or more, got 1.5"),
        ({"top_p": [0, 0, 0, 2]}, ValueError, r"top_p must be in \[0, 1\], got \[0, 0, 0, 2\]"),
        ({"temperature": 0}, ValueError, "temperature must be above 0, got 0; top_k = 1 takes"),
        ({"temperature": float("nan")}, ValueError, "temperature must be above 0, got nan"),
        ({"cfg": float("inf")}, ValueError, "cfg must be finite, got inf"),
        ({"cfg_until": 5}, ValueError, r"cfg_until must be in 0..4, the number of scales, got 5"),
        ({"cfg": "much"}, TypeError, "cfg must be a number or a list of numbers, got 'much'"),
    ],
)
def test_wrong_options_are_named(given, error, message):
    with pytest.raises(error, match=message):
        options_for(SCHEDULE, **given)


def test_precisions_have_names_and_devices():
    assert named_precision(torch.float32, CPU).name == "fp32" and named_precision("int8", CPU).int8
    assert not named_precision("fp32", CPU).mixes_hidden and named_precision("bf16", CPU).mixes_hidden
    assert default_precision(CPU) in ("fp32", "bf16")
    for name in ("fp64", torch.float64):
        with pytest.raises(
            ValueError, match=r"precision must be one of fp32, bf16, fp16, int8, got '(fp64|float64)'"
        ):
            named_precision(name, CPU)
    with pytest.raises(ValueError, match=r"int8 is for linear layers on the CPU .* got device cuda"):
        named_precision("int8", torch.device("cuda"))
    if not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        with pytest.raises(ValueError, match="fp16 needs a GPU or a CPU with its arithmetic"):
            Sampler(*small_pair(), precision="fp16")


def test_the_precision_in_force_is_that_of_autocast_or_the_weights():
    weight = torch.zeros(1)
    assert precision_in_force(weight).name == "fp32"
    assert precision_in_force(weight.double()).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert precision_in_force(weight).name == "bf16"


def test_the_batch_follows_from_the_budget():
    sampler = Sampler(*small_pair(), precision="fp32", memory=0)
    each = bytes_per_image(sampler.var, sampler.precision)
    assert batch_for(sampler.var, sampler.precision, CPU, 3 * each) == 3
    assert batch_for(sampler.var, sampler.precision, CPU, 10**12) == 64
    assert 1 <= batch_for(sampler.var, sampler.precision, CPU, None) <= 64
    with pytest.raises(
        ValueError, match=r"the memory budget must be at least .* MiB, what one image takes, got 0\.0 MiB"
    ):
        sampler([1], [2])
    sampler.memory = 2 * each
    starts = [start for start, _ in sampler.stream([1] * 5, range(5))]
    assert starts == [0, 2, 4]


def test_memory_that_is_missing_names_the_remedy(monkeypatch):
    sampler = Sampler(*small_pair(), precision="fp32")

    def full(*_, **__):
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: not enough memory: you tried"
        )

    monkeypatch.setattr(sampler.engine, "sample", full)
    with pytest.raises(
        torch.OutOfMemoryError, match=r"drawing 2 images at once ran out .* give a smaller batch_size"
    ):
        sampler([1, 2], [3, 4])


def test_gumbel_noise_has_its_distribution_and_a_stream_an_image():
    noise = gumbel_noise(torch.tensor([3, 4, 2**62, -1]), 2, 50, 203)
    assert noise.shape == (4, 50, 203) and noise.isfinite().all()
    # mean 0.5772 and deviation pi / sqrt 6; 40600 numbers: 4 standard errors are 0.026
    assert abs(noise.double().mean() - 0.5772) < 0.026 and abs(noise.double().std() - 1.2825) < 0.03
    assert torch.equal(gumbel_noise(torch.tensor([4]), 2, 50, 203), noise[1:2])
    assert torch.equal(gumbel_noise(torch.tensor([4]), 2, 7, 203), noise[1:2, :7])
    assert not torch.equal(gumbel_noise(torch.tensor([4]), 3, 50, 203), noise[1:2])
    assert len(noise.flatten().unique()) > 0.99 * noise.numel()
