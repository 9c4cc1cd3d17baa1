"""How the ops reach the CUDA kernels: devices, streams, fakes, errors, graphs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

from tests.cuda.conftest import Gpu
from tests.emulator.emulation import emulator
from var_ext import _C, ScaleSchedule, backend, ops
from var_ext.ops import _native
from var_ext.ops._native import view

SCHEDULE = ScaleSchedule((1, 2))
built = pytest.mark.skipif(_C.build_info()["cuda"] is None, reason="this build has no CUDA")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the call would succeed")


@built
def test_the_build_names_its_kernels() -> None:
    methods = {name for name in vars(_C.CudaStream) if not name.startswith("_")}
    assert methods == {name for name in vars(emulator().CudaStream) if not name.startswith("_")}
    on_cuda = {op for op, devices in _C.kernels().items() if "cuda" in devices}
    assert on_cuda == {name for name in methods if name in backend.CATALOGUE}


def test_kernels_are_launched_on_the_current_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor: Any = SimpleNamespace(is_cuda=True, get_device=lambda: 3)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", {3: 1234}.get, raising=False)
    monkeypatch.setattr(_C, "CudaStream", lambda *given: given, raising=False)
    assert _native.kernels(tensor) == (3, 1234)
    assert _native.kernels(torch.zeros(1)) is _C


@built
def test_fakes_on_cuda() -> None:
    """Shapes, dtypes and devices without a GPU: what torch.compile and meta-programs see."""
    with FakeTensorMode():
        qkv = torch.empty(2, 5, 3, 4, 64, device="cuda", dtype=torch.bfloat16)
        bias, scale = qkv.new_empty(4, 64), qkv.new_empty(4)
        q, k, v = ops.qk_norm(qkv, bias, bias, scale)
        out, lse = torch.ops.var_ext.block_causal_attention(q, k, v, [1, 2], 1.0)
        cache = qkv.new_empty(2, 9, 4, 64)
        cached = ops.cached_attention(
            ops.qk_norm(qkv, bias, bias, cache=(cache, cache), offset=2), cache, cache, 7
        )
        for tensor in (q, k, v, out, cached):
            assert tensor.device.type == "cuda"
            assert tensor.dtype == torch.bfloat16
            assert tensor.shape == (2, 5, 4, 64)
        assert (lse.device.type, lse.dtype, lse.shape) == ("cuda", torch.float32, (2, 4, 5))


def test_mixed_devices_are_refused() -> None:
    with FakeTensorMode():
        here, there = torch.empty(1, 5, 2, 64), torch.empty(1, 5, 2, 64, device="cuda")
        with pytest.raises(ValueError, match="q on cuda:0, k on cpu, v on cuda:0"):
            ops.block_causal_attention(there, here, there, SCHEDULE)
        with pytest.raises(ValueError, match="must be on one device, got q on cpu, k_cache on cuda:0"):
            ops.cached_attention(here, there, there, 5)


@built
@without_gpu
def test_a_cuda_error_names_the_op() -> None:
    q = torch.zeros(1, 5, 2, 64)
    with pytest.raises(RuntimeError, match=r"^cached_attention: CUDA error: \w+"):
        _C.CudaStream(0, 0).cached_attention(view(q), view(q), view(q), view(q.clone()), 5, 1.0)


def test_an_unknown_device_is_an_error() -> None:
    q = torch.zeros(1, 5, 2, 64)
    with pytest.raises(RuntimeError, match=r"^cached_attention: CUDA error: invalid argument"):
        emulator().CudaStream(1, 0).cached_attention(view(q), view(q), view(q), view(q.clone()), 5, 1.0)


def call_all(qkv: torch.Tensor, bias: torch.Tensor, scale: torch.Tensor) -> list[torch.Tensor]:
    """Every CUDA op, forward and backward."""
    qkv = qkv.detach().requires_grad_()
    q, k, v = ops.qk_norm(qkv, bias, bias, scale)
    out = ops.block_causal_attention(q, k, v, SCHEDULE)
    (grad,) = torch.autograd.grad(out.float().square().sum(), qkv)
    cached = ops.cached_attention(q.detach(), k.detach(), v.detach(), 5)
    return [out.detach(), grad, cached]


def example(gpu: Gpu) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    given = torch.randn(2, 5, 3, 2, 64), torch.randn(2, 64), torch.randn(2)
    return tuple(gpu(t.bfloat16()) for t in given)  # type: ignore[return-value]


def test_all_ops_launch_kernels(gpu: Gpu) -> None:
    if gpu.level != "emulated":
        pytest.skip("the emulator counts launches")
    before = emulator().launches()
    call_all(*example(gpu))
    assert emulator().launches() - before >= 6


def test_in_a_cuda_graph(gpu: Gpu) -> None:
    """No allocation of the kernels' own, no wait, no stream but the current one: a capture would fail."""
    if gpu.level != "hardware":
        pytest.skip("only hardware captures graphs")
    given = example(gpu)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call_all(*given)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call_all(*given)
    with torch.no_grad():
        given[0].copy_(torch.randn_like(given[0]))
    graph.replay()
    for result, expected in zip(captured, call_all(*given), strict=True):
        assert torch.equal(result, expected)


def test_registration(gpu: Gpu) -> None:
    if gpu.level != "hardware":
        pytest.skip("on the CPU's tensors this is a test of the CPU kernels, in tests/ops")
    pytest.importorskip("expecttest", reason="torch.library.opcheck needs expecttest")
    qkv, bias, scale = example(gpu)
    q, k, v = (t.clone().requires_grad_() for t in qkv.unbind(2))
    torch.library.opcheck(torch.ops.var_ext.block_causal_attention, (q, k, v, [1, 2], 1.0))
    torch.library.opcheck(torch.ops.var_ext.cached_attention, (q.detach(), k.detach(), v.detach(), 5, 1.0))
    torch.library.opcheck(torch.ops.var_ext.qk_norm, (qkv.clone().requires_grad_(), bias, bias, scale))
