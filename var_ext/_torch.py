"""The one door to names that torch keeps private and may drop in any release: no other file of this package uses any.

Each says what happens where torch no longer has it: another way with the same answers, a refusal of what needs it, or,
where nothing would be right without it, an ImportError.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


def _needed(owner: Any, *names: str) -> None:
    for name in names:
        if not hasattr(owner, name):
            kind = owner if isinstance(owner, type) else type(owner)
            raise ImportError(
                f"var_ext needs {kind.__name__}.{name} of torch, which torch {torch.__version__} does not have: take "
                "the version that var_ext is tested with, which constraints.txt names"
            )


# Of modules and tensors: without these names the import fails.
#
# The public iterators leave out what is None or there twice, and give copies, in which no change would be seen.
_needed(nn.Module(), "_parameters", "_buffers", "_modules")
# There is no public way to ask for hooks, and one that is not seen would be ignored.
_needed(nn.Module(), "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_needed(nn.Module(), "_compiled_call_impl")
_needed(Tensor, "_version")


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The dict itself in which a module keeps its own parameters by name, None included."""
    return module._parameters


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """The dict itself in which a module keeps its own buffers."""
    return module._buffers


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """The dict itself in which a module keeps the modules right inside it."""
    return module._modules


def put_inside(module: nn.Module, parameters: Mapping[str, Any], children: Mapping[str, Any]) -> None:
    """Gives a copy of a module dicts of its own, with anything in them: `nn.Module` itself takes modules alone."""
    module.__dict__.update(_parameters=parameters, _modules=children)


def hooks_of(module: nn.Module) -> tuple[dict[int, Any], ...]:
    """The dicts themselves of all hooks that a call of a module runs."""
    return (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether a call of a module runs more than its forward, gradients apart."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def forget_compilation(twin: nn.Module) -> None:
    """Drops from a copy of a module what `module.compile()` made: it would run the original."""
    twin.__dict__.pop("_compiled_call_impl", None)


version_of: Callable[[Tensor], int] = attrgetter("_version")
"""How often a tensor was written in place."""


def uncompiled(model: nn.Module) -> nn.Module:
    """The module inside the wrapper of `torch.compile`; without the name the wrapper, which `accelerate` refuses."""
    return getattr(model, "_orig_mod", model)


# Of calls of ops.

below_autograd: Any = getattr(torch._C, "_AutoDispatchBelowAutograd", None)
"""Context in which an op runs without its gradient. None: `torch.library.register_autograd`, whose calls are slower."""


def _requires_grad(*inputs: Any) -> bool:
    return any(isinstance(value, Tensor) and value.requires_grad for value in inputs)


any_requires_grad: Callable[..., bool] = getattr(torch._C, "_any_requires_grad", None) or _requires_grad
"""Whether one of the inputs of an op does; without the name asked in Python."""


def forward_mode() -> bool:
    """Whether forward-mode gradients may be asked for; without the name always: each call makes an autograd node."""
    return getattr(forward_ad, "_current_level", 0) >= 0


def under_transforms() -> bool:
    """Whether `torch.func` transforms the call; without the name always: dropout is torch's own, which is slower."""
    active = getattr(torch._C, "_are_functorch_transforms_active", None)
    return active is None or active()


def raw_stream(device: int) -> int:
    """The current CUDA stream of a device, as a number; without the name from `torch.cuda.current_stream`, slower."""
    current = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    return torch.cuda.current_stream(device).cuda_stream if current is None else current(device)


# Of layers.

addmm_gelu: Any = getattr(torch, "_addmm_activation", None)
"""Product, bias and GELU in one kernel of a GPU. None: the product, then `bias_gelu`, a kernel more a layer."""

# oneDNN's products with weights laid out once. Without one of the names layers are not packed: slower, and the last
# bits of float32 depend on how many rows there are.
reorder_linear_weight: Any = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
linear_pointwise: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
reorder_convolution_weight: Any = getattr(torch.ops.mkldnn, "_reorder_convolution_weight", None)
convolution_pointwise: Any = getattr(torch.ops.mkldnn, "_convolution_pointwise", None)
reorder_transposed_weight: Any = getattr(torch.ops.mkldnn, "_reorder_convolution_transpose_weight", None)
transposed_pointwise: Any = getattr(torch.ops.mkldnn, "_convolution_transpose_pointwise", None)

# Its products of 8-bit integers. Without one of the names precision int8 is refused.
qlinear_prepack: Any = getattr(torch.ops.onednn, "qlinear_prepack", None)
qlinear_pointwise: Any = getattr(torch.ops.onednn, "qlinear_pointwise", None)

_fp16_on_cpu: Any = getattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", None)


def packs_layers() -> bool:
    """Whether torch has the products with weights laid out for oneDNN."""
    linear = reorder_linear_weight, linear_pointwise
    convolution = reorder_convolution_weight, convolution_pointwise
    return None not in (*linear, *convolution, reorder_transposed_weight, transposed_pointwise)


def multiplies_int8() -> bool:
    """Whether torch has oneDNN's products of 8-bit integers."""
    return qlinear_prepack is not None and qlinear_pointwise is not None


def multiplies_fp16() -> bool:
    """Whether oneDNN has fp16 arithmetic on this CPU; without the name taken for no, so fp16 is refused there."""
    return _fp16_on_cpu is not None and _fp16_on_cpu()


def fake_tensors(*, beside_real: bool = False) -> Any:
    """Context in which tensors have shapes and devices but no memory; without the name a dry run is refused.

    `beside_real`: ops take tensors from outside too.
    """
    try:
        from torch._subclasses.fake_tensor import FakeTensorMode
    except ImportError as error:
        raise ValueError(
            f"a dry run needs FakeTensorMode, which torch {torch.__version__} does not have"
        ) from error
    return FakeTensorMode(allow_non_fake_inputs=beside_real)


def dispatch_mode() -> Any:
    """Class of contexts that see every op; without the name a dry run is refused."""
    try:
        from torch.utils._python_dispatch import TorchDispatchMode
    except ImportError as error:
        raise ValueError(
            f"a dry run needs TorchDispatchMode, which torch {torch.__version__} does not have"
        ) from error
    return TorchDispatchMode
