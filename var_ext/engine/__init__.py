"""The sampling engine: one loop over scales behind `Sampler`, `VAR.autoregressive_infer_cfg` and `accelerate`.

It reads models by the published names of their parts and knows no model class. `precision` says in which arithmetic,
`options` what is drawn, `draw` from which random stream; `transformer`, `decoder` and `layers` hold the weights as they
are used; `engine` runs them, `graph` as one captured CUDA graph.
"""

from var_ext.engine.draw import Draw, PublishedDraw, SeededDraw
from var_ext.engine.engine import Engine
from var_ext.engine.graph import Graphs
from var_ext.engine.layers import is_plain, spread_taps
from var_ext.engine.options import Options, options_for
from var_ext.engine.precision import NAMES as PRECISIONS
from var_ext.engine.precision import Precision, default_precision, named_precision, precision_in_force
from var_ext.engine.published import published_sample

__all__ = [
    "PRECISIONS",
    "Draw",
    "Engine",
    "Graphs",
    "Options",
    "Precision",
    "PublishedDraw",
    "SeededDraw",
    "default_precision",
    "is_plain",
    "named_precision",
    "options_for",
    "precision_in_force",
    "published_sample",
    "spread_taps",
]
