"""Models on disk and on the hub: name -> `ModelFolder` -> models; and back.

atomic.py       atomic file writes; JSON
tensors.py      safetensors files; entry names without wrappers
torch_files.py  files of torch.save, which cost no more than their size
pth.py          .pth files, read as tensors only
sizes.py        the sizes of a model from the shapes of its entries
released.py     the published models: names, files, sizes
arguments.py    kind and range of each argument in a config.json
arguments.py    what a config may ask for
model_folder.py `ModelFolder`: the config, read once, the paths of the weights, and the models built from them
adapter_entries.py  entries of adapters (LoRA), and merging them
training_run.py the weights in the checkpoint of a training run
adapter.py      folders of adapters, as peft writes them
saving.py       `save_model`
hub.py          fetching a file
find.py         `find_model`: a name or path -> `ModelFolder`
conversion.py   files without a folder -> `ModelFolder` -> a folder
"""

from var_ext.checkpoints.adapter import ADAPTER_CONFIG, save_adapter
from var_ext.checkpoints.atomic import (
    CheckpointError,
    atomic_write,
    check_writable,
    clear_remains,
    first_line,
    read_json,
    write_json,
)
from var_ext.checkpoints.conversion import convert, load_published
from var_ext.checkpoints.find import bundled_models, check_apart, find_model, lasting_name, load_tokenizer
from var_ext.checkpoints.model_folder import ModelFolder
from var_ext.checkpoints.pth import read_entries
from var_ext.checkpoints.released import published_config
from var_ext.checkpoints.saving import save_model
from var_ext.checkpoints.tensors import load_tensors, save_tensors

__all__ = [
    "ADAPTER_CONFIG",
    "CheckpointError",
    "ModelFolder",
    "atomic_write",
    "bundled_models",
    "check_apart",
    "check_writable",
    "clear_remains",
    "convert",
    "find_model",
    "first_line",
    "lasting_name",
    "load_published",
    "load_tensors",
    "load_tokenizer",
    "published_config",
    "read_entries",
    "read_json",
    "save_adapter",
    "save_model",
    "save_tensors",
    "write_json",
]
