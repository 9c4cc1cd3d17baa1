"""What a run's folder gives while it trains and after: models, kept checkpoints, pictures, curves; and longer runs."""

import json
import logging
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import var_ext
from tests.disk import small_disk
from tests.training.ranked import environment, launch
from tests.training.test_loop import Toy
from var_ext.checkpoints import CheckpointError, load_tokenizer, save_adapter
from var_ext.cli import main
from var_ext.training import TokenizerRecipe, VARRecipe, checkpoint, extras, train_tokenizer, train_var
from var_ext.training.checkpoint import Saver, load_checkpoint
from var_ext.training.loop import Moment, fit
from var_ext.training.var import VARTask


@pytest.fixture(scope="session")
def run(
    images: Path, tokenizer: Path, var_recipe: VARRecipe, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Folder of a run of 18 steps that was stopped in step 9, with checkpoints of 0 and every second step."""
    out = tmp_path_factory.mktemp("run")
    stop(images, tokenizer, out, var_recipe.with_options(keep=3, select="last"), 9)
    return out


def stop(images: Path, tokenizer: Path, out: Path, recipe: VARRecipe, at: int) -> None:
    step = VARTask.step

    def interrupted(self: VARTask, moment: Moment, batch: Any) -> Any:
        if moment.step == at:
            raise KeyboardInterrupt
        return step(self, moment, batch)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(VARTask, "step", interrupted)
        train_var(images, tokenizer, out, recipe, progress=False)


def command(*arguments: object) -> str:
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done.output


def test_a_run_that_is_not_done_draws_with_its_averaged_weights(run: Path) -> None:
    sampler = var_ext.load(run, precision="fp32")
    state = torch.load(run / "last.ckpt", weights_only=True)["state"]["task"]
    own = sampler.var.state_dict()
    assert state["ema"] and not torch.equal(state["ema"]["head.weight"], state["model"]["head.weight"])
    for name, value in {**state["model"], **state["ema"]}.items():
        assert torch.equal(own[name], value), name
    assert sampler([0, 1], [0, 1]).shape == (2, 3, 8, 8) and sampler.class_names == ["class0", "class1"]


def test_a_run_that_is_not_done_keeps_its_best_weights(
    images: Path, tokenizer: Path, var_recipe: VARRecipe, tmp_path: Path
) -> None:
    stop(images, tokenizer, tmp_path, var_recipe, 9)
    best = torch.load(tmp_path / "last.ckpt", weights_only=True)["state"]["best"]
    assert torch.equal(var_ext.load(tmp_path).var.head.weight, best["weights"]["head.weight"])


def test_commands_take_a_run(run: Path, tmp_path: Path) -> None:
    assert "training     not done: step 9, loss" in command("info", run)
    command("sample", "--model", run, "--count", 1, "--out", tmp_path / "a.png")
    command("convert", run, "--out", tmp_path / "now")
    command("convert", run / "step-4.ckpt", "--out", tmp_path / "then")
    now, then = (var_ext.load(tmp_path / name).var.head.weight for name in ("now", "then"))
    assert torch.equal(now, var_ext.load(run).var.head.weight) and not torch.equal(now, then)
    done = CliRunner().invoke(main, ["convert", str(run), "--num-heads", "2", "--out", str(tmp_path / "x")])
    assert done.exit_code == 1 and "num_heads are for files without a config" in done.output


def test_adapters_are_converted_to_a_model_of_its_own(trained: Path, tmp_path: Path) -> None:
    layer, rank = "blocks.0.attn.proj", 2
    adapter = {f"{layer}.lora_A.weight": torch.ones(rank, 32), f"{layer}.lora_B.weight": torch.ones(32, rank)}
    description = {"peft_type": "LORA", "base_model_name_or_path": str(trained), "r": rank, "lora_alpha": 4}
    sampling = {"cfg": 1.0, "top_k": 0, "top_p": 0.0}
    save_adapter(
        tmp_path / "a", adapter, description, num_classes=2, sampling=sampling, class_names=["x", "y"]
    )
    command("convert", tmp_path / "a", "--out", tmp_path / "whole")
    one, two = (var_ext.load(tmp_path / name) for name in ("a", "whole"))
    assert torch.equal(one.var.blocks[0].attn.proj.weight, two.var.blocks[0].attn.proj.weight)
    assert two.class_names == ["x", "y"] and not (tmp_path / "whole" / "adapter_config.json").exists()


def test_a_checkpoint_of_adapters_is_converted(
    images: Path, trained: Path, var_recipe: VARRecipe, tmp_path: Path
) -> None:
    """Also after the end, when the folder holds the adapters alone."""
    pytest.importorskip("peft")
    recipe = var_recipe.with_options(lora=2, lora_save="adapter", keep=9, epochs=2, select="last")
    train_var(images, trained, tmp_path / "run", recipe, init_from=trained, progress=False)
    command("convert", tmp_path / "run" / "step-0.ckpt", "--out", tmp_path / "first")
    command("convert", tmp_path / "run" / "last.ckpt", "--out", tmp_path / "last")
    first, last, base, run = (
        var_ext.load(path).var.blocks[1].ffn.fc1.weight
        for path in (tmp_path / "first", tmp_path / "last", trained, tmp_path / "run")
    )
    assert torch.equal(first, base) and torch.equal(last, run) and not torch.equal(first, last)


def test_a_tokenizer_that_is_not_done_is_usable(
    images: Path, tokenizer_recipe: TokenizerRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("var_ext.training.tokenizer.fit", lambda task, out, **_: fit_two_steps(task, out))
    with pytest.raises(KeyboardInterrupt):
        train_tokenizer(images, tmp_path, tokenizer_recipe, progress=False)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state"]["task"]
    vae = load_tokenizer(tmp_path)
    assert torch.equal(vae.decoder.conv_out.weight, state["ema"]["decoder.conv_out.weight"])
    (tmp_path / "last.ckpt").unlink()
    with pytest.raises(CheckpointError, match=r"wanted a training checkpoint .*last\.ckpt"):
        load_tokenizer(tmp_path)


def fit_two_steps(task: Any, out: Path) -> Any:
    step = task.step

    def stopped(at: Moment, batch: Any) -> Any:
        if at.step == 2:
            raise KeyboardInterrupt
        return step(at, batch)

    task.step = stopped
    return fit(task, out, progress=False)


def test_the_newest_checkpoints_are_kept_and_a_run_goes_on_from_one(tmp_path: Path) -> None:
    whole = fit(Toy(keep=2), tmp_path, progress=False)
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == [
        "last.ckpt",
        "step-10.ckpt",
        "step-12.ckpt",
    ]
    (tmp_path / "step-10.ckpt").replace(tmp_path / "last.ckpt")
    assert torch.equal(fit(Toy(), tmp_path, progress=False)["value"], whole["value"])


def test_folders_of_kept_checkpoints_stay(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    for step in (1, 2, 3):
        (tmp_path / f"last.ckpt-{step}").mkdir()
        path.unlink(missing_ok=True)  # a new file, as an atomic write makes it
        path.write_bytes(b"x")
        checkpoint._tidy(path, step, 2)
    names = sorted(each.name for each in tmp_path.iterdir())
    assert names == ["last.ckpt", "last.ckpt-2", "last.ckpt-3", "step-2.ckpt", "step-3.ckpt"]


def test_epochs_may_grow(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fit(Toy(epochs=2), tmp_path, progress=False)
    task = Toy(epochs=4)
    fit(task, tmp_path, progress=False)
    assert task.steps == 12
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert line.endswith(
        "is of 2 epochs and goes on at step 6 for 4: from here on with the schedules of the longer run"
    )
    with pytest.raises(CheckpointError, match=r"wanted recipe.epochs = 3, got 4"):
        fit(Toy(epochs=3), tmp_path, progress=False)


def test_a_model_that_is_trained_longer_is_replaced(
    images: Path, tokenizer: Path, var_recipe: VARRecipe, tmp_path: Path
) -> None:
    short = var_recipe.with_options(epochs=1, select="last")
    train_var(images, tokenizer, tmp_path, short, progress=False)
    first = var_ext.load(tmp_path).var.head.weight
    stop(images, tokenizer, tmp_path, short.with_options(epochs=3), 7)
    assert "training" in json.loads((tmp_path / "config.json").read_text())
    assert not torch.equal(var_ext.load(tmp_path).var.head.weight, first)
    train_var(images, tokenizer, tmp_path, short.with_options(epochs=3), progress=False)
    assert "training" not in json.loads((tmp_path / "config.json").read_text())


def test_training_goes_on_while_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer of step 2's checkpoint waits until step 3 is done, and what it writes is of step 2."""
    write, done = checkpoint._save, threading.Event()

    def late(path: Path, pins: Any, step: int, *rest: Any) -> None:
        assert step != 2 or done.wait(60)
        write(path, pins, step, *rest)

    class Watched(Toy):
        def step(self, at: Moment, batch: Any) -> Any:
            found = super().step(at, batch)
            if at.step == 2:
                done.set()
            if at.step == 3:
                raise KeyboardInterrupt
            return found

    monkeypatch.setattr(checkpoint, "_save", late)
    with pytest.raises(KeyboardInterrupt):
        fit(Watched(), tmp_path, progress=False)
    monkeypatch.undo()
    step, _, _, state = load_checkpoint(tmp_path / "last.ckpt", Toy().pins)
    cut = Toy(stop=2)
    with pytest.raises(KeyboardInterrupt):
        fit(cut, tmp_path / "cut", progress=False)
    assert step == 2 and torch.equal(state["task"]["value"], cut.value)


RANK = """
import sys, time
from pathlib import Path
from tests.training.test_loop import Toy
from var_ext.training import checkpoint
from var_ext.training.loop import fit
from var_ext.training.ranks import join

class Slow(Toy):
    loaded = -1

    def picture(self):
        time.sleep(3 * (self.ranks.rank == 0))

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.loaded = float(self.value)

write = checkpoint._save

def late(path, pins, step, plain, parts, ranks, keep):
    time.sleep(3 * (step == 4 and ranks.rank == 0 and "slow" in sys.argv[2]))
    write(path, pins, step, plain, parts, ranks, keep)

checkpoint._save = late
out, kind = Path(sys.argv[1]), sys.argv[2]
with join("cpu", 1.5) as (ranks, _):
    options = {"slow": {}, "slow diverged": {"on_divergence": "halve"}, "drawn": {"sample_every": 1}}[kind]
    task = Slow(diverge={"loss": 4} if "diverged" in kind else None, **options)
    task.ranks = ranks
    try:
        fit(task, out, progress=False)
    except RuntimeError as error:
        (out / f"rank-{ranks.rank}.txt").write_text(f"{error}, went back to {task.loaded}")
    else:
        (out / f"rank-{ranks.rank}.txt").write_text("done")
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["slow", "slow diverged", "drawn"])
def test_ranks_wait_for_what_one_of_them_does(tmp_path: Path, kind: str) -> None:
    """For longer than in a step: a slow disk, where all of them go back to the same checkpoint, and a picture."""
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    words = launch(2, str(script), str(tmp_path), kind)
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    one, two = ((tmp_path / f"rank-{rank}.txt").read_text() for rank in (0, 1))
    assert one == two and ("halved 3 times" in one if kind == "slow diverged" else one == "done")


def test_what_changes_after_a_save_is_not_saved(tmp_path: Path) -> None:
    state = {"w": torch.zeros(3), "deep": {"note": "x", "none": None, "list": [1, 2]}}
    with Saver(tmp_path / "last.ckpt") as saver:
        saver.save({}, 1, state)
        state["w"].fill_(1)
    found = load_checkpoint(tmp_path / "last.ckpt", {}).state
    assert found["w"].tolist() == [0, 0, 0] and found["deep"] == state["deep"]


def test_a_full_disk_keeps_the_checkpoint_before_and_ends_the_run(tmp_path: Path) -> None:
    class Large(Toy):
        def state_dict(self) -> dict[str, Any]:
            filling = torch.zeros(2000 if self.steps > 4 else 1)  # the third checkpoint does not fit
            return {**super().state_dict(), "filling": filling}

        def step(self, at: Moment, batch: Any) -> Any:
            assert at.step < 9, "the run goes on without its checkpoints"
            return super().step(at, batch)

    with small_disk(), pytest.raises(CheckpointError, match=r"could not write .*last\.ckpt"):
        fit(Large(log_every=100), tmp_path, progress=False)
    assert load_checkpoint(tmp_path / "last.ckpt", Toy().pins).step == 4


@pytest.mark.parametrize("error", [OSError(28, "No space left"), MemoryError("no memory"), TypeError("what")])
def test_whatever_fails_in_the_thread_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(path: Path, step: int, keep: int) -> None:
        if step:
            raise error

    class Short(Toy):
        def step(self, at: Moment, batch: Any) -> Any:
            assert at.step < 6, "the run goes on without its checkpoints"
            return super().step(at, batch)

    monkeypatch.setattr(checkpoint, "_tidy", fail)
    with pytest.raises(CheckpointError, match=rf"could not write .*last\.ckpt: .*{error.args[-1]}"):
        fit(Short(keep=1), tmp_path, progress=False)


def test_pictures_of_both_runs(
    images: Path, tokenizer: Path, tokenizer_recipe: TokenizerRecipe, var_recipe: VARRecipe, tmp_path: Path
) -> None:
    each = {"sample_every": 2, "epochs": 3}
    plain = train_var(
        images, tokenizer, tmp_path / "plain", var_recipe.with_options(epochs=3), progress=False
    )
    drawn = train_var(images, tokenizer, tmp_path / "var", var_recipe.with_options(**each), progress=False)
    train_tokenizer(images, tmp_path / "vae", tokenizer_recipe.with_options(**each), progress=False)
    assert torch.equal(var_ext.load(plain).var.head.weight, var_ext.load(drawn).var.head.weight)
    for kind, size in (("var", (8 * 8, 2 * 8)), ("vae", (4 * 8, 2 * 8))):
        found = sorted((tmp_path / kind / "samples").iterdir())
        assert [path.name for path in found] == ["0002.png", "0003.png"]
        assert {Image.open(path).size for path in found} == {size}


def test_tensorboard_has_the_published_names(
    images: Path, tokenizer: Path, var_recipe: VARRecipe, tmp_path: Path
) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    recipe = var_recipe.with_options(tensorboard=True, sample_every=3, select="last", pg=0.5, pg0=1)
    stop(images, tokenizer, tmp_path, recipe, 9)
    train_var(images, tokenizer, tmp_path, recipe, progress=False)
    found = events.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    pixels = [f"AR_iter_loss/{kind}_{side}" for kind in ("L", "acc") for side in (2, 4, 8)]
    means = [
        f"AR_ep_loss/{v}{kind}_{end}" for v in ("", "v") for kind in ("L", "acc") for end in ("mean", "tail")
    ]
    assert set(found.Tags()["scalars"]) >= {
        *pixels, *means, "AR_iter_loss/z_voc_usage", "AR_z_burnout/rest_hours", "AR_opt_grad/grad/grad_norm",
        "AR_opt_grad/grad/grad_clip", "AR_opt_lr/lr_min/sche_tlr", "AR_opt_lr/lr_max/sche_tlr",
        "AR_opt_wd/wd_max/sche_twd", "AR_opt_wd/wd_min/sche_twd", "AR_iter_schedule/prog_a_reso",
        "AR_iter_schedule/prog_si", "AR_iter_schedule/prog_wp",
    }  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["phase"] == "train"]
    curve = [(each.step, pytest.approx(each.value)) for each in found.Scalars("AR_iter_loss/L_2")]
    assert [(line["step"], line["loss_scales"][0]) for line in train] == curve  # once a step, though resumed
    means = [sum(line["loss"] for line in train[i : i + 3]) / 3 for i in range(0, 18, 3)]
    # the epoch in which the run was cut is there twice, with the same value
    epochs = {each.step: each.value for each in found.Scalars("AR_ep_loss/L_mean")}
    assert epochs == {epoch + 1: pytest.approx(mean) for epoch, mean in enumerate(means)}
    assert [each.step for each in found.Images("samples")] == [9, 18]


def test_tensorboard_that_is_missing_is_said_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(extras, "import_module", missing)
    wanted = r"--tensorboard needs tensorboard: pip install 'var_ext\[tensorboard\]'"
    with pytest.raises(ValueError, match=wanted):
        fit(Toy(stop=0, tensorboard=True), tmp_path, progress=False)
