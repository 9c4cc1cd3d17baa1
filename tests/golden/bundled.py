"""Draws a few images of each bundled model in fp32 and prints digests of their tokens, as in bundled.json:

python -m tests.golden.bundled > tests/golden/bundled.json      # after a model was trained anew, and not otherwise
"""

from __future__ import annotations

import hashlib
import json

import var_ext
from var_ext.checkpoints import bundled_models


def digests(name: str) -> list[str]:
    """Of image i with label i and seed 7 i, for all labels."""
    sampler = var_ext.load(name, precision="fp32")
    labels = list(range(sampler.num_classes))
    tokens = sampler.tokens(labels, [7 * label for label in labels])  # (N, L) int64
    return [hashlib.sha256(row.numpy().tobytes()).hexdigest()[:16] for row in tokens]


if __name__ == "__main__":
    print(json.dumps({name: digests(name) for name in bundled_models()}, indent=1))
