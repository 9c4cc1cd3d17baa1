"""What `evaluate_fid` found, as values, JSON and Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class FidReport:
    """
    Attributes:
        figures: name -> value; precision, recall and their kin are shares in [0, 1].
        conventions: what a figure depends on -> how it is here.
        warnings: what makes figures incomparable, each with its remedy.
        facts: of the conventions those that are names and numbers, for JSON: `count`, `digest` and so on; with several
            spaces those of a space are in `spaces`, under the name of its Fréchet distance.
    """

    figures: Mapping[str, float]
    conventions: Mapping[str, str]
    warnings: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "figures": dict(self.figures),
            "facts": dict(self.facts),
            "conventions": dict(self.conventions),
            "warnings": list(self.warnings),
        }

    def as_markdown(self) -> str:
        """Figures, what they depend on, and what to beware of."""
        lines = ["| figure | value |", "| --- | --- |"]
        lines += [f"| {name} | {_shown(value)} |" for name, value in self.figures.items()]
        lines += ["", "| of | convention |", "| --- | --- |"]
        lines += [f"| {name} | {text} |" for name, text in self.conventions.items()]
        if self.warnings:
            lines += ["", *(f"- Beware: {text}." for text in self.warnings)]
        return "\n".join(lines) + "\n"


def _shown(value: float) -> str:
    return f"{value:.4f}" if abs(value) >= 0.01 else f"{value:.3g}"
