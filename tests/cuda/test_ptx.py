"""A few kernels without one of torch's own: they run where the driver must compile the PTX of all (CUDA_FORCE_PTX_JIT).

torch's own kernels come without PTX for older chips, so no call here may need one: a mode sees what torch is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.cuda.conftest import Gpu
from var_ext import backend, ops

# They allocate, look at memory in another way, or copy it as it is.
WITHOUT_KERNELS = {"empty", "empty_like", "new_empty", "detach", "view", "select", "set_", "slice", "alias"}


class Asked(TorchDispatchMode):
    """The names of all that torch is asked to do, but for the ops of var_ext."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace != "var_ext":
            self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(torch.bfloat16)


def norm_and_attention(qkv: Tensor, q_bias: Tensor, v_bias: Tensor, log_scale: Tensor) -> Tensor:
    _, k, v = ops.qk_norm(qkv, q_bias, v_bias, log_scale)
    return ops.cached_attention(qkv[:, 1:], q_bias, v_bias, log_scale, k, v, 1)


CALLS: dict[str, tuple[Callable[..., Any], list[Tensor]]] = {
    "adaln": (
        lambda x, scale, shift, branch, gate: ops.adaln(x, scale, shift, branch=branch, gate=gate)[1],
        [random(2, 9, 256), random(2, 256), random(2, 256), random(2, 9, 256), random(2, 256)],
    ),
    "bias_gelu": (ops.bias_gelu, [random(10, 512), random(512)]),
    "quantize_rows": (lambda x: ops.quantize_rows(x)[1], [random(6, 256)]),
    "qk_norm, cached_attention": (
        norm_and_attention,
        [random(2, 70, 3, 2, 64), random(2, 64), random(2, 64), random(2)],
    ),
}


@pytest.mark.parametrize("name", list(CALLS))
def test_a_kernel_alone(gpu: Gpu, name: str) -> None:
    call, given = CALLS[name]
    placed = [gpu(tensor) for tensor in given]
    with torch.inference_mode(), Asked() as asked:
        result = call(*placed)
    assert asked.names <= WITHOUT_KERNELS
    with backend.force("reference"):
        expected = call(*given)
    torch.testing.assert_close(result.cpu(), expected, rtol=2e-2, atol=2e-2)
