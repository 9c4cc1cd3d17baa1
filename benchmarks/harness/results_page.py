"""RESULTS.md: its parts, tables and figures."""

from __future__ import annotations

import re
from collections.abc import Mapping

from harness.report import FOLDER, Report


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * factor >= 1 or unit == "µs":
            value = seconds * factor
            return f"{value:.{max(0, 2 - len(str(int(value))) + 1)}f} {unit}"
    raise AssertionError("unreachable: the last unit takes all")


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """A table, numbers right-aligned."""
    rule = ["---", *("---:" for _ in columns[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in (columns, rule, *rows))


def listing(facts: Mapping[str, str]) -> str:
    """A table without a head: names and what they are."""
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {text} |" for name, text in facts.items())])


def provenance(about: Report) -> dict[str, str]:
    """Where figures come from, for `listing`."""
    changed = {True: " with uncommitted changes", False: "", None: ", changes unknown"}[about["dirty"]]
    names = dict(var_ext="var_ext", torch="torch", diffusers="diffusers", python="Python")
    busy = " (**busy: do not trust these figures**)" if about["load"] > about["threads"] / 2 else ""
    return {
        "machine": f"{about['chip']}, {about['threads']} threads",
        "date": about["date"][:10],
        "versions": ", ".join(f"{name} {about[key]}" for key, name in names.items() if key in about),
        "commit": f"`{(about['commit'] or 'unknown')[:12]}`{changed}",
        "load": f"{about['load']:.1f} processes in the minute before{busy}",
    }


def put(page: str, section: str) -> str:
    """The page with a part in place of the one of the same title, its first line; or at the end."""
    title = section.partition("\n")[0]
    parts = [part.strip("\n") for part in re.split(r"^(?=# )", page, flags=re.MULTILINE) if part.strip()]
    titles = [part.partition("\n")[0] for part in parts]
    at = titles.index(title) if title in titles else len(parts)
    return "\n\n".join([*parts[:at], section.strip("\n"), *parts[at + 1 :]]) + "\n"


def rewrite(section: str) -> None:
    """Writes a part of RESULTS.md anew."""
    page = FOLDER / "RESULTS.md"
    page.write_text(put(page.read_text(encoding="utf-8"), section), encoding="utf-8")
    print(f"wrote {page}")
