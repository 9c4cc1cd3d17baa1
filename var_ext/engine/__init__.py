"""How a model is executed: `engine` samples from a copy of it whose layers are cast, packed or in 8 bits (`execution`,
`layers`), in a precision (`precision`), with options per scale (`options`), from a random stream (`draw`), on a GPU as
one captured graph (`graph`). The network itself is defined in `var_ext.models`.
"""

from var_ext.engine.call import Call
from var_ext.engine.draw import Draw, PublishedDraw, SeededDraw
from var_ext.engine.engine import Engine
from var_ext.engine.graph import Graphs
from var_ext.engine.options import Options, options_for
from var_ext.engine.precision import NAMES as PRECISIONS
from var_ext.engine.precision import Precision, default_precision, named_precision, precision_in_force
from var_ext.engine.published_sampling import published_sample

__all__ = [
    "PRECISIONS",
    "Call",
    "Draw",
    "Engine",
    "Graphs",
    "Options",
    "Precision",
    "PublishedDraw",
    "SeededDraw",
    "default_precision",
    "named_precision",
    "options_for",
    "precision_in_force",
    "published_sample",
]
