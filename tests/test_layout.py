"""Holds the house to its layout: one op, one name, everywhere; imports point down; debts are written down."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import var_ext
from var_ext import _C, ops, reference

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "var_ext"

# Kernels still to be written. A CPU kernel brings its params header with it.
OWED: dict[str, set[str]] = {"cpu": set(), "cuda": set()}
# Kernels that are not worth writing: on a GPU cuBLAS makes the products, and the loss takes 1% of a step.
LEFT_TO_TORCH = {"cpu": set[str](), "cuda": {"cross_entropy", "linear"}}
KERNELS = {"cpu": "csrc/cpu/{}.cpp", "cuda": "csrc/cuda/{}.cu"}
ALWAYS = ("var_ext/ops/{}.py", "var_ext/reference/{}.py", "tests/ops/test_{}.py", "benchmarks/bench_{}.py")

# Files beside those of the ops: code that several ops share, and benchmarks of more than an op.
SHARED = {
    "csrc/ops": {"attention", "kernels", "maps", "resample"},
    "csrc/cpu": {
        "attention",
        "frames",
        "math",
        "operands",
        "phi",
        "planes",
        "resample",
        "rows",
        "select",
        "variants",
        "vec",
    },
    "csrc/cuda": {
        "attention",
        "bindings",
        "devices",
        "launch",
        "numeric",
        "ptx",
        "resample",
        "rows",
        "schedule",
    },
    "var_ext/ops": {"__init__", "_checks", "_interpolation", "_native", "_registry"},
    "var_ext/reference": {"__init__"},
    "tests/ops": {"__init__", "conftest", "interpolation", "oracle", "test_isa_variants", "test_registry"},
    "benchmarks": {
        "cost",
        "flops",
        "gpu",
        "ops_page",
        "samplers",
        "time_ops",
        "versus_page",
        "versus_plots",
        "vs_dit",
        "vs_official",
        "vs_pil_bicubic",
        "vs_training",
        "vs_torch_fidelity",
        "vs_vaex",
        "bench_input",
        "bench_sampling",
        "bench_threads",
        "bench_training",
    },
}

# From the ground up: a module imports from its own floor and those below.
FLOORS = (
    {"_C", "_torch", "schedule", "backend", "paths", "arrays", "splitmix64"},
    {"reference"},
    {"ops"},
    {"models"},
    {"engine", "checkpoints", "data"},
    {"editing", "selection"},
    {"sampling"},
    {"loading", "accelerate", "bench", "grid", "show", "export"},
    {"pipeline"},
    {"training"},
    {"evaluation"},
    {"scaling"},
    {"__init__"},
    {"web"},
    {
        "info",
        "cli_options",
        "cli_spaces",
        "cli_fid",
        "cli_eval",
        "cli_report",
        "cli_scaling",
        "cli_tokens",
        "cli_web",
        "cli",
        "__main__",
    },
)

# Rooms side by side that know nothing of each other: running a model, keeping it, and pictures.
APART = {"engine", "checkpoints", "data"}

# Files of a room in the order in which they build on each other.
ROOMS = {
    "checkpoints": (
        "atomic",
        "digests",
        "arguments",
        "tensors",
        "torch_files",
        "pth",
        "sizes",
        "released",
        "adapter_entries",
        "training_run",
        "model_folder",
        "adapter",
        "saving",
        "hub",
        "find",
        "conversion",
        "__init__",
    ),
}


def exists(place: str, op: str) -> bool:
    return (ROOT / place.format(op)).is_file()


@pytest.mark.parametrize("op", ops.__all__)
def test_each_op_has_its_files(op: str) -> None:
    assert not [place.format(op) for place in ALWAYS if not exists(place, op)]
    assert exists("csrc/ops/{}.h", op) == (op not in OWED["cpu"]), (
        "csrc/ops: the params header and OWED disagree"
    )


@pytest.mark.parametrize("device", KERNELS)
def test_the_list_of_owed_kernels_is_up_to_date(device: str) -> None:
    missing = {op for op in ops.__all__ if not exists(KERNELS[device], op)}
    assert LEFT_TO_TORCH[device] <= missing, f"in LEFT_TO_TORCH, but {KERNELS[device]} is there"
    missing -= LEFT_TO_TORCH[device]
    assert not missing - OWED[device], f"no {device} kernel, and not in OWED: a kernel got lost"
    assert not OWED[device] - missing, f"in OWED, but {KERNELS[device]} is there: take it off the list"


def test_the_build_carries_the_kernels_that_have_files() -> None:
    kernels = _C.kernels()
    assert set(kernels) <= set(ops.__all__)
    for device, place in KERNELS.items():
        written = {op for op in ops.__all__ if exists(place, op)}
        if device == "cuda" and _C.build_info()["cuda"] is None:
            written = set()
        assert {op for op, devices in kernels.items() if device in devices} == written


@pytest.mark.parametrize("folder", SHARED)
def test_each_file_belongs_to_an_op(folder: str) -> None:
    known = SHARED[folder] | {prefix + op for op in ops.__all__ for prefix in ("", "test_", "bench_")}
    sources = {".py", ".h", ".cpp", ".cu", ".cuh"}
    strays = [
        path.name
        for path in (ROOT / folder).glob("*.*")
        if path.suffix in sources
        and path.stem not in known
        and not any(path.stem.startswith(f"{name}_") for name in known)
    ]
    assert not strays, f"{folder}: name these after an op, or add them to SHARED"


def test_a_kernel_is_one_source_for_all_instruction_sets() -> None:
    """CMake compiles NAME_variant.cpp once for each; no file is named after one."""
    folder = ROOT / "csrc/cpu"
    named = re.compile(r"_(portable|sse\w*|avx\w*|amx\w*|bf16|neon|sve\w*)$")
    assert not [path.name for path in folder.iterdir() if named.search(path.stem)]
    kernels = [path.stem.removesuffix("_variant") for path in folder.glob("*_variant.cpp")]
    assert not [name for name in kernels if not exists("csrc/cpu/{}.cpp", name)]
    cmake = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    (without_bf16,) = re.findall(r"^set\(avx512_ops (.+)\)$", cmake, re.MULTILINE)
    assert set(without_bf16.split()) < set(kernels)


@pytest.mark.parametrize("op", ops.__all__)
def test_one_name_for_function_reference_and_registered_op(op: str) -> None:
    assert op in reference.__all__
    assert hasattr(torch.ops.var_ext, op)
    public, twin = (inspect.signature(getattr(module, op)).parameters for module in (ops, reference))
    shared = [
        p for p in twin.values() if p.name != "primitives"
    ]  # the reference may be told whose primitives to use
    assert [(p.name, p.kind, p.default) for p in public.values()] == [
        (p.name, p.kind, p.default) for p in shared
    ]


def test_nothing_else_is_registered_or_public() -> None:
    assert sorted(ops.__all__) == sorted(reference.__all__)
    names = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if "var_ext::" in name
    }
    assert not [name for name in names if not name.startswith(tuple(ops.__all__))]


@pytest.mark.parametrize("op", ops.__all__)
def test_public_docstrings_give_shapes_and_errors(op: str) -> None:
    text = inspect.getdoc(getattr(ops, op)) or ""
    assert "Raises:" in text
    assert "Returns:" in text
    assert re.search(r"\([A-Z0-9.]+, ", text), "no shape such as (B, L, C)"


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield ".".join(path.relative_to(ROOT).with_suffix("").parts), path


def imported(path: Path) -> Iterator[str]:
    """Top-level names below var_ext that a file imports: "ops"... and "__init__" for the package's face."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            source = ".".join(part for part in (base, node.module) if part)
            targets = [f"{source}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in targets:
            parts = target.split(".")
            if parts[0] != "var_ext":
                continue
            name = parts[1] if len(parts) > 1 else "__init__"
            inside = (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file() or name == "_C"
            yield name if inside else "__init__"


def floor_of(module: str) -> int:
    (floor,) = (i for i, names in enumerate(FLOORS) if module in names)
    return floor


def test_each_module_has_a_floor() -> None:
    there = {name.split(".")[1] for name, _ in modules()} | {"_C"}
    assert sorted(name for names in FLOORS for name in names) == sorted(there)


def test_imports_point_down() -> None:
    wrong = [
        f"{name} imports {target}"
        for name, path in modules()
        for target in imported(path)
        if floor_of(target) > floor_of(name.split(".")[1])
    ]
    assert not wrong


def imported_modules(path: Path) -> set[str]:
    """Modules of this package that a file imports when it is read itself: not inside functions, not for types alone."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        for inner in ast.walk(node) if isinstance(node, ast.Import | ast.ImportFrom) else ():
            if isinstance(inner, ast.ImportFrom) and (inner.module or "").startswith("var_ext"):
                found |= {str(inner.module), *(f"{inner.module}.{alias.name}" for alias in inner.names)}
            elif isinstance(inner, ast.Import):
                found |= {alias.name for alias in inner.names}
    return found


def test_imports_have_no_circle() -> None:
    """Neither on a floor nor within a room: files can be read in an order in which each uses only what came before."""
    files = {name.removesuffix(".__init__"): path for name, path in modules()}
    graph = {name: imported_modules(path) & files.keys() - {name} for name, path in files.items()}
    # a room's face imports its files, and they are read through it: no circle of the files themselves
    rooms = {name for name, path in files.items() if path.name == "__init__.py"}
    for name in files:
        graph[name] -= {room for room in rooms if name.startswith(f"{room}.")}
    while graph:
        done = {name for name, targets in graph.items() if not targets & graph.keys()}
        assert done, f"these import each other: {sorted(graph)}"
        graph = {name: targets for name, targets in graph.items() if name not in done}


def test_rooms_apart_do_not_import_each_other() -> None:
    wrong = [
        f"{name} imports {target}"
        for name, path in modules()
        for target in imported(path)
        if name.split(".")[1] in APART and target in APART - {name.split(".")[1]}
    ]
    assert not wrong


@pytest.mark.parametrize("room", ROOMS)
def test_files_of_a_room_build_on_those_before_them(room: str) -> None:
    files = {path.stem: path for path in (PACKAGE / room).glob("*.py")}
    assert sorted(files) == sorted(ROOMS[room])
    for i, name in enumerate(ROOMS[room]):
        above = {f"var_ext.{room}.{other}".removesuffix(".__init__") for other in ROOMS[room][i:]}
        assert not imported_modules(files[name]) & above, name


def test_each_file_is_read_and_written_in_one_place() -> None:
    """Formats of checkpoints are known in `checkpoints` alone; the state of a run is written by the trainer."""
    readers = {"safe_open", "torch.load", "torch.save", "hf_hub_download"}
    there = {
        name.removeprefix("var_ext.")
        for name, path in modules()
        if readers
        & {
            ast.unparse(node)
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Name | ast.Attribute)
        }
    }
    assert there == {
        "checkpoints.hub", "checkpoints.tensors", "checkpoints.torch_files", "training.checkpoint",
    }  # fmt: skip


# What torch keeps in its modules and tensors under names of its own.
PRIVATE = {name for name in dir(torch.nn.Module()) + dir(torch.Tensor) if re.match("_[a-zA-Z]", name)}
PUBLIC_OPS = {"aten", "var_ext"}  # of `torch.ops`: documented, and this package's


def private_names_of_torch(source: str) -> list[str]:
    """Those that a file uses: in imports, after a name that comes from torch, and of modules and tensors."""
    tree = ast.parse(source)
    found, from_torch = [], set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            whole = [(alias.name, alias.asname or alias.name.split(".")[0]) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            whole = [(f"{node.module}.{alias.name}", alias.asname or alias.name) for alias in node.names]
        else:
            continue
        ours = [(name, local) for name, local in whole if name.split(".")[0] == "torch"]
        from_torch |= {local for _, local in ours}
        found += [name for name, _ in ours if "._" in name]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            owner = ast.unparse(node.value)
            private = node.attr.startswith("_") and not node.attr.startswith("__")
            internal_op = owner == "torch.ops" and node.attr not in PUBLIC_OPS
            if node.attr in PRIVATE or (private and owner.split(".")[0] in from_torch) or internal_op:
                found.append(f"{owner}.{node.attr}")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in PRIVATE:
            found.append(node.value)
        elif isinstance(node, ast.keyword) and node.arg in PRIVATE:
            found.append(str(node.arg))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in {
            "getattr",
            "hasattr",
            "setattr",
            "delattr",
        }:
            name = node.args[1]
            if (
                isinstance(name, ast.Constant)
                and re.match("_[a-zA-Z]", name.value)
                and name.value != "_fields"
            ):
                found.append(name.value)
    return found


def test_private_names_of_torch_stand_behind_one_door() -> None:
    used = {name: private_names_of_torch(path.read_text(encoding="utf-8")) for name, path in modules()}
    assert used.pop("var_ext._torch")
    assert not {name: found for name, found in used.items() if found}


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch._addmm_activation(b, x, w)",
        "import torch\nwith torch._C._AutoDispatchBelowAutograd(): pass",
        "import torch\ntorch.cpu._is_avx512_bf16_supported()",
        "import torch\ntorch.ops.mkldnn._linear_pointwise(x, w, b)",
        "import torch\ntorch.ops.onednn.qlinear_pointwise(x)",
        "import torch._dynamo",
        "import torch as t\nt._foreach_lerp_(a, b, 1)",
        "from torch import _C",
        "from torch._utils import _rebuild_tensor",
        "from torch.autograd import forward_ad\nforward_ad._current_level",
        "from torch.nn import functional as F\nF._canonical_mask(m)",
        "module._forward_hooks",
        "self._parameters = {}",
        "x.grad._version",
        "attrgetter('_version')",
        "attributes['_parameters'] = {}",
        "attributes.update(_modules={})",
        "getattr(model, '_orig_mod', model)",
    ],
)
def test_a_private_name_of_torch_is_found(source: str) -> None:
    assert private_names_of_torch(source)


def test_other_names_are_not_taken_for_private_ones_of_torch() -> None:
    source = """
import torch
from torch import nn
from var_ext import _C, _torch
torch.ops.aten.gelu_backward(g, x); torch.ops.var_ext.adaln(x); torch.Tensor.__add__
_C.build_info(); _torch.hooks_of(nn.Linear(1, 1)); self._layers; hasattr(value, "_fields")
"""
    assert private_names_of_torch(source) == []


def test_what_cpu_and_cuda_share_knows_neither() -> None:
    for folder in ("common", "ops"):
        for path in (ROOT / "csrc" / folder).iterdir():
            assert not re.search(r'#\s*include\s*"(cpu|cuda)/', path.read_text(encoding="utf-8")), path


def test_the_core_knows_nothing_of_torch() -> None:
    for path in (ROOT / "csrc").rglob("*.*"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r'#\s*include\s*[<"](torch|ATen|c10|caffe2)\b', text), path
        assert path.stem == "bindings" or not re.search(r"#\s*include\s*<pybind11", text), path
        assert (
            path.name == "ptx.cuh" or path.suffix not in {".cu", ".cuh"} or not re.search(r"\basm\b", text)
        ), path


def test_the_version_stands_in_one_file() -> None:
    (version,) = re.findall(
        r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert version == var_ext.__version__ == _C.build_info()["version"]
    sources = [ROOT / "CMakeLists.txt", *PACKAGE.rglob("*.py"), *(ROOT / "csrc").rglob("*.*")]
    assert not [path for path in sources if f'"{version}"' in path.read_text(encoding="utf-8")]


def declared(body: list[ast.stmt]) -> set[str]:
    """Public names that a stub's statements declare."""
    names = set()
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return {name for name in names if not name.startswith("_")}


def test_the_stub_lists_what_is_called_by_type() -> None:
    """All that the extension exports but the kernels, whose arguments csrc/ops/kernels.h lists."""
    stub = ast.parse((PACKAGE / "_C.pyi").read_text(encoding="utf-8")).body
    # a TypedDict describes a result; there is no such class at run time
    stub = [
        node
        for node in stub
        if not (isinstance(node, ast.ClassDef) and "TypedDict" in map(ast.unparse, node.bases))
    ]
    exported = {name for name in vars(_C) if not name.startswith(("_", *ops.__all__))}
    exported.add("CudaStream")  # CPU builds have none
    assert declared(stub) == exported
    for node in stub:
        if isinstance(node, ast.ClassDef) and hasattr(_C, node.name):
            members = vars(getattr(_C, node.name))
            exported = {name for name in members if not name.startswith(("_", *ops.__all__))}
            assert declared(node.body) == exported, node.name
