"""Facts about the extension that was built: what it tells of itself, variants, thread pool."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.build.tools import ROOT, python, tool
from var_ext import _C, backend, ops

VARIANTS = ["portable", "avx2", "avx512", "avx512_bf16"]


@pytest.fixture
def isa_restored() -> Iterator[None]:
    before = _C.isa()
    yield
    _C.set_isa(before)


def test_build_info() -> None:
    info = _C.build_info()
    assert set(info) == {"version", "compiler", "build_type", "cuda", "cuda_targets", "openmp"}
    assert re.fullmatch(r"\w+ \d+\.\d+.*", info["compiler"])
    assert info["cuda"] is None or re.fullmatch(r"\d+\.\d+.*", info["cuda"])
    assert (info["cuda_targets"] is None) == (info["cuda"] is None)
    assert info["openmp"] is True  # without it the kernels would run on one thread


def test_no_cuda_library_is_needed() -> None:
    needed = subprocess.run([tool("ldd"), _C.__file__], capture_output=True, text=True, check=True).stdout
    assert "libgomp" in needed or "libomp" in needed  # the listing is real
    for library in ("libcuda", "libtorch", "libc10"):
        assert library not in needed


def test_devices_are_listed_without_a_gpu_too() -> None:
    devices = _C.cuda_devices()
    assert all(re.search(r"\(sm_\d+\)$", name) for name in devices)
    if _C.build_info()["cuda"] is None:
        assert devices == []


def test_kernels_are_known_ops() -> None:
    table = _C.kernels()
    assert set(table) <= set(ops.__all__)
    for op, devices in table.items():
        assert callable(getattr(_C, op))
        assert set(devices) <= set(backend.DEVICES)
    table.clear()
    assert _C.kernels()  # a copy was handed out


def test_every_variant_can_be_forced(isa_restored: None) -> None:
    supported = _C.cpu_info()["isa"]
    assert supported == VARIANTS[: len(supported)]
    for name in supported:
        _C.set_isa(name)
        assert _C.isa() == _C.cpu_info()["selected"] == name


def test_an_unknown_variant_is_refused(isa_restored: None) -> None:
    before = _C.isa()
    with pytest.raises(ValueError, match=r"set_isa: isa must be one of portable.*got 'avx1024'"):
        _C.set_isa("avx1024")
    assert _C.isa() == before


def test_variant_from_the_environment() -> None:
    # _C alone: it needs neither the package nor torch
    show = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("_C", {_C.__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.isa())"""
    best = _C.cpu_info()["isa"][-1]
    for value, wanted in (("portable", "portable"), (best, best), ("", best)):
        assert python(show, VAR_EXT_ISA=value).stdout.strip() == wanted
    refused = python(show, VAR_EXT_ISA="sse9")
    assert refused.returncode != 0
    assert re.search(r"VAR_EXT_ISA: .*must be one of portable.*got 'sse9'", refused.stderr)


def test_torchs_thread_pool_is_shared() -> None:
    """torch's OpenMP threads serve the kernels: no second runtime, no further threads, the number obeyed."""
    code = """
import os, torch
torch.set_num_threads({threads})
import var_ext
from var_ext import ops
count = lambda: len(os.listdir("/proc/self/task"))
before = count()
a = torch.randn(1 << 20)
for _ in range(3): (a + a).sum()
torchs = count()
x, codebook = torch.randn(512, 32), torch.randn(4096, 32)
for _ in range(3): ops.nearest_code(x, codebook)
runtimes = {{line.split()[-1] for line in open("/proc/self/maps") if "gomp" in line or "libomp" in line}}
print(torchs - before, count() - torchs, len(runtimes))
"""
    one, two = (python(code.format(threads=n), VAR_EXT_BACKEND="native").stdout.split() for n in (1, 2))
    assert one == ["0", "0", "1"]
    assert two == ["1", "0", "1"]


def variant_flags(variant: str) -> list[str]:
    """The instruction sets of a variant, each on top of the one before, as CMakeLists.txt has them."""
    text = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    flags: list[str] = []
    for name in VARIANTS[1 : VARIANTS.index(variant) + 1]:
        (own,) = re.findall(rf"set\({name}_flags (?:\${{\w+}} )?(.*)\)", text)
        flags += own.split()
    return flags


def test_the_build_has_these_variants() -> None:
    text = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    assert re.findall(r"\badd_variant\((\w+) \"", text) == VARIANTS


@pytest.mark.parametrize(
    "variant", [*(pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS[1:-1]), VARIANTS[-1]]
)
def test_variants_share_no_code(variant: str, tmp_path: Path) -> None:
    """A function that the linker may merge with that of another file would carry AVX onto every processor."""
    if _C.cpu_info()["isa"] == ["portable"]:
        return  # other processors have one variant only
    isa = [*variant_flags(variant), f"-DVAR_EXT_VARIANT={variant}"]
    sources = sorted((ROOT / "csrc/cpu").glob("*_variant.cpp"))
    assert sources
    objects = [tmp_path / f"{source.stem}.o" for source in sources]
    for source, target in zip(sources, objects, strict=True):
        # -O0: nothing is inlined away, so every function that could be shared shows
        command = [tool("g++", "c++"), "-std=c++17", "-O0", *isa, f"-I{ROOT / 'csrc'}", "-c", str(source)]
        subprocess.run([*command, "-o", str(target)], check=True)
    symbols = subprocess.run(
        [tool("nm"), "-C", *map(str, objects)], capture_output=True, text=True, check=True
    )
    assert "nearest_code" in symbols.stdout
    # DW.ref: where exceptions are unwound, the address of a function in the runtime, no code
    shared = [
        line for line in symbols.stdout.splitlines() if re.match(r"[0-9a-f ]{16} [WVu] (?!DW\.ref\.)", line)
    ]
    assert not shared
