"""Files of the Inception network of FID: torch-fidelity's .pth, OpenAI's .pt, and TensorFlow's graph .pb.

All three hold the weights of 2015-12-05. Nothing is fetched: a file is named, or found where torch.hub keeps
torch-fidelity's.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from var_ext.checkpoints import CheckpointError, read_entries
from var_ext.evaluation.graph_def import read_constants
from var_ext.evaluation.inception import InceptionV3, Unit
from var_ext.paths import user_path

HUB_FILE = "weights-inception-2015-12-05-6726825d.pth"
WHERE = (
    f"{HUB_FILE} of https://github.com/toshas/torch-fidelity/releases/tag/v0.2.0 (95 MB), "
    "https://openaipublic.blob.core.windows.net/consistency/inception/inception-2015-12-05.pt, or "
    "classify_image_graph_def.pb in http://download.tensorflow.org/models/image/imagenet/inception-2015-12-05.tgz"
)

# The graph's scope of each block, and the units of a block in the order of its scopes.
BLOCKS = {
    f"Mixed_{name}": f"mixed_{i}" if i else "mixed"
    for i, name in enumerate(("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"))
}
STEM = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3")
# branch -> tower of the graph; the others are "conv" beside the towers
TOWERS = {
    "5x5": "tower", "7x7": "tower", "3x3dbl": "tower_1", "7x7dbl": "tower_1", "7x7x3": "tower_1",
}  # fmt: skip


def scopes() -> Iterator[tuple[str, str]]:
    """(name of a unit here, its scope in the graph), 94 pairs such as ("Mixed_5b.branch5x5_1", "mixed/tower/conv")."""
    for i, name in enumerate(STEM):
        yield name, _conv(i)
    for name, module in _empty().named_modules():
        if isinstance(module, Unit) and "." in name:
            block, unit = name.split(".")
            yield name, f"{BLOCKS[block]}/{_scope(block, unit.removeprefix('branch'))}"


def _conv(i: int) -> str:
    return f"conv_{i}" if i else "conv"


def _scope(block: str, unit: str) -> str:
    if unit == "_pool":
        return "tower_2/conv"
    kind, _, place = unit.partition("_")
    if not place:  # alone in its branch: 1x1, and the 3x3 of Mixed_6a
        return "conv"
    # where there is no 5x5 or 7x7 beside it, the 3x3 is the first tower: Mixed_6a, 7a, 7b and 7c
    tower = "tower" if kind == "3x3" or block == "Mixed_6a" else TOWERS[kind]
    if place[-1] in "ab":  # two side by side at the end
        return f"{tower}/mixed/{_conv('ab'.index(place[-1]))}"
    return f"{tower}/{_conv(int(place) - 1)}"


def find_weights(path: str | os.PathLike[str] | None = None) -> Path:
    """The file that is named, else torch-fidelity's in torch.hub's cache.

    Raises:
        CheckpointError: there is none; the message says which files serve and where they are.
    """
    if path is not None:
        return user_path(path)
    cached = Path(torch.hub.get_dir()) / "checkpoints" / HUB_FILE
    if not cached.is_file():
        raise CheckpointError(
            f"the Inception weights of FID are needed: name a file with --weights, or put one at {cached}. "
            f"Any of these serves: {WHERE}. Without it, --features lite0 gives another distance, not FID"
        )
    return cached


def read_inception(path: str | os.PathLike[str]) -> InceptionV3:
    """The network with the weights of a file of one of the three kinds.

    Raises:
        CheckpointError: the file cannot be read, is of another network, or has values that are not finite.
    """
    file = user_path(path)
    entries = _from_graph(file) if file.suffix == ".pb" else _from_torch(file)
    network = _empty()
    wanted = network.state_dict()
    entries = {name: tensor for name, tensor in entries.items() if not name.endswith("num_batches_tracked")}
    asked = {name: tuple(t.shape) for name, t in wanted.items() if not name.endswith("num_batches_tracked")}
    came = {name: tuple(t.shape) for name, t in entries.items()}
    if came != asked:
        raise _other(file, came, asked)
    broken = [name for name, tensor in entries.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise CheckpointError(f"{file} must have finite weights, got NaN or infinity in {broken[0]}")
    counters = {name: torch.zeros((), dtype=torch.int64) for name in wanted.keys() - entries.keys()}
    network.to_empty(device="cpu").load_state_dict({**counters, **entries})
    return network


def _empty() -> InceptionV3:
    """The network without storage."""
    with torch.device("meta"):
        return InceptionV3()


def _other(
    file: Path, came: dict[str, tuple[int, ...]], asked: dict[str, tuple[int, ...]]
) -> CheckpointError:
    missing, extra = sorted(asked.keys() - came.keys()), sorted(came.keys() - asked.keys())
    if missing or extra:
        named = [f"{len(missing)} missing, such as {missing[0]}"] if missing else []
        named += [f"{len(extra)} of others, such as {extra[0]}"] if extra else []
    else:
        name = next(name for name in asked if came[name] != asked[name])
        named = [f"{name} of shape {came[name]} instead of {asked[name]}"]
    hint = ": torchvision's is another network" if came.get("fc.weight") == (1000, 2048) else ""
    return CheckpointError(
        f"{file} must hold the {len(asked)} entries of FID's Inception of 2015 ({WHERE}), got {len(came)}, "
        f"{' and '.join(named)}{hint}"
    )


def _from_torch(file: Path) -> dict[str, Tensor]:
    entries = dict(read_entries(file))
    if "layers.conv.weight" not in entries:
        return entries
    found = {
        f"fc.{kind}": entries.pop(f"output.{kind}")
        for kind in ("weight", "bias")
        if f"output.{kind}" in entries
    }
    for name, scope in scopes():
        ours = re.sub(r"^(mixed_(?:9|10))\.(.*)$", lambda m: f"{m[1]}.{m[2].replace('.', '_')}",
                      scope.replace("/", "."))  # fmt: skip
        for theirs, kind in (("weight", "conv.weight"), ("beta", "bn.bias"),
                             ("mean", "bn.running_mean"), ("var", "bn.running_var")):  # fmt: skip
            key = f"layers.{ours}.{theirs}"
            if key in entries:
                found[f"{name}.{kind}"] = entries.pop(key)
        if f"{name}.bn.bias" in found:  # the graph's scale is 1 everywhere
            found[f"{name}.bn.weight"] = torch.ones_like(found[f"{name}.bn.bias"])
    return {**found, **entries}


def _from_graph(file: Path) -> dict[str, Tensor]:
    graph = {name: torch.from_numpy(array) for name, array in read_constants(file).items()}
    found = {}
    if "softmax/weights" in graph and "softmax/biases" in graph:
        found = {"fc.weight": graph["softmax/weights"].T.contiguous(), "fc.bias": graph["softmax/biases"]}
    for name, scope in scopes():
        for theirs, kind in (("batchnorm/gamma", "bn.weight"), ("batchnorm/beta", "bn.bias"),
                             ("batchnorm/moving_mean", "bn.running_mean"),
                             ("batchnorm/moving_variance", "bn.running_var")):  # fmt: skip
            if f"{scope}/{theirs}" in graph:
                found[f"{name}.{kind}"] = graph[f"{scope}/{theirs}"]
        weight = graph.get(f"{scope}/conv2d_params")
        if weight is not None and weight.ndim == 4:  # (height, width, in, out)
            found[f"{name}.conv.weight"] = weight.permute(3, 2, 0, 1).contiguous()
    return found
