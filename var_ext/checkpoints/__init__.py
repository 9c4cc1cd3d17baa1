"""Models on disk and on the hub: name -> `ModelFolder` -> models; and back.

atomic.py       atomic file writes; JSON
tensors.py      safetensors files; entry names without wrappers
pth.py          .pth files, read as tensors only
sizes.py        the sizes of a model from the shapes of its entries
released.py     the published models: names, files, sizes
model_folder.py `ModelFolder`: the config, read once, the paths of the weights, and the models built from them
adapter.py      adapters (LoRA) of a model, as peft writes them
saving.py       `save_model`
hub.py          fetching a file
find.py         `find_model`: a name or path -> `ModelFolder`
conversion.py   files without a folder -> `ModelFolder` -> a folder
"""

from var_ext.checkpoints.adapter import ADAPTER, ADAPTER_CONFIG, merged, save_adapter, without_adapters
from var_ext.checkpoints.atomic import (
    CheckpointError,
    atomic_write,
    check_writable,
    first_line,
    read_json,
    write_json,
)
from var_ext.checkpoints.conversion import convert, load_published
from var_ext.checkpoints.find import bundled_models, find_model, lasting_name, load_tokenizer
from var_ext.checkpoints.model_folder import ModelFolder
from var_ext.checkpoints.released import published_config
from var_ext.checkpoints.saving import save_model
from var_ext.checkpoints.tensors import load_tensors, save_tensors

__all__ = [
    "ADAPTER",
    "ADAPTER_CONFIG",
    "CheckpointError",
    "ModelFolder",
    "atomic_write",
    "bundled_models",
    "check_writable",
    "convert",
    "find_model",
    "first_line",
    "lasting_name",
    "load_published",
    "load_tensors",
    "load_tokenizer",
    "merged",
    "published_config",
    "read_json",
    "save_adapter",
    "save_model",
    "save_tensors",
    "without_adapters",
    "write_json",
]
