"""What of a training the ranks share out: gradients alone, the optimizer too, or the weights as well.

    none        every rank has everything; gradients are averaged (DistributedDataParallel)
    optimizer   each rank keeps the state of the optimizer and the moving average of a share of the parameters (ZeRO-1)
    full        each rank keeps a share of every parameter, its gradient, state and average (FSDP2)

Between the three, checkpoints can be exchanged: state is named by parameter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from var_ext.training.ranks import Ranks

SHARDS = ("none", "optimizer", "full")


def distribute(
    module: nn.Module,
    ranks: Ranks,
    shard: str,
    device: torch.device,
    *,
    units: Iterable[nn.Module] = (),
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """`module` on a device, to be called in training.

    Args:
        units: modules inside, each of which is gathered as a whole where the weights are shared out.
        dtype: in which those are gathered; gradients are averaged in float32.

    Raises:
        ValueError: one process cannot share anything out.
    """
    if ranks.world == 1:
        if shard != "none":
            raise ValueError(
                f"shard = {shard} shares out over ranks, got one process: start several with torchrun "
                "--nproc-per-node N -m var_ext train ..., or leave out --shard"
            )
        return module.to(device)
    if shard == "full":
        mesh = init_device_mesh(device.type, (ranks.world,))
        gathered = MixedPrecisionPolicy(
            param_dtype=None if dtype == torch.float32 else dtype,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        )
        for unit in units:
            fully_shard(unit, mesh=mesh, mp_policy=gathered)
        fully_shard(module, mesh=mesh)
        return module
    # Buckets are never laid out anew where parameters may be unused: the order of sums, in which gloo's depend on the
    # place in a bucket, stays the same in a resumed run. Some are unused, such as word_embed at the first scale alone.
    return DistributedDataParallel(
        module.to(device),
        device_ids=[device.index] if device.type == "cuda" else None,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
        find_unused_parameters=True,
    )


def accumulating(module: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """Around a forward and backward pass: ranks exchange gradients in the last one before a step alone."""
    if isinstance(module, DistributedDataParallel):
        return nullcontext() if last else module.no_sync()
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
    return nullcontext()


def build_optimizer(
    kind: type[torch.optim.Optimizer], groups: list[dict[str, Any]], ranks: Ranks, shard: str, **options: Any
) -> torch.optim.Optimizer:
    """An optimizer of the groups of `param_groups`; its state is shared out if `shard` is "optimizer"."""
    if ranks.world > 1 and shard == "optimizer":
        # imported where it is needed: it scripts functions, with a warning each
        from torch.distributed.optim import ZeroRedundancyOptimizer

        return ZeroRedundancyOptimizer(groups, optimizer_class=kind, **options)
    return kind(groups, **options)


def clip_gradients(module: nn.Module, most: float) -> Tensor:
    """`clip_grad_norm_` over all ranks; returns the norm before, () float32."""
    norm = torch.nn.utils.clip_grad_norm_(module.parameters(), most)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be shared out, in full on every rank's CPU."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


def as_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor, in full on this rank or shared out, on the device and shared out as `like`."""
    if isinstance(tensor, DTensor) and not isinstance(like, DTensor):
        tensor = tensor.full_tensor()
    if isinstance(like, DTensor) and not isinstance(tensor, DTensor):
        tensor = tensor.to(like.device)
        return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
    return tensor.to(like.device)


def local(tensor: Tensor) -> Tensor:
    """This rank's own memory of a tensor that may be shared out."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def owners(sizes: Mapping[str, int], world: int) -> dict[str, int]:
    """Name -> rank, largest first to the rank with the least so far."""
    loads, found = [0] * world, {}
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        found[name] = loads.index(min(loads))
        loads[found[name]] += sizes[name]
    return found


def collected(
    values: Mapping[str, Tensor], like: Mapping[str, Tensor], ranks: Ranks
) -> Iterator[tuple[str, Tensor]]:
    """The values of all ranks, by the names of `like`, where each is on one rank; a name that none has is left out."""
    for name, tensor in like.items():
        mine = values.get(name)
        there = ranks.sum(torch.tensor(float(mine is not None), device=tensor.device))
        if there:
            yield name, ranks.sum(torch.zeros_like(tensor) if mine is None else mine.detach().clone())


def _inner(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer of this rank's parameters: the one inside a ZeroRedundancyOptimizer, or the optimizer itself."""
    return getattr(optimizer, "optim", optimizer)


def _kept(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """What an optimizer keeps of a parameter, first what shows that there is something."""
    return (
        ("momentum_buffer",) if isinstance(optimizer, torch.optim.Muon) else ("step", "exp_avg", "exp_avg_sq")
    )


def optimizer_state(
    optimizer: torch.optim.Optimizer, module: nn.Module, ranks: Ranks
) -> dict[str, dict[str, Tensor]]:
    """State of Muon, "momentum_buffer", or of an optimizer of the Adam family, "step", "exp_avg" and "exp_avg_sq", by
    names of parameters."""
    parameters = dict(module.named_parameters())
    inner = _inner(optimizer)
    found: dict[str, dict[str, Tensor]] = {}
    for key in _kept(inner):
        mine = {name: inner.state[p][key] for name, p in parameters.items() if inner.state.get(p)}
        if inner is not optimizer:
            likes = {
                name: torch.zeros((), device=p.device) if key == "step" else p
                for name, p in parameters.items()
            }
            mine = dict(collected(mine, {name: like.detach() for name, like in likes.items()}, ranks))
        found[key] = mine
    return found


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, module: nn.Module, state: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Put back what `optimizer_state` gave, under any way of sharing out; KeyError if a name is missing.

    A parameter that had no state then has none again: it may have diverged since.

    Raises:
        ValueError: a tensor has not the shape and dtype of its parameter, or "step" is no single float32. Fused
            optimizers write beyond such tensors without a look.
    """
    inner = _inner(optimizer)
    first, *_ = keys = _kept(inner)
    owned = {p for group in inner.param_groups for p in group["params"]}
    for name, p in module.named_parameters():
        if p not in owned:
            continue
        inner.state.pop(p, None)
        if name in state[first]:
            likes = {key: torch.zeros((), device=p.device) if key == "step" else p for key in keys}
            inner.state[p] = {
                key: _put_back(state[key][name], like, f"{key} of {name}") for key, like in likes.items()
            }


def _put_back(kept: Tensor, like: Tensor, what: str) -> Tensor:
    """A tensor of an optimizer's state, with shape, dtype and strides of `like`."""
    if not isinstance(kept, Tensor) or (kept.shape, kept.dtype, kept.layout) != (
        like.shape,
        like.dtype,
        like.layout,
    ):
        came = f"{kept.dtype} {tuple(kept.shape)}" if isinstance(kept, Tensor) else type(kept).__name__
        raise ValueError(f"{what} must be {like.dtype} {tuple(like.shape)}, got {came}")
    found = as_like(kept, like)
    if isinstance(found, DTensor) or found.stride() == like.stride():
        return found
    return torch.empty_like(like).copy_(found)  # its rows may share memory, and will be written to
