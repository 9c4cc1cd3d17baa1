"""Published checkpoints load with strict=True: the same entries, shapes and dtypes for all six files."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from var_ext.models import build_vae_var
from var_ext.schedule import SCALES_256, SCALES_512

PACKED = Path(__file__).parents[1] / "golden" / "official_checkpoints.json.gz"
ENTRIES = json.loads(gzip.decompress(PACKED.read_bytes()))
DEPTHS = {"var_d16": 16, "var_d20": 20, "var_d24": 24, "var_d30": 30, "var_d36": 36}


def entries(model: torch.nn.Module) -> dict[str, list]:
    return {
        name: [list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]
        for name, tensor in model.state_dict().items()
    }


def wanted(file: str) -> dict[str, list]:
    return {
        name: [list(shape), dtype.removeprefix("torch.")] for name, (shape, dtype) in ENTRIES[file].items()
    }


@pytest.mark.parametrize("file", DEPTHS)
def test_transformers_have_the_published_entries(file):
    depth = DEPTHS[file]
    with torch.device("meta"):
        _, var = build_vae_var(
            "meta", patch_nums=SCALES_512 if depth == 36 else SCALES_256, depth=depth, shared_aln=depth == 36
        )
    assert entries(var) == wanted(file)


def test_the_tokenizer_has_the_published_entries():
    with torch.device("meta"):
        vae, _ = build_vae_var("meta", depth=1)
    assert entries(vae) == wanted("vae_ch160v4096z32")


def test_all_published_files_are_covered():
    assert set(ENTRIES) == {*DEPTHS, "vae_ch160v4096z32"}


@pytest.mark.parametrize(("sharing", "names"), [(0, "quant_resi.2.weight"), (1, "quant_resi.qresi.weight")])
def test_other_sharings_of_phi_keep_the_published_names(sharing, names):
    with torch.device("meta"):
        vae, _ = build_vae_var("meta", patch_nums=(1, 2, 4), share_quant_resi=sharing, depth=1)
    assert f"quantize.{names}" in vae.state_dict()
