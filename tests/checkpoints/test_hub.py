"""Models from every place: bundled, in folders, on a hub that is served here, in its cache offline."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch

import var_ext
from tests.tiny import answer, tiny
from var_ext import checkpoints, loading
from var_ext.checkpoints import CheckpointError, load_tensors, read_json, save_tensors
from var_ext.sampling import Sampler

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    return answer(Sampler(*tiny()))


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    return checkpoints.save_model(
        tmp_path / "model", *tiny(), sampling={"cfg": 2.0, "top_k": 4, "top_p": 0.9}
    )


# ---------------------------------------------------------------------- model folders


def test_folder_round_trip(model_folder: Path, expected: list[list[int]]) -> None:
    assert sorted(os.listdir(model_folder)) == ["config.json", "vae.safetensors", "var.safetensors"]
    for name in (model_folder, str(model_folder)):
        sampler = var_ext.load(name)
        assert answer(sampler) == expected
        assert sampler.defaults == {"cfg": 2.0, "top_k": 4, "top_p": 0.9}
        assert not sampler.var.training and not sampler.vae.training
    for model, original in zip((sampler.vae, sampler.var), tiny(), strict=True):
        state = original.state_dict()
        assert {name: torch.equal(t, state[name]) for name, t in model.state_dict().items()} == dict.fromkeys(
            state, True
        )


def test_class_names_are_kept_and_counted(tmp_path: Path) -> None:
    names = ["ant", "bee", "cat", "dog", "eel"]
    assert (
        var_ext.load(checkpoints.save_model(tmp_path / "a", *tiny(), class_names=names)).class_names == names
    )
    with pytest.raises(ValueError, match="class_names must have 5 names, got 2"):
        checkpoints.save_model(tmp_path / "b", *tiny(), class_names=names[:2])


def test_half_precision_on_disk(tmp_path: Path) -> None:
    vae, var = tiny()
    vae.quantize.ema_vocab_hit_SV[0, 0] = 1e6  # beyond fp16
    full = checkpoints.save_model(tmp_path / "full", vae, var)
    half = checkpoints.save_model(tmp_path / "half", vae, var, dtype=torch.float16)
    sizes = [(folder / "var.safetensors").stat().st_size for folder in (full, half)]
    assert sizes[1] < 0.6 * sizes[0]
    stored = load_tensors(half / "vae.safetensors")
    assert stored["quantize.ema_vocab_hit_SV"].dtype == torch.float32
    assert stored["encoder.conv_in.weight"].dtype == torch.float16
    sampler = var_ext.load(half)
    assert {p.dtype for p in sampler.var.parameters()} == {torch.float32}
    assert torch.equal(sampler.var.head.weight, var.head.weight.half().float())
    assert sampler.vae.quantize.ema_vocab_hit_SV[0, 0] == 1e6


@pytest.mark.parametrize("precision", ["fp32", "bf16", torch.bfloat16, "int8"])
def test_another_precision_leaves_the_weights_alone(model_folder: Path, precision: str) -> None:
    sampler = var_ext.load(model_folder, precision=precision)
    assert sampler.precision.name == (precision if isinstance(precision, str) else "bf16")
    assert {p.dtype for p in (*sampler.var.parameters(), *sampler.vae.parameters())} == {torch.float32}
    image = sampler(0, 0)
    assert image.dtype == torch.float32 and image.isfinite().all()


def test_tokenizer_alone(tmp_path: Path, model_folder: Path) -> None:
    vae = tiny()[0]
    alone = checkpoints.save_model(tmp_path / "alone", vae)
    image = torch.rand(2, 3, 8, 8) * 2 - 1
    wanted = torch.cat(vae.img_to_idxBl(image), dim=1)
    for folder in (alone, model_folder):
        assert torch.equal(torch.cat(checkpoints.load_tokenizer(folder).img_to_idxBl(image), dim=1), wanted)
    with pytest.raises(CheckpointError, match="tokenizer alone"):
        var_ext.load(alone)


def test_saving_over_a_model_keeps_the_old_one_when_it_fails(
    model_folder: Path, expected: list[list[int]]
) -> None:
    (model_folder / "var.safetensors").rename(model_folder / "kept")
    (model_folder / "var.safetensors").mkdir()  # a path that no file can take
    with pytest.raises(CheckpointError, match=r"could not write .*var\.safetensors"):
        checkpoints.save_model(model_folder, *tiny())
    (model_folder / "var.safetensors").rmdir()
    (model_folder / "kept").rename(model_folder / "var.safetensors")
    assert answer(var_ext.load(model_folder)) == expected


def change_entries(path: Path, change: str) -> None:
    entries = load_tensors(path)
    if change == "missing":
        del entries["head.bias"], entries["word_embed.bias"]
    elif change == "unexpected":
        entries["extra.weight"] = torch.zeros(2)
    elif change == "shape":
        entries["head.bias"] = torch.zeros(17)
    elif change == "kind":
        entries["lvl_1L"] = entries["lvl_1L"].float()
    save_tensors(path, entries)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", r"2 missing: word_embed\.bias, head\.bias"),
        ("unexpected", r"1 unexpected: extra\.weight"),
        ("shape", r"head\.bias \(wanted \(16,\) torch\.float32, got \(17,\) torch\.float32\)"),
        ("kind", r"lvl_1L \(wanted \(1, 21\) torch\.int64, got \(1, 21\) torch\.float32\)"),
    ],
)
def test_entries_must_fit_exactly(model_folder: Path, change: str, message: str) -> None:
    change_entries(model_folder / "var.safetensors", change)
    with pytest.raises(
        CheckpointError,
        match=rf"var\.safetensors must have the \d+ entries of this VAR, but {message}|{message}",
    ):
        var_ext.load(model_folder)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"format": "var_ext/2"}, r'config\.json must have "format": "var_ext/1", got \'var_ext/2\''),
        ({"format": None}, "must have .* got None"),
        ({"vae": [1]}, r'"vae" in .*config\.json must be a dict, got \[1\]'),
        ({"vae": {"colour": 3}}, r'"vae" of .*config\.json must be arguments of VQVAE, but: .*colour'),
        ({"var": {"depth": 2, "width": 9}}, r'"var" of .* must be arguments of VAR, but: .*width'),
        ({"class_names": "ant"}, r'"class_names" in .* must be a list, got \'ant\''),
        ({"class_names": ["ant"]}, "class_names"),
        ({"class_names": [1]}, r'"class_names" in .* must be a list of str, got 1 in it'),
        ({"sampling": {"cfg": "x"}}, r'"cfg" of "sampling" in .* must be a finite number, got \'x\''),
        ({"sampling": {"cfg": float("inf")}}, r'"cfg" .* must be a finite number, got inf'),
        ({"sampling": {"top_p": None}}, r'"top_p" .* must be a finite number, got None'),
        ({"sampling": {"top_k": 1.5}}, r'"top_k" .* must be a whole number, got 1\.5'),
        ({"sampling": {"top_k": True}}, r'"top_k" .* must be a whole number, got True'),
        ({"vae": {"vocab_size": -1}}, r'"vae" of .* must be arguments of VQVAE, but: '),
        ({"vae": {"ch_mult": []}}, r'"vae" of .* must be arguments of VQVAE, but: '),
        ({"var": {"num_heads": 0}}, r'"var" of .* must be arguments of VAR, but: '),
        ({"sampling": {"temperature": 1}}, "temperature"),
    ],
)
def test_config_that_does_not_describe_a_model(
    model_folder: Path, edit: dict[str, object], message: str
) -> None:
    config = {**read_json(model_folder / "config.json"), **edit}
    (model_folder / "config.json").write_text(json.dumps(config))  # infinities too, which write_json refuses
    with pytest.raises((CheckpointError, ValueError), match=message):
        var_ext.load(model_folder)


def test_missing_and_truncated_files_of_a_folder(model_folder: Path) -> None:
    weights = model_folder / "vae.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"vae\.safetensors must be a complete safetensors file"):
        var_ext.load(model_folder)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"could not read .*vae\.safetensors"):
        var_ext.load(model_folder)
    (model_folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds no config\.json but var\.safetensors: `var-ext"):
        var_ext.load(model_folder)
    (model_folder / "var.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"could not read .*config\.json"):
        var_ext.load(model_folder)


def test_device_that_is_not_there(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="must be one this machine has, got 'cuda' with 0 usable GPUs"):
        var_ext.load(model_folder, device="cuda")
    with pytest.raises(ValueError, match=r"must be one such as .* got 'toaster'"):
        var_ext.load(model_folder, device="toaster")
    with pytest.raises(ValueError, match="must be one this machine has, got 'cpu:7'"):
        var_ext.load(model_folder, device="cpu:7")
    for name in ("meta", "mps"):
        with pytest.raises(ValueError, match=f"device must be one of cpu, cuda, got '{name}'"):
            var_ext.load(model_folder, device=name)
    assert loading.checked_device("cpu:0").type == "cpu"


def test_bundled_models_load() -> None:
    assert "digits" in checkpoints.bundled_models()
    for name in checkpoints.bundled_models():
        sampler = var_ext.load(name)
        assert sampler(0, 0).shape == (1, 3, sampler.image_size, sampler.image_size)


# ---------------------------------------------------------------------- the hub


class _Hub(http.server.BaseHTTPRequestHandler):
    """Serves ROOT/owner/name/FILE as the hub serves owner/name/resolve/main/FILE."""

    root: Path

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        file = self.root / self.path.partition("?")[0].lstrip("/").replace("/resolve/main/", "/")
        content = file.read_bytes() if file.is_file() else b""
        self.send_response(200 if file.is_file() else 404)
        self.send_header("X-Repo-Commit", "0" * 40)
        if file.is_file():
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        elif file.parent.is_dir():
            self.send_header("X-Error-Code", "EntryNotFound")
        else:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A hub with the published repository, its files tiny, and a repository that holds a model folder."""
    root = tmp_path_factory.mktemp("hub")
    vae, var = tiny()
    (root / "FoundationVision" / "var").mkdir(parents=True)
    torch.save(vae.state_dict(), root / "FoundationVision/var/vae_ch160v4096z32.pth")
    torch.save(var.state_dict(), root / "FoundationVision/var/var_d16.pth")
    checkpoints.save_model(root / "someone" / "tiny", vae, var)
    handler = type("Handler", (_Hub,), {"root": root})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


# A process of its own: huggingface_hub reads its settings once, when it is imported.
SCRIPT = """
import json, sys
import var_ext
from tests.tiny import tiny
from var_ext import checkpoints
from var_ext.checkpoints import CheckpointError, find
vae, var = tiny()
find.published_config = lambda depth: {"vae": vae.config, "var": var.config}  # sizes of what is served here
answers = {}
for name in sys.argv[1:]:
    try:
        sampler = var_ext.load(name)
        answers[name] = sampler.tokens([0, 3, 5], [1, 2, 3], cfg=1.5, top_k=0, top_p=0.0).tolist()
    except CheckpointError as error:
        answers[name] = str(error)
answers["tokenizer"] = type(checkpoints.load_tokenizer("var-d16")).__name__ if sys.argv[1] == "var-d16" else None
print(json.dumps(answers))
"""


def ask(names: list[str], **settings: str) -> dict[str, object]:
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith("HF_") and "proxy" not in key.lower()
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *names],
        cwd=ROOT,
        env={**kept, "HF_HUB_DISABLE_TELEMETRY": "1", **settings},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_hub_online_then_offline_from_its_cache(
    hub_url: str, tmp_path: Path, expected: list[list[int]]
) -> None:
    cache = str(tmp_path / "cache")
    names = ["var-d16", "someone/tiny", "var-d20", "no/body"]
    online = ask(names, HF_ENDPOINT=hub_url, HF_HUB_CACHE=cache)
    assert online["var-d16"] == online["someone/tiny"] == expected
    assert online["tokenizer"] == "VQVAE"
    assert f"could not get var_d20.pth of {hub_url}/FoundationVision/var:" in str(online["var-d20"])
    assert f"could not get config.json of {hub_url}/no/body:" in str(online["no/body"])
    assert "Nor is there a folder 'no/body' here" in str(online["no/body"])
    assert (tmp_path / "cache" / "models--FoundationVision--var").is_dir()

    offline = ask(names, HF_HUB_OFFLINE="1", HF_HUB_CACHE=cache)
    assert offline["var-d16"] == offline["someone/tiny"] == expected
    for part in (
        "var_d20.pth",
        "HF_HUB_OFFLINE is set",
        cache,
        "hf download FoundationVision/var",
        "var-ext convert",
    ):
        assert part in str(offline["var-d20"])


def test_hub_that_breaks_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> str:  # a real one is retried for half a minute first
        raise ConnectionResetError("peer closed the connection\nwith details")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", broken)
    with pytest.raises(
        CheckpointError, match=r"could not get config\.json .*someone/tiny: peer closed the connection\. "
    ):
        var_ext.load("someone/tiny")


@pytest.mark.parametrize(
    "given", [("someone/tiny", "v1"), ("someone/tiny@v1", None), ("someone/tiny@v1", "v1")]
)
def test_a_revision_reaches_every_file(
    given: tuple[str, str | None], model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(repository: str, file: str, *, revision: str | None = None) -> str:
        asked.append((repository, file, revision))
        return str(model_folder / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    var_ext.load(given[0], revision=given[1])
    files = ("config.json", "vae.safetensors", "var.safetensors")
    assert asked == [("someone/tiny", file, "v1") for file in files]


@pytest.mark.parametrize("given", [("var-d16", "v1"), ("var-d16@v1", None)])
def test_published_models_are_pinned(given: tuple[str, str | None], monkeypatch: pytest.MonkeyPatch) -> None:
    def download(repository: str, file: str, *, revision: str | None = None) -> str:
        raise ConnectionResetError(f"{repository} {revision}")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    wanted = r": FoundationVision/var v1\. .*hf download FoundationVision/var \S+ --revision v1`"
    with pytest.raises(CheckpointError, match=wanted):
        var_ext.load(given[0], revision=given[1])


def test_a_revision_where_there_is_none_is_refused(model_folder: Path) -> None:
    for model in ("digits", model_folder, str(model_folder)):
        with pytest.raises(ValueError, match="a revision is of a model on the hub, got 'v1'"):
            var_ext.load(model, revision="v1")
    with pytest.raises(ValueError, match="must be given once, got 'v1' and 'a/b@v2'"):
        var_ext.load("a/b@v2", revision="v1")
