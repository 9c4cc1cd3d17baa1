"""Mutated files against every reader: `python -m tests.attack.fuzz_files --seed 0 --seconds 60`.

Each case is a copy of a good file with bytes flipped, cut, repeated or exchanged, or with a JSON value replaced by an
extreme one, read in a forked process with limits of memory and of time. A case may end well or with an error of this
project; a signal, another exception, more than 5 seconds or more than 1 GB besides the file are faults, whose file is
kept. Case N of a seed is the same each time: --only N runs it alone. The exit status is 1 if there was a fault.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import var_ext
from tests.tiny import answer, tiny
from var_ext.checkpoints import CheckpointError, convert, save_model
from var_ext.checkpoints.training_run import FORMAT, kept_weights
from var_ext.data.reading import check_picture, read_published, read_rgb
from var_ext.evaluation.npz import Member
from var_ext.export.destinations import Npz
from var_ext.export.plan import Plan
from var_ext.info import describe_model
from var_ext.training.checkpoint import load_checkpoint
from var_ext.training.stored_tokens import NAME, StoredTokens, TokenData, TokenSplit, write_token_set

HANG, MEMORY = 5, 1 << 30  # seconds of the processor, and bytes beyond what the parent has and the file
FINE = (CheckpointError, ValueError)  # what the command line prints as one line; DataError is one
EXTREME: list[Any] = [
    None, True, -1, 0, 1, 10**7, 10**9, 2**63, 10**30, 0.5, float("nan"), float("inf"), "", "x", "../x", [], [[]], {},
    [1] * 10**5, [10**6], [1, 2, 4, 8], {"a": 1}, "x" * 10**5,
]  # fmt: skip

Use = Callable[[Path], object]  # of a folder with one file mutated


def use_folder(folder: Path) -> None:
    describe_model(folder)
    answer(var_ext.load(folder, precision="fp32"))


def use_pth(folder: Path) -> None:
    convert(folder / "vae.pth", folder / "var.pth", folder / "out")


def use_checkpoint(folder: Path) -> None:
    kept_weights(folder / "last.ckpt")
    load_checkpoint(folder / "last.ckpt", {"recipe": {"epochs": 3}})


def use_tokens(folder: Path) -> None:
    vae = tiny()[0]
    for split in ("train", "val"):
        stored = StoredTokens(vae, TokenData(f"tokens:{folder}", split, vae))
        list(stored.feed(0, [torch.arange(3)]))


def use_export(folder: Path) -> None:
    plan = Plan((0, 1, 2, 3), (0, 1, 2, 3), batch_size=2)
    place = Npz(folder / "images.npz", plan, 8)
    if all(place.complete(part) for part in plan.parts):
        place.finish()


def use_archive(folder: Path) -> None:
    for name in ("arr_0", "x"):
        Member(folder / "x.npz", name)[:3]


def use_picture(folder: Path) -> None:
    (file,) = folder.iterdir()
    for read in (check_picture, read_rgb, read_published):
        read(file)


def seeds(root: Path) -> list[tuple[Path, str, Use]]:
    """Good files: the folder, the name of the one to mutate, and what reads it."""
    vae, var = tiny()
    found: list[tuple[Path, str, Use]] = []
    save_model(root / "model", vae, var, class_names=list("abcde"), sampling={"cfg": 1.5})
    found += [
        (root / "model", name, use_folder) for name in ("config.json", "vae.safetensors", "var.safetensors")
    ]
    found += [found[0]] * 2  # where most depends on the bytes
    for name, zipped in (("pth", True), ("older", False)):
        (root / name).mkdir()
        for file, model in (("vae", vae), ("var", var)):
            torch.save(model.state_dict(), root / name / f"{file}.pth", _use_new_zipfile_serialization=zipped)
            found.append((root / name, f"{file}.pth", use_pth))
    (root / "run").mkdir()
    state = {"task": {"model": var.state_dict(), "ema": None}, "best": None, "halvings": 0}
    content = {"format": FORMAT, "pins": {"recipe": {"epochs": 3}}, "step": 1, "world": 1, "folder": None}
    torch.save({**content, "state": state}, root / "run" / "last.ckpt")
    found.append((root / "run", "last.ckpt", use_checkpoint))
    splits = {}
    (root / "tokens").mkdir()
    for split in ("train", "val"):
        np.save(root / "tokens" / f"{split}.npy", np.ones((6, 2, 21), np.int16))
        splits[split] = TokenSplit([root / "tokens" / f"{split}.npy"], torch.arange(6) % 5, {})
    write_token_set(root / "tokens", vae, list("abcde"), splits)
    found += [(root / "tokens", name, use_tokens) for name in (NAME, "train.npy", "labels-val.npy")]
    plan = Plan((0, 1, 2, 3), (0, 1, 2, 3), batch_size=2)
    place = Npz(root / "export" / "images.npz", plan, 8)
    for part in plan.parts:
        place.write(part, np.zeros((2, 8, 8, 3), np.uint8))
    found += [
        (root / "export", f"images.npz.parts/{place.part(part).name}", use_export) for part in plan.parts
    ]
    (root / "archive").mkdir()
    np.savez(root / "archive" / "x.npz", arr_0=np.zeros((5, 4)), x=np.arange(6))
    found.append((root / "archive", "x.npz", use_archive))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 30, 3)).astype(np.uint8))
    for kind in ("png", "jpg", "gif", "webp", "bmp", "tif", "ppm"):
        (root / kind).mkdir()
        picture.save(root / kind / f"x.{kind}")
        found.append((root / kind, f"x.{kind}", use_picture))
    return found


def mutated(data: bytes, name: str, draw: random.Random) -> bytes:
    """A copy with one to four faults, most of them where the header is."""
    if name.endswith(".json") and draw.random() < 0.7:
        return _json_mutated(json.loads(data), draw)
    found = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        end = len(found) if draw.random() < 0.4 else min(len(found), 2000)
        tail = draw.random() < 0.2  # a zip's directory is there
        at = max(0, len(found) - draw.randint(1, 400)) if tail else draw.randrange(max(end, 1))
        match draw.randrange(6):
            case 0 | 1 if found:
                found[min(at, len(found) - 1)] ^= 1 << draw.randrange(8)
            case 2:
                found[at : at + draw.choice((1, 2, 4, 8))] = draw.randbytes(draw.choice((1, 2, 4, 8)))
            case 3:
                found[at : at + 8] = draw.choice((b"\xff" * 8, bytes(8), b"\x7f" + b"\xff" * 7, b"[" * 8))
            case 4:
                del found[at : at + draw.randint(1, 2000)]
            case _:
                found[at:at] = found[at : at + draw.randint(1, 100)]
    return bytes(found)


def _json_mutated(value: Any, draw: random.Random) -> bytes:
    """One to three values replaced, or a value buried in lists."""
    for _ in range(draw.randint(1, 3)):
        level = value
        while level:
            key = draw.choice(list(level) if isinstance(level, dict) else range(len(level)))
            if isinstance(level[key], dict | list) and level[key] and draw.random() < 0.8:
                level = level[key]
                continue
            level[key] = copy.deepcopy(draw.choice(EXTREME))  # or the next fault changes the list itself
            break
    text = json.dumps(value)
    if draw.random() < 0.05:
        text = text.replace("null", "[" * 10**5 + "]" * 10**5, 1)
    return text.encode()


def run(use: Use, folder: Path, size: int) -> str:
    """What came of it in a process of its own: "" where all is well, else the fault."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        _child(use, folder, size, writer)
    os.close(writer)
    with os.fdopen(reader, "rb") as told:
        said = told.read().decode(errors="replace")
    _, status, used = os.wait4(child, 0)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return (
            "hang" if number in (signal.SIGXCPU, signal.SIGALRM) else f"crash: {signal.Signals(number).name}"
        )
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if (used.ru_maxrss - own) * 1024 > MEMORY + size:
        return f"memory: {used.ru_maxrss >> 10} MB"
    return said


def _child(use: Use, folder: Path, size: int, writer: int) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    # a guard: what is touched is judged in `run`
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 6 * MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (HANG, HANG + 1))
    signal.alarm(12 * HANG)  # of the clock: other processes may have the cores
    try:
        use(folder)
    except FINE as error:
        if isinstance(error, UnicodeError | json.JSONDecodeError):  # of Python, not of this project
            os.write(writer, f"traceback: {type(error).__name__}: {error}"[:300].encode())
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = (
            f"traceback: {type(error).__name__}: {error} ({place.filename.rsplit('/', 1)[-1]}:{place.lineno})"
        )
        os.write(writer, text[:300].encode())
    os._exit(0)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--cases", type=int, default=10**9, help="at most so many, whatever time is left")
    parser.add_argument("--only", type=int, help="this case alone")
    parser.add_argument("--keep", type=Path, help="folder for the files of faults")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # threads do not survive a fork
    root = Path(tempfile.mkdtemp(prefix="fuzz-files-"))
    faults: Counter[str] = Counter()
    count = 0
    try:
        good = seeds(root / "good")
        end = time.monotonic() + options.seconds
        while time.monotonic() < end and count < options.cases:
            case = count if options.only is None else options.only
            draw = random.Random(f"{options.seed} {case}")
            folder, name, use = draw.choice(good)
            work = root / "work"
            shutil.copytree(folder, work)
            data = mutated((work / name).read_bytes(), name, draw)
            (work / name).write_bytes(data)
            before = {path.name for path in root.iterdir()}
            fault = run(use, work, len(data))
            if {path.name for path in root.iterdir()} != before:
                fault = fault or "written outside"
            if fault:
                faults[f"{use.__name__} {fault}"] += 1
                print(f"case {case}, {name}: {fault}", flush=True)
                if options.keep:
                    options.keep.mkdir(parents=True, exist_ok=True)
                    shutil.copy(work / name, options.keep / f"{options.seed}-{case}-{Path(name).name}")
            shutil.rmtree(work)
            count += 1
            if options.only is not None:
                break
    finally:
        shutil.rmtree(root, ignore_errors=True)
    kinds = Counter(fault.split()[1].rstrip(":") for fault in faults.elements())
    print(f"{count} files under seed {options.seed}: {dict(kinds) or 'no fault'}")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
