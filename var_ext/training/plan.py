"""What a training will need, before it runs: bytes of a rank and FLOPs of a step; here of the transformer.

Nothing is computed: a step is played through with tensors that have shapes but no memory, and what lives at once is
added up. What kernels and libraries use inside is not counted, nor memory that an allocator cannot hand out again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from var_ext._torch import dispatch_mode, fake_tensors
from var_ext.checkpoints import find_model, load_tokenizer
from var_ext.export import rank_and_world
from var_ext.models import VAR, VQVAE
from var_ext.training.flops import flops_of
from var_ext.training.init_from import with_scales
from var_ext.training.loss_weights import token_weights
from var_ext.training.network import build_network, other_classes, prepare_network
from var_ext.training.optim import of_muon
from var_ext.training.precision import DTYPES, autocast
from var_ext.training.ranks import check_share
from var_ext.training.recipes import TokenizerRecipe, VARRecipe
from var_ext.training.stored_tokens import open_splits

GB = 2**30
R = TypeVar("R", VARRecipe, TokenizerRecipe)


class PeakMemory(dispatch_mode()):  # type: ignore[misc]
    """Bytes of tensors that ops inside the block made and that live at once: `now`, and at most `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(leaf.untyped_storage()) for leaf in _tensors((args, kwargs))}
        found = func(*args, **(kwargs or {}))
        for tensor in _tensors(found):
            storage = tensor.untyped_storage()
            if id(storage) not in given and storage not in self.known:
                self.known.add(storage)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, storage.nbytes())
        return found

    def _free(self, size: int) -> None:
        self.now -= size


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _tensors(entry)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


@dataclass(frozen=True)
class Plan:
    """Of one rank, in bytes: weights, gradients, optimizer (with the moving average), activations; FLOPs of a step."""

    recipe: VARRecipe | TokenizerRecipe
    world: int
    parameters: int
    trained: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    flops: int

    @property
    def total(self) -> int:
        """Peak of a rank in a step."""
        return self.weights + self.gradients + self.optimizer + self.activations

    @property
    def images(self) -> int:
        """That a rank computes at once."""
        share = -(-self.recipe.batch_size // self.world)
        return min(share, self.recipe.micro_batch or share)

    def as_text(self) -> str:
        parts = ("weights", "gradients", "optimizer", "activations", "total")
        sizes = "\n".join(f"  {name:12} {getattr(self, name) / GB:8.2f} GB" for name in parts)
        recipe = self.recipe
        trained = "" if self.trained == self.parameters else f", {self.trained / 1e6:.2f}M of them trained"
        return (
            f"{self.parameters / 1e6:.1f}M parameters{trained}; {recipe.batch_size} images a step, "
            f"{self.flops / 1e12:.1f} TFLOP\n"
            f"a rank of {self.world}, {self.images} images at once, {recipe.autocast}, shard {recipe.shard}, "
            f"activation checkpointing {'on' if recipe.activation_checkpointing else 'off'}:\n{sizes}"
        )


def plan(
    recipe: VARRecipe, vae: VQVAE, num_classes: int, world: int = 1, new_classes: bool | None = None
) -> Plan:
    """What a training needs.

    Args:
        new_classes: whether the classes are other ones than those of the model that it begins with, None where there
            is none.

    Raises:
        ValueError: the sizes of the recipe do not fit each other.
    """
    sharing = recipe.shard if world > 1 else "none"
    share = -(-recipe.batch_size // world)
    images = min(share, recipe.micro_batch or share)
    several = images < share
    found = _played(recipe, vae, num_classes, images, sharing == "full", new_classes)
    parameters, trained, matrices, unit, rest, activations, simple = found
    whole, split = 4 * trained, 4 * trained // world  # of gradients, and of what the optimizer keeps
    states = (2 + (recipe.ema > 0)) * whole - 4 * matrices
    states = states if sharing == "none" else states // world
    if sharing == "full":
        width = DTYPES[recipe.autocast].itemsize
        # what is gathered: the parts that are no block, and two blocks, the next one while one is computed
        weights = 4 * parameters // world + 4 * rest + 2 * width * unit
        gradients = whole if several else split + 2 * 4 * unit
    else:
        weights = 4 * parameters
        # buckets of all gradients; those of micro-batches are summed up beside them
        gradients = whole * (1 + several) if world > 1 else whole if several else 0
        activations = activations if gradients else simple
    flops = recipe.batch_size * flops_of(recipe, vae.schedule, vae.vocab_size, vae.Cvae)
    return Plan(recipe, world, parameters, trained, weights, gradients, states, activations, flops)


def describe(
    recipe: VARRecipe,
    data: str,
    tokenizer: str,
    device: str,
    world: int | None,
    memory: float | None,
    init_from: str | None = None,
) -> str:
    """Text of the plan of a command; see `fitting`.

    Args:
        world: ranks, None for those of the launcher.
        memory: GB of a rank, None for the GPU's if the device is one, else without limit.
        init_from: the model that the training begins with.

    Raises:
        ValueError: it does not fit, the recipe cannot be trained, or a step has fewer images than there are ranks.
    """
    vae = load_tokenizer(tokenizer)
    if recipe.patch_nums:
        vae = with_scales(vae, recipe.patch_nums)
    images, _ = open_splits(data, vae, recipe)
    new = None
    if init_from is not None:
        folder = find_model(init_from)
        source = folder.shapes()[1]
        new = other_classes(images.class_names, source.num_classes if source else 0, folder.class_names)
    token_weights(recipe.loss_weights, vae.schedule)
    return described(
        recipe, device, world, memory, len(images),
        lambda world, limit: fitting(recipe, vae, images.num_classes, world, limit, new),
    )  # fmt: skip


def described(
    recipe: VARRecipe | TokenizerRecipe,
    device: str,
    world: int | None,
    memory: float | None,
    images: int,
    fits: Callable[[int, float], Plan],
) -> str:
    """Text of `fits(ranks, GB of a rank)` for a training on so many images; what is None is asked of the launcher and
    the device."""
    if memory is None and torch.device(device).type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory / GB
    world = world or rank_and_world()[1]
    if world == 1 and recipe.shard != "none":
        raise ValueError(f"shard = {recipe.shard} shares out over ranks, got one: add --ranks N")
    check_share(min(recipe.batch_size, images), world)
    found = fits(world, float("inf") if memory is None else memory)
    return found.as_text() + ("" if memory is None else f" of {memory:.0f} GB")


def fitting(
    recipe: VARRecipe,
    vae: VQVAE,
    num_classes: int,
    world: int,
    memory: float,
    new_classes: bool | None = None,
) -> Plan:
    """The plan of a recipe, see `plan`, if it fits `memory` (GB).

    Raises:
        ValueError: it does not; names settings that do, or says that none does.
    """
    shards = (
        ("optimizer",) if recipe.optimizer == "muon" else ("optimizer", "full")
    )  # Muon needs whole matrices
    return first_that_fits(
        recipe, lambda tried: plan(tried, vae, num_classes, world, new_classes), world, memory, shards
    )


def first_that_fits(
    recipe: R, plan_of: Callable[[R], Plan], world: int, memory: float, shards: Sequence[str]
) -> Plan:
    """The plan of a recipe, or `fitting`'s error with settings that do; `shards`: what may be shared out."""
    asked = plan_of(recipe)
    if asked.total <= memory * GB:
        return asked
    micro = asked.images
    wanted = f"a rank needs {asked.total / GB:.1f} GB, got {memory:g} GB"
    for again in dict.fromkeys([recipe.activation_checkpointing, True]):
        for shard in [recipe.shard] if world == 1 else dict.fromkeys([recipe.shard, *shards]):
            size = micro
            while size:
                tried = replace(recipe, shard=shard, activation_checkpointing=again, micro_batch=size)
                if (found := plan_of(tried)).total <= memory * GB:
                    flags = f"--micro-batch {size}" + (" --activation-checkpointing" if again else "")
                    flags += f" --shard {shard}" if shard != "none" else ""
                    raise ValueError(f"{wanted}; {flags} needs {found.total / GB:.1f} GB")
                size //= 2
    raise ValueError(
        f"{wanted}, and one image at once with everything shared out does not fit: take more ranks"
    )


def without_memory(
    recipe: VARRecipe,
    vae: VQVAE,
    num_classes: int,
    cast: torch.dtype,
    mode: Any,
    new_classes: bool | None = None,
) -> VAR:
    """The transformer of a recipe in training mode, to be called in `mode`, of `fake_tensors`.

    `cast` is the dtype of its blocks.
    """
    with torch.device("meta"):
        var = build_network(recipe, vae, num_classes).train()
        # products in 8 bits keep the same for gradients as without
        prepare_network(var, replace(recipe, fp8="none"), torch.device("meta"), new_classes=new_classes)
    shapes = var.state_dict()
    with mode:
        empty = {
            name: torch.empty(t.shape, dtype=cast if name.startswith("blocks.") else t.dtype)
            for name, t in shapes.items()
        }
    var.load_state_dict(empty, assign=True)
    var.checked_labels = lambda labels: labels  # type: ignore[method-assign]  # which have no values
    return var


def one_pass(var: VAR, images: int, autocast_to: str) -> Tensor:
    """Loss of a pass over `images` without values."""
    var.key_rows(torch.device("cpu")).keys = torch.zeros(images, dtype=torch.int64)
    targets = torch.zeros(images, var.L, dtype=torch.int64)
    with autocast(torch.device("cpu"), autocast_to):
        logits = var(
            torch.zeros(images, dtype=torch.int64), torch.zeros(images, var.L - var.first_l, var.Cvae)
        )
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(targets.shape).sum(1).mean()


def _played(
    recipe: VARRecipe, vae: VQVAE, num_classes: int, images: int, gathered: bool, new_classes: bool | None
) -> tuple[int, int, int, int, int, int, int]:
    """Parameters, those that are trained, by Muon, of a block, of the rest; peak of a pass without gradients, and with
    them."""
    cast = DTYPES[recipe.autocast] if gathered else torch.float32
    mode = fake_tensors()
    var = without_memory(recipe, vae, num_classes, cast, mode, new_classes)
    parameters = sum(p.numel() for p in var.parameters())
    trained = [p for p in var.parameters() if p.requires_grad]
    blocks = sum(p.numel() for block in var.blocks for p in block.parameters())
    peaks = []
    for keep in (False, True):
        hooks = [] if keep else [p.register_post_accumulate_grad_hook(drop_gradient) for p in trained]
        with mode, PeakMemory() as peak:
            one_pass(var, images, recipe.autocast).backward()
        peaks.append(peak.peak)
        for hook in hooks:
            hook.remove()
    count = sum(p.numel() for p in trained)
    matrices = sum(p.numel() for p in of_muon(var)) if recipe.optimizer == "muon" else 0
    return parameters, count, matrices, blocks // recipe.depth, parameters - blocks, peaks[0], peaks[1]


def drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None
