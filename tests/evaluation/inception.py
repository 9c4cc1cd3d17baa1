"""Inception networks with random weights, and the three kinds of file they are kept in."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from var_ext.evaluation.inception import InceptionV3
from var_ext.evaluation.inception_weights import scopes


def random_inception(seed: int = 0, *, scaled: bool = True) -> InceptionV3:
    """Weights that keep a signal's size through the network, and norms that are not trivial.

    Args:
        scaled: whether norms have a scale, which OpenAI's file has not.
    """
    network = InceptionV3()
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return torch.rand(like.shape, generator=generator) * (high - low) + low

    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            deviation = (2 / module.weight[0].numel()) ** 0.5
            module.weight.copy_(torch.randn(module.weight.shape, generator=generator) * deviation)
        elif isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.copy_(uniform(module.running_mean, -0.2, 0.2))
            module.running_var.copy_(uniform(module.running_var, 0.5, 1.5))
            module.bias.copy_(uniform(module.bias, -0.2, 0.2))
            if scaled:
                module.weight.copy_(uniform(module.weight, 0.8, 1.2))
    network.fc.weight.copy_(torch.randn(network.fc.weight.shape, generator=generator) * 0.05)
    return network


def save_pth(network: InceptionV3, path: Path, *, counters: bool = False) -> Path:
    """As torch-fidelity keeps it: 472 entries, or with the counters of the norms."""
    entries = network.state_dict()
    torch.save({k: v for k, v in entries.items() if counters or "num_batches" not in k}, path)
    return path


def save_openai(network: InceptionV3, path: Path) -> Path:
    """As OpenAI keeps it: 378 entries by the graph's scopes, no scale of the norms."""
    entries, found = network.state_dict(), {}
    for name, scope in scopes():
        block, _, rest = scope.partition("/")
        joint = "_" if block in ("mixed_9", "mixed_10") else "."
        ours = f"{block}.{rest.replace('/', joint)}" if rest else block
        for theirs, kind in {"weight": "conv.weight", "beta": "bn.bias", "mean": "bn.running_mean",
                             "var": "bn.running_var"}.items():  # fmt: skip
            found[f"layers.{ours}.{theirs}"] = entries[f"{name}.{kind}"]
    found |= {f"output.{kind}": entries[f"fc.{kind}"] for kind in ("weight", "bias")}
    assert len(found) == 378
    torch.save(found, path)
    return path


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def field(number: int, content: bytes | int) -> bytes:
    if isinstance(content, int):
        return varint(number * 8) + varint(content)
    return varint(number * 8 + 2) + varint(len(content)) + content


def node(name: str, dtype: int, shape: tuple[int, ...], values: bytes, *, listed: bool = False) -> bytes:
    """A constant of a GraphDef: raw bytes, or a packed list of floats."""
    dims = b"".join(field(2, field(1, size)) for size in shape)
    tensor = field(1, dtype) + field(2, dims) + field(5 if listed else 4, values)
    kind = field(5, field(1, b"dtype") + field(2, field(6, dtype)))
    value = field(5, field(1, b"value") + field(2, field(8, tensor)))
    return field(1, field(1, name.encode()) + field(2, b"Const") + kind + value)


def constant(name: str, array: np.ndarray, *, listed: bool = False) -> bytes:
    """A constant of float32."""
    return node(name, 1, array.shape, array.astype("<f4").tobytes(), listed=listed)


def save_graph(network: InceptionV3, path: Path) -> Path:
    """As TensorFlow keeps it: constants among other nodes and integers."""
    entries = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    nodes = [
        field(1, field(1, b"ExpandDims") + field(2, b"ExpandDims") + field(3, b"Cast")),
        node("size", 3, (2,), struct.pack("<2i", 299, 299)),
        constant("softmax/weights", entries["fc.weight"].T),
        constant("softmax/biases", entries["fc.bias"], listed=True),
    ]
    for name, scope in scopes():
        nodes.append(constant(f"{scope}/conv2d_params", entries[f"{name}.conv.weight"].transpose(2, 3, 1, 0)))
        for theirs, kind in {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean",
                             "moving_variance": "running_var"}.items():  # fmt: skip
            nodes.append(constant(f"{scope}/batchnorm/{theirs}", entries[f"{name}.bn.{kind}"]))
    path.write_bytes(b"".join(nodes) + field(4, b"versions"))
    return path
