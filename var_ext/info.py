"""What this installation is and what a model is, as text: `python -m var_ext` and `var-ext info`."""

from __future__ import annotations

import importlib
import os
import platform
from pathlib import Path
from typing import Any

import torch

from var_ext import __version__, backend, ops
from var_ext.checkpoints import bundled_models, find_model
from var_ext.checkpoints.released import MODELS
from var_ext.checkpoints.training_run import progress


def describe_installation() -> str:
    """Build, chip, ISA, versions, and the backend of every op: the first question of each bug report."""
    rows = installation() | {
        "training": f"linear layers on the CPU: {_products()}",
        "models": f"bundled: {', '.join(bundled_models()) or 'none'}",
    }
    lines = [
        *(f"{label:<11}{text}" for label, text in rows.items()),
        f"           published: {', '.join(MODELS)}",
        "",
        f"{'op':<24}" + "".join(f"{device:<11}" for device in backend.DEVICES).rstrip(),
    ]
    for op in ops.__all__:
        runs = ("native" if backend.use_native(op, device) else "reference" for device in backend.DEVICES)
        lines.append(f"{op:<24}" + "".join(f"{which:<11}" for which in runs).rstrip())
    return "\n".join(lines)


def installation() -> dict[str, str]:
    """Build, chip and versions by label: what figures and timings depend on."""
    return {
        "var_ext": __version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        **_build_rows(),
        "gpu": f"{_gpu()}{_first_call()}",
        "backend": f"{backend.current()} (set VAR_EXT_BACKEND to {' or '.join(backend.CHOICES)})",
    }


def _products() -> str:
    """Whose products the layers of a transformer are in training."""
    own = [name for name, bf16 in (("fp32", False), ("bf16", True)) if backend.multiplies("cpu", bf16=bf16)]
    return f"this package's in {' and '.join(own)}" if own else "torch's"


def _build_rows() -> dict[str, str]:
    try:
        native: Any = importlib.import_module("var_ext._C")
    except ImportError as error:
        return {"build": f"no compiled part: {error}", "cpu": _chip()}
    build, cpu = native.build_info(), native.cpu_info()
    return {
        "build": f"{build['build_type']}, {build['compiler']}, "
        f"OpenMP {'on' if build['openmp'] else 'off'}, CUDA {_cuda(build)}",
        "cpu": f"{_chip()}; kernels run {cpu['selected']} (this chip can: {', '.join(cpu['isa'])})",
    }


def _cuda(build: dict[str, Any]) -> str:
    """The toolkit's version and the chips that have code in this build."""
    if build["cuda"] is None:
        return "off"
    machine, ptx = _split(build["cuda_targets"])
    made = [f"sm_{target}" for target in machine] + [f"PTX {target}" for target in ptx]
    return f"{build['cuda']} for {', '.join(made)}"


def _split(targets: str) -> tuple[list[str], list[str]]:
    """(["80", "90a"], ["90"]) of "80-real 90a-real 90-virtual", CMake's names; a plain number stands for both."""
    listed = [target.partition("-") for target in targets.split()]
    return (
        [number for number, _, kind in listed if kind != "virtual"],
        [number for number, _, kind in listed if kind != "real"],
    )


def code_for(targets: str, capability: tuple[int, int]) -> str | None:
    """What a build for `targets` has for a chip: "machine code", "PTX", which the driver compiles, or None.

    Machine code runs on chips of its major version and no older minor one; of a target with an "a" on that chip alone.
    """

    def version(number: str) -> tuple[int, int]:
        return divmod(int(number.rstrip("af")), 10)

    machine, ptx = _split(targets)
    for number in machine:
        if not number[:1].isdigit():  # "native", "all": for the chips there were
            return "machine code"
        of = version(number)
        if of == capability or (number[-1] != "a" and of[0] == capability[0] and of[1] <= capability[1]):
            return "machine code"
    return "PTX" if any(n[:1].isdigit() and version(n) <= capability for n in ptx) else None


def _first_call() -> str:
    """A word about the GPU at hand where this build has no machine code for it."""
    try:
        targets = importlib.import_module("var_ext._C").build_info()["cuda_targets"]
    except ImportError:
        return ""
    if targets is None or not torch.cuda.is_available():
        return ""
    code = code_for(targets, torch.cuda.get_device_capability())
    if code == "PTX":
        return "; this build has PTX for it: the first call compiles the kernels, once, and takes a while"
    return "" if code else "; this build has no code for it: see CMAKE_CUDA_ARCHITECTURES in docs/index.md"


def _chip() -> str:
    """The processor's name, where the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none"
    capability = "".join(map(str, torch.cuda.get_device_capability()))
    return f"{torch.cuda.get_device_name()} (sm_{capability}), torch's CUDA {torch.version.cuda}"


def describe_model(name_or_path: str | os.PathLike[str]) -> str:
    """`model_rows` as text."""
    return "\n".join(f"{label:<13}{text}" for label, text in model_rows(name_or_path).items())


def model_rows(name_or_path: str | os.PathLike[str]) -> dict[str, str]:
    """Sizes, scales and recommended settings of a model by label: from its config alone, no weights are read or
    fetched.

    Raises:
        ValueError: no such model.
        CheckpointError: its config cannot be read.
    """
    folder = find_model(name_or_path)
    vae, var = folder.shapes()
    rows = {
        "model": f"{os.fspath(name_or_path)} ({folder.source})",
        "images": f"{vae.image_size} x {vae.image_size} pixels",
        "scales": f"{', '.join(map(str, vae.schedule.patch_nums))}: {vae.schedule.num_tokens} tokens",
        "tokenizer": f"{_millions(vae)} parameters, {vae.vocab_size} codes of {vae.Cvae} channels",
    }
    if var is not None:
        shape = f"depth {var.depth}, width {var.C}"
        rows["transformer"] = f"{_millions(var)} parameters, {shape}, {var.num_classes} classes"
    if folder.training is not None:
        rows["training"] = f"not done: {progress(Path(folder.source))}"
    if folder.sampling:
        rows["sampling"] = ", ".join(f"{key} {value}" for key, value in folder.sampling.items())
    if folder.class_names:
        rows["classes"] = ", ".join(folder.class_names[:20]) + (
            ", ..." if len(folder.class_names) > 20 else ""
        )
    return rows


def _millions(model: torch.nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f}M"
