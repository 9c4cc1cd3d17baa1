"""What the columns of a table of runs are: names, units and what they stand for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

# The names by which a column is known, as they are once a header is in lower case with _ between its words.
ALIASES = {
    "size": ("size", "n", "params", "parameters", "num_params", "n_params", "num_parameters", "model_size"),
    "flops": ("flops", "flop", "c", "compute", "total_flops", "train_flops", "training_flops"),
    "tokens": ("tokens", "num_tokens", "train_tokens", "training_tokens", "tokens_seen"),
    "images": ("images", "num_images", "samples", "images_seen"),
    "step": ("step", "steps", "iteration", "iter"),
    "seed": ("seed",),
    "run": ("run", "name", "run_name", "model"),
}
LOSSES = (
    "loss_avg, loss_last, loss_s1, loss_s2 ..., err_avg, err_last, err_s1 ... (of held-out tokens: all, the last "
    "scale, each scale), and NAME_se for its standard error over validation subsets"
)
_LOSS = re.compile(
    r"(?:val_|test_)?(?P<what>loss|l|ce|cross_entropy|err|error|token_error)"
    r"(?:_(?P<where>avg|average|mean|all|last|last_scale|tail|(?:s|scale)_?\d+))?(?P<se>_se|_stderr)?"
)
_SCALES = {"k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12, "p": 1e15, "e": 1e18}
_WORDS = {"thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12}
_COUNTED = ("size", "flops", "tokens", "images")
_LOSS_UNITS = {"nats": 1.0, "nat": 1.0, "bits": float(np.log(2)), "bit": float(np.log(2))}
_ERROR_UNITS = {"%": 1.0, "percent": 1.0, "pct": 1.0, "fraction": 100.0, "share": 100.0}
KNOWN = (*ALIASES, "loss_NAME", "err_NAME")


@dataclass(frozen=True)
class Column:
    """A column: where it stands, its header, and what its numbers are multiplied by (None: no unit was given)."""

    index: int
    header: str
    factor: float | None = None

    def __str__(self) -> str:
        return repr(self.header)


def find_columns(header: Sequence[str], chosen: Mapping[str, str]) -> dict[str, Column]:
    """The columns that are known, by name: those of `ALIASES`, and losses as in `LOSSES`.

    Args:
        header: as it stands in the file; units in brackets, "params [M]" or "flops (PFLOP)", or after _, "flops_P".
        chosen: name to header, or to HEADER:UNIT, for columns of other names.

    Raises:
        ValueError: a chosen name or header that is not there, an unknown unit, two columns of one name.
    """
    found: dict[str, Column] = {}
    for name, wanted in chosen.items():
        if name not in ALIASES and _loss_name(name) != name:
            raise ValueError(
                f"a column must be chosen as one of {', '.join(KNOWN)}, got {name!r}; losses: {LOSSES}"
            )
        head, colon, unit = wanted.rpartition(":")
        split = wanted not in header and bool(colon)
        asked = head if split else wanted
        if asked not in header:
            raise ValueError(f"no column {asked!r} for {name}: there are {', '.join(map(repr, header))}")
        unit = unit if split else _bracketed(asked)[1]
        found[name] = Column(header.index(asked), asked, _factor(name, unit, asked))
    for index, text in enumerate(header):
        name_, unit = _known(text)
        if name_ is None or name_ in chosen or index in {column.index for column in found.values()}:
            continue
        if name_ in found:
            raise ValueError(
                f"both {found[name_]} and {text!r} are {name_}: choose with --column {name_}=HEADER, or rename one"
            )
        found[name_] = Column(index, text, _factor(name_, unit, text))
    return found


def _known(text: str) -> tuple[str | None, str]:
    """Name and unit of a header; name None: not known."""
    bare, unit = _bracketed(text)
    words = re.sub(r"[^a-z0-9%]+", "_", bare.lower()).strip("_")
    if prefixed := re.fullmatch(r"([kmgtpe])flops?", words):
        words, unit = "flops", prefixed[1]
    if (name := _name(words)) or unit:
        return name, unit
    head, _, tail = words.rpartition("_")  # flops_P, err_avg_pct
    name = _name(head)
    known = _SCALES if name in _COUNTED else {**_LOSS_UNITS, **_ERROR_UNITS}
    return (name, tail) if name and tail in known else (None, "")


def _bracketed(text: str) -> tuple[str, str]:
    """ "params [M]" into its name and its unit; a bare % ends a name too."""
    if match := re.fullmatch(r"(.*?)\s*[\[(]([^\])]*)[\])]\s*", text):
        return match[1], match[2].strip().lower()
    return (text.rstrip()[:-1], "%") if text.rstrip().endswith("%") else (text, "")


def _name(words: str) -> str | None:
    return next((name for name, aliases in ALIASES.items() if words in aliases), None) or _loss_name(words)


def _loss_name(words: str) -> str | None:
    match = _LOSS.fullmatch(words)
    if match is None:
        return None
    what = "err" if match["what"] in ("err", "error", "token_error") else "loss"
    where = match["where"] or "avg"
    if digits := re.search(r"\d+", where):
        where = f"s{int(digits[0])}"
    else:
        where = "last" if where in ("last", "last_scale", "tail") else "avg"
    return f"{what}_{where}" + ("_se" if match["se"] else "")


def _factor(name: str, unit: str, header: str) -> float | None:
    if not unit:
        return None
    unit = unit.lower()
    if name in _COUNTED:
        word = re.sub(r"\s*(flops?|params?|parameters|tokens|images)$", "", unit)
        plain = word.removesuffix("s")
        scale = 1.0 if not word else _SCALES.get(word) or _WORDS.get(plain)
        known = "k, M, B (or G), T, P, E, or thousand to trillion"
    else:
        units = _ERROR_UNITS if name.startswith("err") else _LOSS_UNITS if name.startswith("loss") else {}
        scale, known = units.get(unit), ", ".join(units) or "none"
    if scale is None:
        raise ValueError(f"the unit {unit!r} of column {header!r} is not known: for {name} there are {known}")
    return scale
