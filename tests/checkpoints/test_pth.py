"""Published .pth files: sizes from shapes, conversion, and files that are damaged, foreign or carry code."""

import gzip
import json
import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import var_ext
from tests.tiny import SCALES, answer, tiny
from var_ext.checkpoints import CheckpointError, convert, load_published, load_tokenizer
from var_ext.checkpoints.pth import read_pth
from var_ext.checkpoints.released import MODELS, published_config
from var_ext.checkpoints.sizes import deduce_vae, deduce_var
from var_ext.models import VQVAE
from var_ext.sampling import Sampler

GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    return answer(Sampler(*tiny()))


@pytest.fixture
def pth_files(tmp_path: Path) -> tuple[Path, Path]:
    vae, var = tiny()
    torch.save(vae.state_dict(), tmp_path / "vae.pth")
    torch.save(var.state_dict(), tmp_path / "var.pth")
    return tmp_path / "vae.pth", tmp_path / "var.pth"


def official_entries(name: str) -> dict[str, torch.Tensor]:
    with gzip.open(GOLDEN / "official_checkpoints.json.gz", "rt") as file:
        entries = json.load(file)[name]
    return {
        key: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        for key, (shape, dtype) in entries.items()
    }


@pytest.mark.parametrize("depth", MODELS.values())
def test_sizes_of_published_transformers_follow_from_shapes(depth: int) -> None:
    assert deduce_var(official_entries(f"var_d{depth}"), "file") == published_config(depth)["var"]


def test_sizes_of_the_published_tokenizer_follow_from_shapes() -> None:
    deduced = deduce_vae(official_entries("vae_ch160v4096z32"), None, "file")
    assert deduced == {**deduced, **published_config(16)["vae"]}


def test_published_config_of_no_model() -> None:
    with pytest.raises(ValueError, match="depth must be one of 16, 20, 24, 30, 36, got 12"):
        published_config(12)


@pytest.mark.parametrize("share", [0, 1, 2, 4])
@pytest.mark.parametrize(("shared_aln", "attn_l2_norm"), [(False, True), (True, True), (False, False)])
def test_convert_deduces_every_size(tmp_path: Path, share: int, shared_aln: bool, attn_l2_norm: bool) -> None:
    vae, var = tiny(1, share=share, patch_nums=(1, 3, 4), shared_aln=shared_aln, attn_l2_norm=attn_l2_norm)
    torch.save(vae.state_dict(), tmp_path / "a.pth")
    torch.save(OrderedDict(var.state_dict()), tmp_path / "b.pth")
    sampler = var_ext.load(convert(tmp_path / "a.pth", tmp_path / "b.pth", tmp_path / "out"))
    assert sampler.vae.schedule.patch_nums == (1, 3, 4)
    assert answer(sampler) == answer(Sampler(vae, var))
    assert torch.equal(sampler([1], [2]), Sampler(vae, var)([1], [2]))


def test_published_trainer_checkpoint_has_both(tmp_path: Path, expected: list[list[int]]) -> None:
    vae, var = tiny()
    trainer = {
        "config": {"patch_nums": SCALES},
        "vae_local": vae.state_dict(),
        "var_wo_ddp": var.state_dict(),
    }
    torch.save(
        {"epoch": 3, "iter": 0, "trainer": trainer, "args": {"depth": 2}}, tmp_path / "ar-ckpt-last.pth"
    )
    assert answer(var_ext.load(convert(tmp_path / "ar-ckpt-last.pth", None, tmp_path / "out"))) == expected


def test_older_and_half_precision_pth_files(tmp_path: Path, pth_files: tuple[Path, Path]) -> None:
    vae, var = tiny()
    torch.save(vae.state_dict(), pth_files[0], _use_new_zipfile_serialization=False)
    torch.save(var.half().state_dict(), pth_files[1])
    loaded_vae, loaded_var = load_published(*pth_files)
    assert torch.equal(loaded_vae.quantize.embedding.weight, vae.quantize.embedding.weight)
    assert torch.equal(loaded_var.head.weight, var.head.weight.float())


def test_tokenizer_converted_alone_for_other_scales(tmp_path: Path, pth_files: tuple[Path, Path]) -> None:
    with pytest.raises(CheckpointError, match=r"vae\.pth has 3 scales: patch_nums must name their sides"):
        convert(pth_files[0], None, tmp_path / "out")
    vae = load_tokenizer(convert(pth_files[0], None, tmp_path / "out", patch_nums=(1, 2, 3, 4)))
    assert vae.schedule.patch_nums == (1, 2, 3, 4)
    assert vae.quantize.ema_vocab_hit_SV.shape == (4, 16)


def test_scales_that_do_not_fit(tmp_path: Path, pth_files: tuple[Path, Path]) -> None:
    with pytest.raises(
        CheckpointError, match=r"21 positions in 3 scales: patch_nums must .* got \(1, 2, 3\)"
    ):
        load_published(*pth_files, patch_nums=(1, 2, 3))


def test_files_in_the_wrong_order_or_missing(pth_files: tuple[Path, Path], tmp_path: Path) -> None:
    vae_pth, var_pth = pth_files
    with pytest.raises(CheckpointError, match=r"vae\.pth must hold a transformer"):
        load_published(var_pth, vae_pth)
    with pytest.raises(CheckpointError, match=r"var\.pth must hold a tokenizer"):
        load_published(var_pth, None)
    with pytest.raises(CheckpointError, match="give the file of the transformer too"):
        load_published(vae_pth, patch_nums=SCALES)
    with pytest.raises(CheckpointError, match=r"could not read .*nothing\.pth"):
        load_published(tmp_path / "nothing.pth", var_pth)


def test_transformer_of_another_tokenizer(tmp_path: Path, pth_files: tuple[Path, Path]) -> None:
    other = VQVAE(vocab_size=32, z_channels=8, ch=32, ch_mult=(1, 2), v_patch_nums=SCALES)
    torch.save(other.state_dict(), pth_files[0])
    with pytest.raises(CheckpointError, match=r"var\.pth .* head\.weight \(wanted \(32, 64\)"):
        load_published(*pth_files)


class _Payload:
    """Unpickled, it would make a file: the harmless kind of what a `.pth` can do."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_pth_that_carries_code_is_refused_and_not_run(tmp_path: Path, zipped: bool) -> None:
    content = {**tiny()[0].state_dict(), "payload": _Payload(tmp_path / "ran")}
    torch.save(content, tmp_path / "bad.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        CheckpointError,
        match=r"bad\.pth .* asks for the Python object \w+\.mkdir: refused by .*nothing in it was run",
    ):
        read_pth(tmp_path / "bad.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kept", [0, 10, 28, 49, 140, 1000, -200])
def test_truncated_pth(pth_files: tuple[Path, Path], kept: int, zipped: bool) -> None:
    # The older format ends in a struct.error at 28 bytes, in an IndexError at 49, in a name of nothing at 140.
    torch.save(tiny()[0].state_dict(), pth_files[0], _use_new_zipfile_serialization=zipped)
    pth_files[0].write_bytes(pth_files[0].read_bytes()[:kept])
    with pytest.raises(
        CheckpointError, match=r"vae\.pth must be a .*file written by torch\.save.* but .*cut short"
    ):
        read_pth(pth_files[0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"a.weight": torch.zeros(2), "b": torch.zeros(1)},
            r"must hold the entries of a VQVAE .* got the names a\.weight, b",
        ),
        ([torch.zeros(2)], "got a list"),
        (torch.zeros(2), "got a Tensor"),
        ({"pos_1LC": 3}, "must hold a model as named tensors, got int 'pos_1LC'"),
        ({"pos_1LC": torch.zeros(1, 5, 8), 7: torch.zeros(1)}, "as named tensors, got Tensor 7"),
        ({"vae_local": 5}, "must hold a model as named tensors, got int"),
        ({"trainer": {"vae_local": {}, "var_wo_ddp": [1]}}, "must hold a model as named tensors, got list"),
        ({"var_wo_ddp": None, "vae_local": None}, "got the names var_wo_ddp, vae_local"),
        (
            {"pos_1LC": torch.zeros(1, 5, 8)},
            r"must have an entry lvl_embed\.weight with 2 dimensions .*, got no such entry",
        ),
        ({"pos_1LC": torch.zeros(5)}, r"an entry pos_1LC with 3 dimensions .*, got shape \(5,\)"),
        ({"pos_1LC": torch.zeros(1, 5, 0)}, r"pos_1LC .* and no empty one, got shape \(1, 5, 0\)"),
    ],
)
def test_foreign_pth(tmp_path: Path, pth_files: tuple[Path, Path], content: object, message: str) -> None:
    torch.save(content, tmp_path / "foreign.pth")
    with pytest.raises(CheckpointError, match=message):
        load_published(pth_files[0], tmp_path / "foreign.pth")


@pytest.mark.parametrize(
    ("levels", "came"),
    [
        (torch.full((1, 21), -1), r"-1\.\.-1"),
        (torch.full((1, 21), 3), r"3\.\.3"),
        (torch.zeros(1, 21), r"torch\.float32"),
    ],
)
def test_scales_of_positions_out_of_range(
    pth_files: tuple[Path, Path], levels: torch.Tensor, came: str
) -> None:
    torch.save({**tiny()[1].state_dict(), "lvl_1L": levels}, pth_files[1])
    with pytest.raises(CheckpointError, match=rf"var\.pth must have lvl_1L of int64 in 0\.\.2, got {came}"):
        load_published(*pth_files)


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"\x80\x02}q\x00.", b"PK\x03\x04 not a zip", bytes(range(256)) * 9]
)
def test_file_that_is_no_pth(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "text.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"text\.pth must "):
        read_pth(tmp_path / "text.pth")
    with pytest.raises(CheckpointError, match="could not read"):
        read_pth(tmp_path)
