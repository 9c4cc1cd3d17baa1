"""Exports many images to disk: resumable, with the same bytes for any number of interruptions and ranks.

plan.py says which images, destinations.py where they go (a folder of PNGs, or one .npz), run.py draws what is missing,
best.py scores candidates first and draws the best of them.
"""

from var_ext.export.best import BestExport, export_best
from var_ext.export.destinations import Folder, Npz, Place, is_npz, place_of, to_uint8
from var_ext.export.plan import Plan, evaluation_plan
from var_ext.export.run import export_images, local_device, rank_and_world
from var_ext.export.waiting import wait_for_files

__all__ = [
    "BestExport",
    "Folder",
    "Npz",
    "Place",
    "Plan",
    "evaluation_plan",
    "export_best",
    "export_images",
    "is_npz",
    "local_device",
    "place_of",
    "rank_and_world",
    "to_uint8",
    "wait_for_files",
]
