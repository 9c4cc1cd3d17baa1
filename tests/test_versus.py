"""The comparisons with other programs: clocks, counts, refusals, pages; and tiny runs that need no other program."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from var_ext.models import VQVAE
from var_ext.schedule import SCALES_256, ScaleSchedule
from var_ext.training import VARRecipe
from var_ext.training.flops import flops_of

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")

# Answers as the published code does, without its cache: each scale sees all coarser ones anew.
PUBLISHED = """
import torch
from torch import nn

import dist
from var_ext.models import VAR
from var_ext.models import build_vae_var as build
from var_ext.reference.sample_tokens import keep_top

GUIDANCE = 1.0


class Published(VAR):
    def all_logits(self, labels, x):
        return self(labels, x)

    @torch.no_grad()
    def autoregressive_infer_cfg(self, B, label_B, g_seed=None, cfg=1.5, top_k=0, top_p=0.0, more_smooth=False):
        self.rng.manual_seed(g_seed)
        quantize, count, x = self.vae_proxy[0].quantize, len(self.patch_nums), None
        labels = torch.cat((label_B, torch.full_like(label_B, self.num_classes)))
        f_hat = torch.zeros(B, self.Cvae, self.patch_nums[-1], self.patch_nums[-1])
        for k, side in enumerate(self.patch_nums):
            logits = self.all_logits(labels, x if x is None else x.repeat(2, 1, 1))[:, -side * side :]
            t = GUIDANCE * cfg * k / (count - 1)
            logits = keep_top((1 + t) * logits[:B] - t * logits[B:], top_k, top_p)
            tokens = logits.softmax(-1).flatten(0, 1).multinomial(1, replacement=True, generator=self.rng)
            codes = quantize.embedding(tokens.view(B, -1)).transpose(1, 2).reshape(B, self.Cvae, side, side)
            f_hat, pooled = quantize.get_next_autoregressive_input(k, count, f_hat, codes)
            words = pooled.flatten(2).transpose(1, 2)
            x = words if x is None else torch.cat((x, words), dim=1)
        return self.vae_proxy[0].fhat_to_img(f_hat).add(1).mul(0.5)


def build_vae_var(**sizes):
    print("a word from the constructor")
    for layer in (nn.Linear, nn.Conv2d):
        layer.reset_parameters = lambda self: None
    vae, var = build(**sizes)
    var.__class__ = Published
    for block in var.blocks:
        block.ln_wo_grad = nn.LayerNorm(var.C, eps=1e-6, elementwise_affine=False)
    return vae, var
"""


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder laid out as the published code is."""
    folder = tmp_path / "official"
    (folder / "models").mkdir(parents=True)
    (folder / "models" / "__init__.py").write_text(PUBLISHED)
    (folder / "dist.py").write_text("print('and one from another module')\n")
    return folder


def run(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, f"benchmarks/{program}.py", *map(str, arguments)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
    }  # the threads of a toy wait for each other most of the time
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture
def main_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Calls a program in this process."""

    def call(program: str, *arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", [f"{program}.py", *map(str, arguments)])
        importlib.import_module(program).main()

    return call


# ---------------------------------------------------------------------- counts


@pytest.mark.parametrize(
    ("depth", "products", "attention"), [(16, 559, 38), (20, 1084, 59), (24, 1865, 84), (30, 3631, 132)]
)
def test_the_counted_flops(depth: int, products: int, attention: int) -> None:
    import flops

    cost = flops.sampling(depth)
    assert round((sum(cost.products) + sum(cost.head)) / 1e9) == products
    assert round(sum(cost.attention) / 1e9) == attention
    assert round(cost.decoder / 1e9) == 352
    assert round(flops.sampling(depth, merged=False).decoder / 1e9) == 394
    assert sum(flops.sampling(depth, mixed=True).head) * 2 == sum(cost.head)
    assert sum(flops.sampling(depth, guided=False).products) * 2 == sum(cost.products)


@pytest.mark.parametrize("depth", [16, 30])
def test_a_training_step_counts_a_forward_pass_as_sampling_does(depth: int) -> None:
    """Three times all that is no decoder; the trainers' own count, which a wheel without benchmarks has."""
    import flops

    step = flops_of(VARRecipe.paper(depth), ScaleSchedule(SCALES_256), codes=4096, channels=32)
    assert step == 3 * flops.sampling(depth, guided=False).transformer


def test_the_decoders_flops_are_those_that_torch_counts() -> None:
    import flops

    vae = VQVAE(vocab_size=16, z_channels=8, ch=32, v_patch_nums=(1, 2, 4))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # others are not counted
        vae.fhat_to_img(torch.zeros(1, 8, 4, 4))
    assert counter.get_total_flops() == flops.decoder([32, 32, 64, 64, 128], 4, 8)


def test_a_step_of_dit() -> None:
    """The paper counts 118.6 multiply-adds, in 10^9, of a forward pass."""
    import flops

    assert flops.dit_step(guided=False) / 2e9 == pytest.approx(118.6, rel=5e-3)


# ---------------------------------------------------------------------- clocks


def test_competitors_take_turns() -> None:
    """One lap to warm up; each lap begins with the next competitor; who runs out of memory leaves."""
    from harness.clock import Clock, in_turn

    calls: list[str] = []

    def competitor(name: str) -> Callable[[Any], None]:
        def call(watch: Any) -> None:
            calls.append(name)
            if name == "greedy" and len(calls) > 3:
                raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes")
            watch("first")
            watch("second")
            watch("first")

        return call

    results = in_turn({name: competitor(name) for name in ("a", "b", "greedy")}, 3, Clock(CPU))
    assert " ".join(calls) == "a b greedy a b greedy b a a b"
    assert [len(results[name].seconds) for name in ("a", "b", "greedy")] == [3, 3, 0]
    assert results["greedy"].error == "out of memory" and results["greedy"].parts() == {}
    parts = results["a"].parts()
    assert {part: len(seconds) for part, seconds in parts.items()} == {"first": 2, "second": 1}

    def broken(_: Any) -> None:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        in_turn({"broken": broken}, 1, Clock(CPU))


def test_a_part_is_the_median_over_laps() -> None:
    from harness.clock import Timed

    laps = [{"step": [seconds, 2.0]} for seconds in (1.0, 9.0, 3.0)]
    assert Timed([1.0] * 3, laps).parts() == {"step": [3.0, 2.0]}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_that_of_the_draws() -> None:
    from harness.memory import memory_of

    before = bytearray(64 << 20)  # a peak of the past
    del before

    def draw() -> None:
        bytearray(200 << 20)

    memory = memory_of(draw, CPU)
    assert 190 << 20 < memory["peak"] - memory["resting"] < 260 << 20


# ---------------------------------------------------------------------- the published code


def test_the_published_code_leaves_no_trace(
    checkout: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import samplers

    monkeypatch.setitem(sys.modules, "dist", SimpleNamespace())  # somebody else's
    methods = [vars(layer).get("reset_parameters") for layer in (nn.Linear, nn.Conv2d)]
    modules, path = set(sys.modules), list(sys.path)
    var = samplers.published_model(checkout, 1, CPU, tiny=True)
    assert type(var).__name__ == "Published"
    assert [vars(layer).get("reset_parameters") for layer in (nn.Linear, nn.Conv2d)] == methods
    assert "models" not in sys.modules and sys.path == path and set(sys.modules) >= modules
    assert isinstance(sys.modules["dist"], SimpleNamespace)
    assert capsys.readouterr() == ("", "")
    with pytest.raises(SystemExit, match="must be a checkout of the published code"):
        samplers.published_model(checkout / "models", 1, CPU)


def test_vs_official(checkout: Path, tmp_path: Path) -> None:
    """The program itself on a toy: answers, time, parts, memory."""
    out = tmp_path / "official.json"
    done = run(
        "vs_official", "--official", checkout, "--tiny", "--laps", 1, "--batch-sizes", "2", "--json", out,
        "--precisions", "fp32",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text(encoding="utf-8"))
    assert report["finished"] and report["tf32"] is None
    assert [(row["who"], row["precision"], row["batch"]) for row in report["rows"]] == [
        ("published", "fp32", 2),
        ("var_ext shared", "fp32", 2),
        ("var_ext", "fp32", 2),
    ]
    for row in report["rows"]:
        assert len(row["seconds"]) == 1 and row["error"] is None
        assert row["memory"]["peak"] >= row["memory"]["resting"] > 0
        assert {name: len(seconds) for name, seconds in row["parts"].items()} == {
            "transformer": 4, "head and sampling": 4, "quantizer": 4, "decoder": 1,
        }  # fmt: skip
    assert all(row["tokens"] == 1 and row["psnr"] > 60 for row in report["answers"])
    assert str(tmp_path) not in out.read_text(encoding="utf-8")


def test_wrong_answers_are_not_timed(checkout: Path, tmp_path: Path, main_of: Callable[..., None]) -> None:
    source = checkout / "models" / "__init__.py"
    source.write_text(source.read_text().replace("GUIDANCE = 1.0", "GUIDANCE = 0.5"))
    out = tmp_path / "official.json"
    with pytest.raises(SystemExit, match="the answers of var_ext are wrong:\nvar_ext shared fp32: "):
        main_of("vs_official", "--official", checkout, "--tiny", "--precisions", "fp32", "--json", out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "refused"),
    [
        (("--precisions", "fp16"), "may be fp32, bf16, int8 here, got fp16"),
        (("--device", "meta"), "--device may be cpu or cuda, got meta"),
    ],
)
def test_what_a_device_has_not_got_is_refused(
    arguments: tuple[str, ...], refused: str, main_of: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main_of("cost", *arguments)
    assert refused in capsys.readouterr().err


def test_answers_are_compared_without_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """And timed with what torch does by itself."""
    import vs_official

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    seen: list[bool] = []

    class Reference:
        var = SimpleNamespace(head=nn.Linear(1, 1), patch_nums=(1,))

        def draw(self, *_: Any, **__: Any) -> Any:
            seen.extend(place.allow_tf32 for place in (torch.backends.cudnn, torch.backends.cuda.matmul))
            return torch.zeros(1, 3, 2, 2), torch.zeros(1, 1)

    (row,) = vs_official.compare({("var_ext", "fp32"): Reference()}, Reference(), 1)  # type: ignore
    assert row["tokens"] == 1 and seen == [False] * 4
    assert torch.backends.cudnn.allow_tf32


def test_a_run_that_is_stopped_leaves_what_it_had(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, main_of: Callable[..., None]
) -> None:
    import vs_official

    def stopped(competitors: Any, batch: int, *_: Any) -> Any:
        if batch == 2:
            raise KeyboardInterrupt
        return timed(competitors, batch, *_)

    timed = vs_official.timed
    monkeypatch.setattr(vs_official, "timed", stopped)
    arguments = [
        "--tiny",
        "--laps",
        1,
        "--batch-sizes",
        "1,2",
        "--precisions",
        "fp32",
        "--folder",
        tmp_path / "new",
    ]
    with pytest.raises(KeyboardInterrupt):
        main_of("vs_official", "--official", checkout, *arguments)
    (file,) = (tmp_path / "new").iterdir()
    report = json.loads(file.read_text(encoding="utf-8"))
    assert file.name.startswith("official-") and not report["finished"]
    assert {row["batch"] for row in report["rows"]} == {1} and len(report["answers"]) == 3


def test_the_graph_stands_beside_the_same_sampler_without_it(checkout: Path) -> None:
    """Without a GPU there is no graph: both are the same."""
    import samplers
    import vs_official

    var = samplers.published_model(checkout, 1, CPU, tiny=True)
    keys = vs_official.names(["fp32", "bf16"], torch.device("cuda"))
    assert keys[-2:] == [("var_ext graph", "fp32"), ("var_ext graph", "bf16")]
    assert len(vs_official.names(["fp32", "int8"], CPU)) == 4
    graphed = {("var_ext graph", "fp32"): samplers.make("var_ext graph", var, "fp32")}
    (row,) = vs_official.compare(graphed, samplers.Published(var, "fp32"), 2)
    assert (row["tokens"], row["psnr"]) == (1, 200)
    assert graphed["var_ext graph", "fp32"].draw(samplers.labels_of(2, CPU), 0)[0].shape == (2, 3, 64, 64)
    row |= dict(tokens=0.5)
    assert vs_official.wrong([row])[0].startswith("var_ext graph fp32: 50.00% of the tokens")
    assert not vs_official.wrong([{**row, "precision": "bf16"}, {**row, "who": "published"}])


# ---------------------------------------------------------------------- DiT


class Vae:
    def decode(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


class Pipe:
    """Calls its parts as diffusers' pipeline does."""

    device = CPU

    def __init__(self) -> None:
        self.transformer = nn.Identity()
        self.vae = Vae()

    def __call__(self, labels: list[int], *, num_inference_steps: int, **options: Any) -> Any:
        assert set(options) == {"guidance_scale", "generator", "output_type"}
        x = torch.zeros(len(labels), 3, 2, 2)
        for _ in range(num_inference_steps):
            x = self.transformer(x)
        return SimpleNamespace(images=self.vae.decode(x))


def test_the_steps_of_dit_are_told_apart() -> None:
    import vs_dit
    from harness.clock import Clock, Watch

    pipe, clock = Pipe(), Clock(CPU)
    watch = Watch(clock)
    images = vs_dit.draw(pipe, 2, 5, watch)
    assert images.shape == (2, 3, 2, 2) and images.eq(1).all()
    assert {part: len(seconds) for part, seconds in watch.parts().items()} == dict(start=1, step=5, decoder=1)
    assert "decode" not in vars(pipe.vae) and not pipe.transformer._forward_pre_hooks
    parts = dict(start=[0.5], step=[2.0, 9.0, 3.0], decoder=[1.0])
    assert vs_dit.seconds_of(parts, 250) == 0.5 + 250 * 3 + 1
    assert set(vs_dit.linearity(pipe, parts, clock)) == {"4", "8"}


def test_without_diffusers_it_says_what_to_install(
    main_of: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(SystemExit, match=r"pip install 'var_ext\[versus\]'"):
        main_of("vs_dit", "--tiny")


# ---------------------------------------------------------------------- training


def test_vs_training(checkout: Path, tmp_path: Path, main_of: Callable[..., None]) -> None:
    out = tmp_path / "training.json"
    toy = ("vs_training", "--official", checkout, "--tiny", "--laps", 1, "--depths", 1, "--json", out)
    main_of(*toy)
    report = json.loads(out.read_text(encoding="utf-8"))
    names = [
        (who, precision)
        for precision in ("fp32", "bf16")
        for who in ("published", "var_ext", "var_ext, torch's products")
    ]
    assert report["finished"] and [(row["who"], row["precision"]) for row in report["rows"]] == names
    assert all(set(row["parts"]) == {"forward", "loss", "backward"} for row in report["rows"])


def test_a_wrong_step_is_not_timed(
    checkout: Path, tmp_path: Path, main_of: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    import vs_training

    right, out = vs_training.token_losses, tmp_path / "training.json"
    monkeypatch.setattr(vs_training, "token_losses", lambda *given: 1.01 * right(*given))
    with pytest.raises(SystemExit, match="var_ext is wrong:\nvar_ext fp32: wanted 1e-05 and 1e-03"):
        main_of("vs_training", "--official", checkout, "--tiny", "--depths", 1, "--json", out)


# ---------------------------------------------------------------------- cost


def test_cost(tmp_path: Path, main_of: Callable[..., None]) -> None:
    out = tmp_path / "cost.json"
    main_of(
        "cost", "--tiny", "--laps", 1, "--depths", "1,2", "--batch-sizes", "1,3", "--json", out, "--precisions", "fp32"
    )  # fmt: skip
    report = json.loads(out.read_text(encoding="utf-8"))
    rows = report["rows"]
    assert report["finished"] and all(len(row["seconds"]) == 1 for row in rows)
    assert [(row["depth"], row["batch"]) for row in rows] == [(1, 1), (2, 1), (2, 3)]
    assert rows[0]["flops"]["decoder"] == rows[1]["flops"]["decoder"] > 0
    assert rows[0]["flops"]["transformer"] < rows[1]["flops"]["transformer"]
