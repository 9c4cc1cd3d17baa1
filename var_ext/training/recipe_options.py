"""What a field of a recipe is: a default, a help text, and the values it may have."""

from dataclasses import field
from typing import Any

# Ranges of numbers; a tuple of strings means one of them.
ANY, COUNT, NATURAL, POSITIVE, SHARE, BELOW_ONE = (
    "(-inf, inf)", "[1, inf)", "[0, inf)", "(0, inf)", "[0, 1]", "[0, 1)"
)  # fmt: skip


def option(
    default: Any, text: str, allowed: str | tuple[str, ...] | None = None, *, free: bool = False
) -> Any:
    """A field with a help text and its allowed values (tuples: of each entry), None for any.

    `free` fields change the weights by rounding at most and may differ when a run resumes.
    """
    return field(default=default, metadata={"help": text, "allowed": allowed, "free": free})
