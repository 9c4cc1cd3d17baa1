"""How the ops reach the CUDA kernels: devices, streams, fakes, errors, graphs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

from tests.cuda.conftest import Gpu
from tests.emulator import emulation
from tests.emulator.emulation import emulator
from tests.test_layout import LEFT_TO_TORCH
from var_ext import _C, ScaleSchedule, ops
from var_ext.ops import _native
from var_ext.ops._native import maybe_view

SCHEDULE = ScaleSchedule((1, 2))
built = pytest.mark.skipif(_C.build_info()["cuda"] is None, reason="this build has no CUDA")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the call would succeed")


@built
def test_the_build_names_its_kernels() -> None:
    methods = {name for name in vars(_C.CudaStream) if not name.startswith("_")}
    assert methods == {name for name in vars(emulator().CudaStream) if not name.startswith("_")}
    on_cuda = {op for op, devices in _C.kernels().items() if "cuda" in devices}
    assert on_cuda == {name for name in methods if name in ops.__all__}


def test_kernels_are_launched_on_the_current_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor: Any = SimpleNamespace(is_cuda=True, get_device=lambda: 3)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", {3: 1234}.get, raising=False)
    monkeypatch.setattr(_C, "CudaStream", lambda *given: given, raising=False)
    assert _native.kernels(tensor) == (3, 1234)
    assert _native.kernels(torch.zeros(1)) is _C


@built
def test_fakes_on_cuda() -> None:
    """Shapes, dtypes and devices without a GPU: what torch.compile and meta-programs see."""
    real = call_all(example(Gpu("emulated")), backward=False)  # on the CPU's kernels
    with FakeTensorMode():
        given = {
            name: torch.empty(t.shape, dtype=t.dtype, device="cuda")
            for name, t in example(Gpu("emulated")).items()
        }
        for fake, one in zip(call_all(given, backward=False), real, strict=True):
            assert fake.device.type == "cuda"
            assert (fake.shape, fake.dtype, fake.stride()) == (one.shape, one.dtype, one.stride())
        qkv, bias = given["qkv"], given["bias"]
        cache = qkv.new_empty(2, 9, 2, 64)
        out = ops.cached_attention(qkv, bias, bias, None, cache, cache, 2)
        assert (out.shape, out.device.type) == ((2, 5, 2, 64), "cuda")


def test_mixed_devices_are_refused() -> None:
    with FakeTensorMode():
        here, there = torch.empty(1, 5, 2, 64), torch.empty(1, 5, 2, 64, device="cuda")
        with pytest.raises(ValueError, match="q on cuda:0, k on cpu, v on cuda:0"):
            ops.block_causal_attention(there, here, there, SCHEDULE)
        qkv, bias = torch.empty(1, 5, 3, 2, 64), torch.empty(2, 64)
        with pytest.raises(ValueError, match=r"must be on one device, got qkv on cpu.*, k_cache on cuda:0"):
            ops.cached_attention(qkv, bias, bias, None, there, there, 0)


def attend(stream: Any) -> None:
    qkv, bias, k_cache = torch.zeros(1, 5, 3, 2, 64), torch.zeros(2, 64), torch.zeros(1, 5, 2, 64)
    v_cache, out = k_cache.clone(), k_cache.clone()
    given = qkv, bias, bias, None, k_cache, v_cache, out
    stream.cached_attention(*map(maybe_view, given), 0, 1.0)


@built
@without_gpu
def test_a_cuda_error_names_the_op() -> None:
    with pytest.raises(RuntimeError, match=r"^cached_attention: CUDA error: \w+"):
        attend(_C.CudaStream(0, 0))


def test_an_unknown_device_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"^cached_attention: CUDA error: invalid argument"):
        attend(emulator().CudaStream(1, 0))


def call_all(given: dict[str, torch.Tensor], backward: bool = True) -> list[torch.Tensor]:
    """Every op, forward and where there is one backward."""
    leaves = {name: t.detach().requires_grad_(backward) for name, t in given.items() if t.is_floating_point()}
    qkv, bias, x, image, codebook = (leaves[name] for name in ("qkv", "bias", "x", "image", "codebook"))
    q, k, v = ops.qk_norm(qkv, bias, bias, leaves["log_scale"])
    rows, _ = ops.adaln(x, x.select(1, 0), x.select(1, 1), branch=x, gate=x.select(1, 2))
    tokens, f_hat, scales = ops.residual_quantize(
        image,
        codebook,
        leaves["phi"].unsqueeze(0),
        leaves["phi_bias"].unsqueeze(0),
        (0, 0),
        SCHEDULE,
        per_scale=True,
    )
    assert scales is not None
    new, pooled = ops.residual_step(
        image, image.narrow(2, 0, 1).narrow(3, 0, 1), leaves["phi"], leaves["phi_bias"], next_size=1
    )
    outputs = [
        ops.block_causal_attention(q, k, v, SCHEDULE),
        rows,
        ops.bias_gelu(x, leaves["channels"]),
        ops.group_norm_silu(image, leaves["phi_bias"], leaves["phi_bias"], groups=2),
        ops.group_norm_silu(
            image, leaves["phi_bias"], leaves["phi_bias"], groups=2, input_bias=leaves["phi_bias"]
        ),
        ops.area_downsample(image, 1),
        ops.bicubic_upsample(image, 3),
        ops.keyed_dropout(image, given["seeds"], given["seeds"], 2**15),
        f_hat,
        scales,
        new,
        pooled,
    ]
    grads: tuple[torch.Tensor, ...] = ()
    if backward:
        loss = torch.stack([t.float().square().sum() for t in outputs]).sum()
        grads = torch.autograd.grad(loss, list(leaves.values()))
    drawn = [
        tokens,
        ops.bias_residual(image, image, leaves["phi_bias"]),
        ops.bias_residual(image.clone(), image, leaves["phi_bias"], in_place=True),
        ops.cached_attention(
            # narrow: indexing asks for a device, which a CPU's build of torch has not got
            qkv.narrow(1, 2, 3),
            bias,
            bias,
            leaves["log_scale"],
            k.detach().clone(),
            v.detach().clone(),
            2,
        ),
        ops.nearest_code(image.detach().permute(0, 2, 3, 1), codebook.detach()),
        *ops.quantize_rows(x.detach()),
        ops.sample_tokens(x.detach(), given["seeds"], scale_index=1, top_k=5, top_p=0.5),
    ]
    return [t.detach() for t in (*outputs, *grads, *drawn)]


def example(gpu: Gpu) -> dict[str, torch.Tensor]:
    made = dict(qkv=(2, 5, 3, 2, 64), bias=(2, 64), log_scale=(2,), x=(2, 5, 16), channels=(16,))
    given = {name: gpu(torch.randn(shape).bfloat16()) for name, shape in made.items()}
    full = dict(image=(2, 8, 2, 2), codebook=(12, 8), phi=(8, 8, 3, 3), phi_bias=(8,))  # the quantizer's
    given |= {name: gpu(torch.randn(shape)) for name, shape in full.items()}
    return {**given, "seeds": gpu(torch.arange(2))}


def test_all_ops_launch_kernels(gpu: Gpu) -> None:
    if gpu.level != "emulated":
        pytest.skip("the emulator counts launches")
    emulation.Stream.called.clear()
    call_all(example(gpu))
    methods = {name for name in vars(emulator().CudaStream) if not name.startswith("_")}
    assert emulation.Stream.called == methods
    assert set(ops.__all__) - LEFT_TO_TORCH["cuda"] <= methods


def test_in_a_cuda_graph(gpu: Gpu) -> None:
    """No allocation of the kernels' own, no wait, no stream but the current one: a capture would fail."""
    if gpu.level != "hardware":
        pytest.skip("only hardware captures graphs")
    given = example(gpu)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call_all(given)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call_all(given)
    for name in ("qkv", "x", "image"):
        given[name].copy_(torch.randn_like(given[name]))
    graph.replay()
    for result, expected in zip(captured, call_all(given), strict=True):
        assert torch.equal(result, expected)


def test_registration(gpu: Gpu) -> None:
    if gpu.level != "hardware":
        pytest.skip("on the CPU's tensors this is a test of the CPU kernels, in tests/ops")
    pytest.importorskip("expecttest", reason="torch.library.opcheck needs expecttest")
    qkv, bias, scale = (example(gpu)[name] for name in ("qkv", "bias", "log_scale"))
    q, k, v = (t.clone().requires_grad_() for t in qkv.unbind(2))
    caches = k.detach().clone(), v.detach().clone()
    torch.library.opcheck(torch.ops.var_ext.block_causal_attention, (q, k, v, [1, 2], 1.0))
    torch.library.opcheck(
        torch.ops.var_ext.cached_attention, (qkv[:, 2:], bias, bias, scale, *caches, 2, 1.0)
    )
    torch.library.opcheck(torch.ops.var_ext.qk_norm, (qkv.clone().requires_grad_(), bias, bias, scale))
