"""A picture file as a viewer shows it: metadata never fails it, and no depth turns it black."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.pictures import chunk, exif, png
from var_ext.data import DataError
from var_ext.data.reading import check_picture, read_picture, read_rgb

GRAY = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20


def picture(path: Path) -> np.ndarray:
    check_picture(path)
    return np.asarray(read_rgb(path))


# ---------------------------------------------------------------------- metadata


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_each_turn_is_obeyed(tmp_path: Path, suffix: str, turn: int) -> None:
    pixels = np.zeros((32, 48), np.uint8)
    pixels[:16, :16] = 255  # where the corner goes tells all turns apart, and so does the shape
    pixels[:16, 16:32] = 128
    tags = Image.Exif()
    tags[0x0112] = turn
    Image.fromarray(pixels).save(tmp_path / f"a{suffix}", exif=tags)
    upright = {
        1: pixels, 2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1],
        5: pixels.T, 6: pixels[::-1].T, 7: pixels[::-1, ::-1].T, 8: pixels.T[::-1],
    }[turn]  # fmt: skip
    found = picture(tmp_path / f"a{suffix}")[..., 0]
    # lossy formats ring near edges; the middles of the blocks tell
    assert found.shape == upright.shape
    assert np.abs(found[8::16, 8::16].astype(int) - upright[8::16, 8::16]).max() <= 8


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
@pytest.mark.parametrize(("numerator", "denominator"), [(-1, 0), (-5, 3), (0, 0)])
def test_a_damaged_rational_is_no_fault_of_the_picture(
    tmp_path: Path, suffix: str, numerator: int, denominator: int
) -> None:
    path = tmp_path / f"a{suffix}"
    Image.new("RGB", (18, 12)).save(path, exif=exif(6, numerator=numerator, denominator=denominator))
    assert picture(path).shape == (18, 12, 3)


def segment(marker: int, data: bytes) -> bytes:
    return bytes((0xFF, marker)) + struct.pack(">H", len(data) + 2) + data


@pytest.mark.parametrize(
    "metadata",
    [
        segment(0xE1, b"Exif\0\0garbage"),
        segment(0xE0, b"JFIF\0"),
        segment(0xEE, b"Adobe\0"),
        segment(0xE2, b"MPF\0II*\0\x08\0\0\0\x01\0"),
        segment(0xED, b"Photoshop 3.0\x008BIM\x03\xed\0\0\0\0\0\x02aa"),
    ],
    ids=["exif", "jfif", "adobe", "mpf", "photoshop"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about what is damaged
def test_damaged_segments_of_a_jpeg(tmp_path: Path, metadata: bytes) -> None:
    path = tmp_path / "a.jpg"
    Image.new("RGB", (18, 12), (200, 10, 10)).save(path)
    plain, data = picture(path), path.read_bytes()
    path.write_bytes(data[:2] + metadata + data[2:])
    assert np.array_equal(picture(path), plain)


LONG_TEXT = zlib.compress(b"prompt " * 300_000)  # 2 MB: more than Pillow unpacks


@pytest.mark.parametrize(
    "metadata",
    [
        chunk(b"eXIf", b"garbage"),
        chunk(b"zTXt", b"workflow\0\0" + LONG_TEXT),
        chunk(b"iTXt", b"workflow\0\1\0\0\0" + LONG_TEXT),
        chunk(b"iCCP", b"icc\0\7not a profile"),
        chunk(b"pHYs", b"\0"),
        chunk(b"gAMA"),
        chunk(b"acTL", b"\0"),
        chunk(b"tEXt", b"a\0b")[:-4] + bytes(4),  # a wrong checksum
    ],
    ids=["exif", "long text", "long international text", "profile", "size", "gamma", "frames", "checksum"],
)
@pytest.mark.parametrize("place", ["early", "late"])
def test_damaged_chunks_of_a_png(tmp_path: Path, metadata: bytes, place: str) -> None:
    (tmp_path / "a.png").write_bytes(png(GRAY, **{place: metadata}))
    assert np.array_equal(picture(tmp_path / "a.png")[..., 1], GRAY)


def test_a_turn_outlives_the_damage_beside_it(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(GRAY, chunk(b"pHYs") + chunk(b"eXIf", exif(6)[6:])))
    assert np.array_equal(picture(tmp_path / "a.png")[..., 1], GRAY[::-1].T)


# ---------------------------------------------------------------------- what fails is seen before


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp", ".tif", ".ppm"])
def test_a_file_that_is_cut_short_is_seen_before_it_is_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    check_picture(path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match=rf"wanted a readable image, got .*a{suffix}"):
        check_picture(path)


def test_a_whole_file_is_not_decoded_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("var_ext.data.reading._upright", lambda _: pytest.fail("decoded"))
    for suffix in (".png", ".jpg", ".webp"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"a{suffix}")
        check_picture(tmp_path / f"a{suffix}")


# ---------------------------------------------------------------------- depths

UNIT = np.linspace(0, 1, 12).reshape(3, 4)
BYTES = (UNIT * 255).round()
WIDE = (UNIT * 65535).round()


def pgm(values: np.ndarray, white: int) -> bytes:
    return b"P5 4 3 %d\n" % white + values.astype(">u2").tobytes()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("unit.tif", UNIT.astype(np.float32)),
        ("bytes.tif", BYTES.astype(np.float32)),
        ("small32.tif", BYTES.astype(np.int32)),
        ("wide32.tif", WIDE.astype(np.int32)),
        ("wide16.tif", WIDE.astype(np.uint16)),
        ("wide16.png", WIDE.astype(np.uint16)),
        ("wide.pgm", pgm(WIDE, 65535)),
        ("ten.pgm", pgm((UNIT * 1023).round(), 1023)),
        ("float.pfm", b"Pf\n4 3\n-1.0\n" + UNIT.astype("<f4")[::-1].tobytes()),
    ],
)
def test_gray_of_any_depth_is_scaled(tmp_path: Path, name: str, content: np.ndarray | bytes) -> None:
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        Image.fromarray(content).save(tmp_path / name)
    assert np.abs(picture(tmp_path / name)[..., 0] - BYTES).max() <= (1 if name == "ten.pgm" else 0)


def test_integers_of_zero_and_one_are_black_and_white(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 1]], np.int32)).save(tmp_path / "a.tif")
    assert picture(tmp_path / "a.tif")[0, :, 0].tolist() == [0, 255]


def test_a_dark_pgm_stays_dark(tmp_path: Path) -> None:
    (tmp_path / "a.pgm").write_bytes(pgm(np.full((3, 4), 200), 65535))
    assert picture(tmp_path / "a.pgm").max() == 1


@pytest.mark.parametrize(
    ("values", "came"),
    [
        (np.array([[-1, 5]], np.int32), "-1 to 5"),
        (np.array([[0, 70000]], np.int32), "0 to 70000"),
        (np.array([[0, 1.5]], np.float32), "0.0 to 1.5"),
        (np.array([[0, 256.5]], np.float32), "0.0 to 256.5"),
        (np.array([[0, np.nan]], np.float32), "nan to nan"),
    ],
)
def test_gray_of_unknown_scale_is_refused_before_it_is_read(
    tmp_path: Path, values: np.ndarray, came: str
) -> None:
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(
        DataError, match=rf"a\.tif: gray values in 0..1, .* it has {came}: scale or clip them"
    ):
        check_picture(tmp_path / "a.tif")


@pytest.mark.parametrize("dark", [False, True])
def test_transparency_of_sixteen_bits(tmp_path: Path, dark: bool) -> None:
    values = np.array([[0, 300, 65535]], np.uint16)
    clear = 0 if dark else 65535
    (tmp_path / "a.png").write_bytes(png(values, chunk(b"tRNS", struct.pack(">H", clear))))
    image = read_picture(tmp_path / "a.png")
    assert image.mode == "RGBA"
    assert np.asarray(image)[0].tolist() == [
        [g, g, g, 255 * (v != clear)] for g, v in ((0, 0), (1, 300), (255, 65535))
    ]
    assert picture(tmp_path / "a.png")[0, :, 0].tolist() == [255 if dark else 0, 1, 255]


def test_home_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    Image.new("L", (4, 4), 7).save(tmp_path / "a.png")
    assert picture(Path("~/a.png")).max() == 7
