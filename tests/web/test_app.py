"""What the page's requests draw, bit for bit, and what they refuse."""

from __future__ import annotations

import io
import json
from base64 import b64decode, b64encode
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient

from tests.data.pictures import PNG_START, chunk
from tests.tiny import tiny
from var_ext import Sampler, to_pil
from var_ext.grid import labelled_grid
from var_ext.show import png
from var_ext.web import Limits, make_app
from var_ext.web.app import FILES, STATIC

DRAW = {"label": 3, "seed": 7}
OPTIONS = {"cfg": 2.5, "top_k": 50, "top_p": 0.9, "temperature": 0.8}


def ask(client: TestClient, what: str, **body: Any) -> list[dict[str, Any]]:
    answer = client.post(f"/api/{what}", json=body)
    assert answer.status_code == 200, answer.text
    return [json.loads(line) for line in answer.text.splitlines()]


def picture(event: dict[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(b64decode(event["image"].removeprefix("data:image/png;base64,"))))


def same(event: dict[str, Any], image: torch.Tensor) -> bool:
    return picture(event).convert("RGB").tobytes() == to_pil(image[None])[0].tobytes()


def encoded(image: Image.Image) -> str:
    return "data:image/png;base64," + b64encode(png(image)).decode()


def edit_of(image: torch.Tensor, mask: torch.Tensor) -> dict[str, str]:
    return {
        "image": encoded(to_pil(image[None])[0]),
        "mask": encoded(Image.fromarray(mask.numpy().astype(np.uint8) * 255)),
    }


@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["defaults", "options"])
def test_a_picture_is_that_of_the_sampler_scale_by_scale(
    client: TestClient, digits: Sampler, options: dict[str, Any]
) -> None:
    queued, *stages, done = ask(client, "draw", **DRAW, **options)
    assert queued == {"event": "queued", "position": 0} and done["event"] == "done"
    assert [event["side"] for event in stages] == list(digits.vae.schedule.patch_nums)
    scales = digits.scales(3, 7, **options)
    assert all(same(event, images[0]) for event, images in zip(stages, scales, strict=True))
    assert same(stages[-1], digits(3, 7, **options)[0])


@pytest.mark.parametrize("paste", [False, True])
def test_a_painted_picture_is_redrawn_as_by_edit(client: TestClient, digits: Sampler, paste: bool) -> None:
    before = torch.from_numpy(np.asarray(to_pil(digits(3, 7))[0]) / np.float32(255)).permute(2, 0, 1)
    mask = torch.zeros(32, 32, dtype=torch.bool)
    mask[:16] = True
    events = ask(client, "edit", label=8, seed=9, **edit_of(before, mask), paste=paste, cfg=2)
    wanted = digits.edit(before, mask, 8, 9, paste=paste, cfg=2)[0]
    assert same(events[-2], wanted) and not same(events[-2], before)


def test_precisions_are_compared(client: TestClient, digits: Sampler) -> None:
    events = ask(client, "compare", **DRAW, precisions=["fp32", "bf16"])[1:-1]
    assert [event["precision"] for event in events] == ["fp32", "bf16"]
    assert same(events[0], digits(3, 7)[0]) and events[0]["off"] == 0
    other = Sampler(digits.vae, digits.var, defaults=digits.defaults, precision="bf16")
    assert same(events[1], other(3, 7)[0]) and events[1]["off"] > 0
    assert all(event["seconds"] > 0 for event in events)


def test_a_batch_with_its_sheet(client: TestClient, digits: Sampler) -> None:
    _, *images, sheet, done = ask(client, "batch", labels=[2, 10], seed=5, count=5, top_p=0.9)
    wanted = digits([2] * 5 + [10] * 5, [*range(5, 10)] * 2, top_p=0.9)
    assert [(event["label"], event["seed"]) for event in images] == [
        (n, s) for n in (2, 10) for s in range(5, 10)
    ]
    assert all(same(event, image) for event, image in zip(images, wanted, strict=True))
    grid = labelled_grid(wanted, [digits.class_names[2], "no class"], list("56789"))
    assert picture(sheet).tobytes() == grid.tobytes() and done["seconds"] > 0


def test_the_model_is_described(client: TestClient, digits: Sampler) -> None:
    told = client.get("/api/model").json()
    assert told["classes"] == digits.class_names and told["side"] == 32 and told["precision"] == "fp32"
    assert told["defaults"]["cfg"] == digits.defaults["cfg"] and {"fp32", "bf16"} <= set(told["precisions"])


def test_the_page_needs_nothing_from_elsewhere(client: TestClient) -> None:
    for path, name in FILES.items():
        answer = client.get(path)
        assert answer.status_code == 200 and answer.content == (STATIC / name).read_bytes()
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "//" not in answer.text.replace("// ", ""), "an address"
    assert client.get("/etc/passwd").status_code == client.get("/page.py").status_code == 404
    assert client.get("/api/draw").status_code == 405


SMALL = encoded(Image.new("RGB", (32, 32)))
WHITE = encoded(Image.new("L", (32, 32), 255))
CUT_HEADER = PNG_START + chunk(b"IHDR", bytes(4)) + chunk(b"IEND")
REFUSED = [
    ("draw", {"label": 11}, "label must be a whole number in 0..10, got 11"),
    ("draw", {"label": True}, "label must be a whole number in 0..10, got True"),
    ("draw", {"seed": None}, "seed must be a whole number in 0..9223372036854775807, got nothing"),
    ("draw", {"seed": -1}, "seed must be"),
    ("draw", {"seed": 1.5}, "seed must be"),
    ("draw", {"cfg": 21}, "cfg must be a number in [0, 20], got 21"),
    ("draw", {"cfg": "2"}, "cfg must be a number"),
    ("draw", {"top_k": 10**30}, "got a huge number"),
    ("draw", {"top_p": -0.1}, "top_p must be a number in [0, 1], got -0.1"),
    ("draw", {"temperature": 0}, "temperature must be a number in [0.05, 10], got 0"),
    ("draw", {"style": 1}, "the request may have label, seed, cfg, top_k, top_p, temperature, got style"),
    ("edit", {"image": SMALL}, "mask must be a PNG of 32 x 32 pixels in base64, got nothing"),
    ("edit", {"image": "x" * 99, "mask": WHITE}, "in base64, got other text"),
    ("edit", {"image": SMALL[:-40] + "=", "mask": WHITE}, "image must be a PNG of 32 x 32 pixels"),
    ("edit", {"image": b64encode(b"no picture").decode(), "mask": WHITE}, "got a file that is none"),
    (
        "edit",
        {"image": b64encode(CUT_HEADER).decode(), "mask": WHITE},
        "image must be a PNG of 32 x 32 pixels",
    ),
    ("edit", {"image": encoded(Image.new("RGB", (32, 33))), "mask": WHITE}, "got 32 x 33"),
    ("edit", {"image": SMALL, "mask": SMALL}, "paint on the picture first"),
    ("edit", {"image": SMALL, "mask": WHITE, "paste": 1}, "paste must be true or false, got 1"),
    ("compare", {"precisions": ["fp64"]}, "precisions must be a list of different ones of fp32, bf16"),
    ("compare", {"precisions": []}, "precisions must be"),
    ("compare", {"precisions": ["fp32", "fp32"]}, "precisions must be"),
]


@pytest.mark.parametrize(("what", "fields", "message"), REFUSED)
def test_refuses_bad_fields(client: TestClient, what: str, fields: dict[str, Any], message: str) -> None:
    answer = client.post(f"/api/{what}", json={**DRAW, **fields})
    assert answer.status_code == 422 and message in answer.json()["message"]
    assert len(answer.json()["message"]) < 300


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"labels": []}, "labels must be a list of 1 to 64"),
        ({"labels": [0] * 65}, "labels must be a list of 1 to 64"),
        ({"labels": [0, 11]}, "labels must be a whole number in 0..10, got 11"),
        ({"count": 0}, "count must be a whole number in 1..64, got 0"),
        ({"labels": [0, 1], "count": 33}, "at most 64 images, got 2 classes of 33: take fewer of either"),
        ({"seed": 2**63 - 1}, "seed must be"),
    ],
)
def test_refuses_bad_batches(client: TestClient, fields: dict[str, Any], message: str) -> None:
    answer = client.post("/api/batch", json={"labels": [1], "seed": 0, "count": 1, **fields})
    assert answer.status_code == 422 and message in answer.json()["message"]


@pytest.mark.parametrize(
    ("content", "status", "message"),
    [
        (b"", 422, "must be a JSON object, got other text"),
        (b"\xff\xfe\xff", 422, "got other text"),
        (b"[1]", 422, "must be a JSON object, got [1]"),
        (b"[" * 20000, 422, "got other text"),
        (b'{"label": 3, "seed": 7, "cfg": NaN}', 422, "cfg must be a number in [0, 20], got nan"),
        (b" " * 10**6, 413, "must have at most"),
        (iter([b" " * 10**5] * 10), 413, "must have at most"),
    ],
    ids=["empty", "bytes", "list", "deep", "nan", "long", "chunks"],
)
def test_refuses_bad_bodies(client: TestClient, content: Any, status: int, message: str) -> None:
    answer = client.post("/api/draw", content=content)
    assert answer.status_code == status and message in answer.json()["message"]


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({"Host": "evil.example"}, "this page is for its own machine"),
        ({"Origin": "https://evil.example"}, "requests must come from the page itself"),
        ({"Origin": "null"}, "requests must come from the page itself"),
        ({"Host": "[::1"}, "must be an address"),
    ],
)
def test_refuses_other_origins(client: TestClient, headers: dict[str, str], message: str) -> None:
    answer = client.post("/api/draw", json=DRAW, headers=headers)
    assert answer.status_code == 403 and message in answer.json()["message"]


@pytest.mark.parametrize("host", ["localhost:7860", "[::1]:7860", "127.0.0.2"])
def test_answers_under_names_of_the_loopback(client: TestClient, host: str) -> None:
    headers = {"Host": host, "Origin": f"http://{host}"}
    assert client.get("/api/model", headers=headers).status_code == 200


def test_answers_under_any_name_where_it_is_open(digits: Sampler) -> None:
    with TestClient(make_app(digits, "digits", loopback_only=False), base_url="http://host") as client:
        assert client.get("/api/model").status_code == 200


def test_another_model_with_names() -> None:
    """Nothing is fitted to the digits: other sides, scales, codes and classes."""
    sampler = Sampler(*tiny(), class_names=["ant", "bee", "cat", "dog", "eel"], precision="fp32")
    image, mask = sampler(1, 2)[0], torch.ones(8, 8, dtype=torch.bool)
    with TestClient(make_app(sampler, "tiny"), base_url="http://localhost") as client:
        assert client.get("/api/model").json()["classes"][4] == "eel"
        assert same(ask(client, "draw", label=1, seed=2)[-2], image)
        wanted = sampler.edit(image, mask, 5, 3)[0]
        assert same(ask(client, "edit", label=5, seed=3, **edit_of(image, mask))[-2], wanted)
        refused = client.post("/api/draw", json={"label": 6, "seed": 0, "top_k": 17})
        assert "label must be a whole number in 0..5, got 6" in refused.text


def test_an_error_while_drawing_is_told_and_the_next_is_drawn(
    client: TestClient, digits: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error, told in (
        (ValueError("no memory"), "no memory"),
        (KeyError("secret"), "server's log says why"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(digits, "stages", lambda *_, error=error, **__: (_ for _ in ()).throw(error))
            event = ask(client, "draw", **DRAW)[-1]
        assert event["event"] == "error" and told in event["message"] and "secret" not in event["message"]
    assert ask(client, "draw", **DRAW)[-1]["event"] == "done"


@pytest.mark.parametrize("name", ["waiting", "images", "connections"])
def test_limits_are_positive(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        Limits(**{name: 0})
