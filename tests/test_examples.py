"""The examples run, and do what they show."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import click
import pytest
import torch
from PIL import Image

from tests.engine.test_graph import FakeCapture
from var_ext import Sampler
from var_ext.engine import Engine

EXAMPLES = Path(__file__).resolve().parent.parent / "python" / "examples"


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short_and_says_how_to_run_it(example):
    text = example.read_text()
    assert len(text.splitlines()) < 60
    assert f"\npython python/examples/{example.name}" in text.split('"""')[1]


def test_a_second_condition(tmp_path, monkeypatch, capsys):
    """In eager and captured samplings the condition arrives, guidance and batches included; without it there is an
    error."""
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["example"])
    var, drawn = runpy.run_path(str(EXAMPLES / "second_condition.py"))["main"](0)
    assert drawn.shape == (30, 3, 32, 32) and (tmp_path / "inked.png").exists()
    assert "1 steps" in capsys.readouterr().out

    with torch.no_grad():
        var.ink.weight.mul_(30)  # more than one step of training would
    sampler = Sampler(var.vae_proxy[0], var, precision="fp32")
    labels, seeds, ink = torch.arange(4), torch.arange(4), torch.tensor([-2.0, -1.0, 1.0, 2.0])
    options = dict(cfg=2.0, conditions={"ink": ink})
    images = sampler(labels, seeds, **options)
    assert not torch.equal(images, sampler(labels, seeds, cfg=2.0, conditions={"ink": -ink}))
    assert torch.equal(images, sampler(labels, seeds, batch_size=3, **options))
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'ink'"):
        sampler(labels, seeds)
    with pytest.raises(ValueError, match=r"ink must be \(4, ...\), one for each image, got \(3,\)"):
        sampler(labels, seeds, conditions={"ink": ink[:3]})

    everywhere, side = torch.ones(sampler.image_size, sampler.image_size), sampler.image_size
    edited = sampler.edit(
        torch.zeros(3, side, side), everywhere, labels, seeds, conditions={"ink": ink}, cfg=2.0
    )
    other = sampler.edit(
        torch.zeros(3, side, side), everywhere, labels, seeds, conditions={"ink": -ink}, cfg=2.0
    )
    assert not torch.equal(edited, other)
    with pytest.raises(ValueError, match=r"ink must be \(4, ...\), one for each image, got \(3,\)"):
        sampler.edit(torch.zeros(3, side, side), everywhere, labels, seeds, conditions={"ink": ink[:3]})

    captured = Sampler(var.vae_proxy[0], var, precision="fp32")
    monkeypatch.setattr(Engine, "_captures", lambda *_: True)
    captured.engine.graphs.capture = capture = FakeCapture()
    for factor in (1, -1, 1):
        found = captured(labels, seeds, cfg=2.0, batch_size=4, conditions={"ink": factor * ink})
    torch.testing.assert_close(found, images)
    assert (capture.captured, capture.replayed) == (1, 2)


def test_a_sheet_of_edits(tmp_path, monkeypatch, capsys):
    main = runpy.run_path(str(EXAMPLES / "editing_sheet.py"))["main"]
    main.main(["digits", "--out", str(tmp_path / "sheet.png")], standalone_mode=False)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.height == 18 + 4 + 5 * 68 and "sheet.png" in capsys.readouterr().out
    with pytest.raises(click.UsageError, match="four times, got 1"):
        main.main(["digits", "--label", "3"], standalone_mode=False)
