"""What nvcc makes of the CUDA kernels, and what their authors said it would.

Beside each kernel stands what it may cost and, where it matters, which instructions it is made of:

    // budget: registers <= 255, shared <= 49152, blocks >= 2
    // sass: HMMA, LDSM
    template <...> __global__ void __launch_bounds__(threads, blocks) NAME_kernel(...)

`registers` of a thread, `shared` bytes of dynamic shared memory and `blocks` at once on a multiprocessor. A line can be
held to instantiations by template arguments that stand side by side, `// budget <64, 2>: ...`; the first line that fits
counts. Where the bound of threads depends on a template argument, the line begins with `threads <= N`.

Chips with 100 KB of shared memory a multiprocessor (8.6, 8.9, 12.0) hold fewer blocks: one is demanded there, or as
many as the line names, `blocks >= 3, on sm_86 >= 2`; 0 where the host picks another kernel or smaller tiles. 8.6 and
8.9 run the code of sm_80: its registers are theirs, and nothing more is compiled. VAR_EXT_COMPILED_TARGETS="86 120"
names other targets to compile, as `.ci/run` does: registers are not held to the budget there, 128 bytes of spills pass.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import metadata
from pathlib import Path

from tests.build.tools import ROOT, tool

SOURCES = ROOT / "csrc" / "cuda"
CACHE = ROOT / "build" / "compiled"
FLAGS = (
    "-std=c++17",
    "-O3",
    "-Xptxas",
    "-v",
    "-Werror",
    "all-warnings",
    "-Xcompiler",
    "-Wall,-Wextra,-Werror",
)


@dataclass(frozen=True)
class Budget:
    """What stands beside a kernel."""

    kernel: str
    arguments: str  # template arguments side by side; empty: any
    threads: int
    registers: int
    shared: int
    blocks: int
    sass: tuple[tuple[str, str], ...]  # template arguments as above, and an instruction
    small: int = 1  # blocks on a chip with 100 KB of shared memory

    def fits(self, arguments: str) -> bool:
        return stands_in(self.arguments, arguments)

    def instructions(self, arguments: str) -> list[str]:
        """What the code of an instantiation must hold."""
        return [name for held, name in self.sass if stands_in(held, arguments)]


def stands_in(some: str, arguments: str) -> bool:
    return not some or f", {some}," in f", {arguments},"


@dataclass(frozen=True)
class Kernel:
    """One instantiation, as ptxas reports it."""

    name: str
    arguments: str  # "__half, 64"
    symbol: str
    registers: int
    stack: int
    spills: int
    shared: int  # static

    def __str__(self) -> str:
        return f"{self.name}<{self.arguments}>"


NUMBERS = re.compile(
    r"(?:threads <= (\d+), )?registers <= (\d+), shared <= (\d+), blocks >= (\d+)(?:, on sm_86 >= (\d+))?$"
)
BESIDE = re.compile(r"^// (budget|sass)(?: <([^>]*)>)?: (.*)$")
HEAD = re.compile(
    r"__global__\s+void\s+__launch_bounds__\(([\w:<>, ]+?)(?:,[^)]*(?:\([^)]*\))?[^)]*)?\)\s*(\w+)\(", re.S
)
HEAD_OF_ANY = re.compile(r"__global__[^;{]*?\b(\w+)\s*\(\s*(?:const|[A-Z])", re.S)


def budgets_of(text: str, constants: str = "") -> list[Budget]:
    """The budgets of one source file.

    Raises:
        ValueError: a kernel has none, or one that cannot be read.
    """
    lines, found = text.split("\n"), []
    for number, line in enumerate(lines):
        if not re.search(r"^\s*__global__\b", line) and not re.search(r"^template <.*> __global__\b", line):
            continue
        head = HEAD.search("\n".join(lines[number : number + 4]))
        if head is None:
            raise ValueError(
                f"line {number + 1}: a kernel must read `__global__ void __launch_bounds__(threads, blocks) NAME(`"
            )
        threads, name = head[1].strip(), head[2]
        above = number - 1
        while above >= 0 and re.match(r"\s*(template <.*|class .*|//.*)$", lines[above]):
            above -= 1
        beside = [m for m in map(BESIDE.match, map(str.strip, lines[above + 1 : number])) if m]
        if not any(m[1] == "budget" for m in beside):
            raise ValueError(f"{name}: no line `// budget: registers <= N, shared <= BYTES, blocks >= K`")

        def number_of(constant: str, name: str = name) -> int:
            """The value of a launch bound: a number, or a constant that one defines."""
            if constant.isdigit():
                return int(constant)
            plain = re.escape(constant.rpartition("::")[2])
            values = re.findall(rf"constexpr \w+ (?:[^;]*?, )?{plain} = (\d+)", text + constants)
            if not values:
                raise ValueError(f"{name}: {constant} is no constant with a number for its value")
            return int(values[0])

        for m in beside:
            if m[1] != "budget":
                continue
            numbers = NUMBERS.match(m[3].strip())
            if numbers is None:
                raise ValueError(f"{name}: cannot read the budget {m[3]!r}")
            arguments = m[2] or ""
            sass = tuple(
                (other[2] or "", part.strip())
                for other in beside
                if other[1] == "sass"
                for part in other[3].split(",")
            )
            bound = int(numbers[1] or number_of(threads))
            small = int(numbers[5] or 1)
            found.append(Budget(name, arguments, bound, *map(int, numbers.groups()[1:4]), sass, small))
    return found


@cache
def budgets() -> dict[str, list[Budget]]:
    """Kernel name -> its budgets."""
    texts = {path: path.read_text(encoding="utf-8") for path in sorted(SOURCES.glob("*.cu*"))}
    table: dict[str, list[Budget]] = {}
    for path, text in texts.items():
        try:
            for budget in budgets_of(text, "\n".join(texts.values())):
                table.setdefault(budget.kernel, []).append(budget)
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from error
    return table


def budget_for(kernel: Kernel) -> Budget | None:
    return next((b for b in budgets().get(kernel.name, []) if b.fits(kernel.arguments)), None)


def targets() -> tuple[str, ...]:
    """What is compiled: VAR_EXT_COMPILED_TARGETS, or the chips that the build makes machine code for: "80", "90a"."""
    return tuple(os.environ.get("VAR_EXT_COMPILED_TARGETS", "").split()) or tuned()


@cache
def tuned() -> tuple[str, ...]:
    """The chips that the build makes machine code for."""
    (listed,) = re.findall(
        r"set\(VAR_EXT_TARGETS (.*)\)", (SOURCES / "configure.cmake").read_text(encoding="utf-8")
    )
    return tuple(target.removesuffix("-real") for target in listed.split() if target.endswith("-real"))


def sources() -> list[Path]:
    """Files with kernels."""
    return [path for path in sorted(SOURCES.glob("*.cu")) if path.name != "devices.cu"]


def split_name(demangled: str) -> tuple[str, str]:
    """("attention_kernel", "__half, 64") from a demangled signature; namespaces are left out."""
    plain = demangled.replace("(anonymous namespace)::", "")
    match = re.match(r"(?:void )?(?:\w+::)*(\w+)(?:<(.*?)>)?\(", plain)
    assert match, demangled
    return match[1], re.sub(r"\b\w+::", "", match[2] or "")


def read_report(text: str) -> Iterator[Kernel]:
    """The kernels in what `ptxas -v` says."""
    entry = re.compile(
        r"Compiling entry function '(\S+)' for"
        r".*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers([^\n]*)",
        re.S,
    )
    found = entry.findall(text)
    symbols = [m[0] for m in found]
    names = subprocess.run(
        [tool("c++filt")], input="\n".join(symbols), capture_output=True, text=True, check=True
    )
    for m, demangled in zip(found, names.stdout.splitlines(), strict=True):
        name, arguments = split_name(demangled)
        static = re.search(r"(\d+) bytes smem", m[5])
        yield Kernel(
            name,
            arguments,
            m[0],
            int(m[4]),
            int(m[1]),
            int(m[2]) + int(m[3]),
            int(static[1]) if static else 0,
        )


@dataclass(frozen=True)
class Compiled:
    source: Path
    target: str
    cubin: Path
    report: str

    @property
    def kernels(self) -> list[Kernel]:
        return list(read_report(self.report))


def nvcc() -> str:
    return tool("nvcc", "/usr/local/cuda/bin/nvcc")


@cache
def state() -> str:
    """A stamp of everything that a kernel's code depends on."""
    digest = hashlib.sha256(repr(FLAGS).encode())
    digest.update(subprocess.run([nvcc(), "--version"], capture_output=True, check=True).stdout)
    for path in sorted((ROOT / "csrc").rglob("*.*")):
        if "cpu" not in path.parts:
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def compile_file(source: Path, target: str) -> Compiled:
    """One file for one chip; what was compiled from the same sources before is taken as it is.

    Raises:
        RuntimeError: nvcc refuses, or warns.
    """
    cubin = CACHE / state() / f"{source.stem}-{target}.cubin"
    report = cubin.with_suffix(".txt")
    if not report.exists():
        cubin.parent.mkdir(parents=True, exist_ok=True)
        command = [
            nvcc(),
            *FLAGS,
            f"-arch=sm_{target}",
            f"-I{ROOT / 'csrc'}",
            "-cubin",
            "-o",
            str(cubin),
            str(source),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
        report.write_text(done.stderr, encoding="utf-8")
    return Compiled(source, target, cubin, report.read_text(encoding="utf-8"))


@cache
def compile_all(target: str, files: tuple[str, ...]) -> list[Compiled]:
    """The files of these names for a target."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda name: compile_file(SOURCES / f"{name}.cu", target), files))


def nvdisasm() -> str:
    """The disassembler that the package nvidia-cuda-nvdisasm brings."""
    (path,) = (p for p in metadata.files("nvidia-cuda-nvdisasm") or [] if p.name == "nvdisasm")
    return str(path.locate())


@lru_cache(maxsize=1)  # a text is large, and asked for again at once
def disassembly(cubin: Path) -> str:
    return subprocess.run([nvdisasm(), "-c", str(cubin)], capture_output=True, text=True, check=True).stdout


def instructions(cubin: Path) -> dict[str, set[str]]:
    """Symbol of each kernel -> the instructions in its code, with all their suffixes."""
    text = disassembly(cubin)
    found: dict[str, set[str]] = {}
    current: set[str] = set()
    for line in text.split("\n"):
        section = re.match(r"\s*\.section\s+\.text\.([^,\s]+)", line)
        if section:
            current = found.setdefault(section[1], set())
        code = re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", line)
        if code:
            current.add(code[1])
    return found


def _code(cubin: Path, symbol: str) -> Iterator[tuple[str, bool]]:
    """Labels and instructions (True) of a kernel, in their order."""
    parts = re.split(r"\.section\s+\.text\.", disassembly(cubin))[1:]
    (part,) = (part for part in parts if part.split(",")[0].split()[0] == symbol)
    for line in part.split("\n"):
        label = re.match(r"\s*(\.L_x_\d+):", line)
        instruction = re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line)
        if label:
            yield label[1], False
        if instruction:
            yield instruction[1], True


def _counted(code: Sequence[str]) -> tuple[int, int]:
    return len(code), sum("HMMA" in one for one in code)


def whole_kernel(cubin: Path, symbol: str) -> tuple[int, int]:
    """Instructions, and products of the tensor cores among them."""
    return _counted([text for text, instruction in _code(cubin, symbol) if instruction])


def inner_loop(cubin: Path, symbol: str) -> tuple[int, int]:
    """The same of the shortest loop with such products."""
    code: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for text, instruction in _code(cubin, symbol):
        if not instruction:
            labels[text] = len(code)
            continue
        code.append(text)
        back = re.search(r"\bBRA\b.*?(\.L_x_\d+)", text)
        if back and back[1] in labels:
            loops.append(_counted(code[labels[back[1]] :]))
    return min(loop for loop in loops if loop[1])


@dataclass(frozen=True)
class Chip:
    """What a multiprocessor holds at once."""

    shared: int  # bytes; a block may have all but 1 KB of them
    threads: int
    blocks: int
    code: str  # the target whose machine code it runs

    @property
    def is_small(self) -> bool:
        return self.shared == 100 * 1024


# docs.nvidia.com/cuda/cuda-c-programming-guide, compute capabilities; blocks also from the toolkit's cuda_occupancy.h
CHIPS = {
    "80": Chip(164 * 1024, 2048, 32, "80"),
    "86": Chip(100 * 1024, 1536, 16, "80"),
    "89": Chip(100 * 1024, 1536, 24, "80"),
    "90a": Chip(228 * 1024, 2048, 32, "90a"),
    "100": Chip(228 * 1024, 2048, 32, "100"),
    "120": Chip(100 * 1024, 1536, 24, "120"),
}
REGISTERS, PARTS = 65536, 4


def chips_of(target: str) -> list[str]:
    """The chips that are judged by what was compiled for a target."""
    return [
        name
        for name, chip in CHIPS.items()
        if target == chip.code or (target == name and target not in tuned())
    ]


def resident_blocks(threads: int, registers: int, shared: int, chip: str) -> int:
    """Blocks that a multiprocessor holds at once: registers go to warps in 256s, each block takes 1 KB of shared memory
    more than it asks for."""
    warps = -(-threads // 32)
    of_warp = -(-max(registers, 1) * 32 // 256) * 256
    by_registers = PARTS * (REGISTERS // PARTS // of_warp) // warps
    of = CHIPS[chip]
    return min(of.threads // threads, of.blocks, by_registers, of.shared // (shared + 1024))
