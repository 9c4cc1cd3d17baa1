"""The built-in scores against their definitions; each is that of the image alone, whatever the batch."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.evaluation.test_efficientnet_lite0 import random_network
from tests.models.conftest import small_pair
from var_ext import Sampler
from var_ext.checkpoints import CheckpointError
from var_ext.checkpoints.digests import digest_of_entries
from var_ext.evaluation import Classifier, DigitsJudge, JudgeMargin, Likelihood, named_score
from var_ext.evaluation.judge import Labelled

LABELS = torch.tensor([0, 3, 1, 4, 2, 3])


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    return Sampler(*small_pair(), defaults={"cfg": 2.0, "top_k": 12, "top_p": 0.9})


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 5)).eval()


# ---------------------------------------------------------------------- classifier


@torch.no_grad()
def test_a_classifier_says_how_probable_the_label_is() -> None:
    net, images = network(), torch.rand(6, 3, 8, 8)
    found = Classifier(net, 5)(images, LABELS)
    wanted = torch.stack([net(images)[i].softmax(0)[label] for i, label in enumerate(LABELS)])
    torch.testing.assert_close(found, wanted.double(), rtol=1e-5, atol=0)  # float32 sums in another order
    alone = torch.cat([Classifier(net, 5)(images[i : i + 1], LABELS[i : i + 1]) for i in range(6)])
    assert found.dtype == torch.float64 and torch.equal(found, alone)
    assert Classifier(net, 5)(images[:0], LABELS[:0]).shape == (0,)


def test_any_callable_is_a_classifier(sampler: Sampler) -> None:
    score = Classifier(lambda images: images.mean((2, 3)) @ torch.eye(3, 5), 5)
    best = sampler.best_of(LABELS.repeat(4), range(24), score, 1, batch_size=5)
    assert best.labels.tolist() == [0, 3, 1, 4, 2] and score.digest is None


def test_digests_tell_classifiers_apart() -> None:
    net = network()
    assert (
        Classifier(net, 5).digest
        == digest_of_entries(net.state_dict())
        != Classifier(net, 5, digest="a").digest
    )
    with torch.no_grad():
        first, _ = Classifier(net, 5).digest, net[0].weight.mul_(2)  # type: ignore[index, union-attr, operator]
    assert Classifier(net, 5).digest != first


def test_other_classifiers_are_refused() -> None:
    images = torch.rand(6, 3, 8, 8)
    with pytest.raises(ValueError, match=r"must return logits of shape \(1, 7\), .* got \(1, 5\)"):
        Classifier(network(), 7)(images, LABELS)
    with pytest.raises(ValueError, match=r"knows the labels 0..4, got 5"):
        Classifier(network(), 5)(images, LABELS + 1)  # 5 is "no class"
    with pytest.raises(ValueError, match="must be in evaluation mode"):
        Classifier(network().train(), 5)


# ---------------------------------------------------------------------- likelihood


@torch.no_grad()
def test_likelihood_is_the_mean_over_tokens_drawn_scale_by_scale(sampler: Sampler) -> None:
    """Against the logits of each scale alone, from the tokens of the coarser ones."""
    tokens = sampler.tokens(LABELS, range(6))
    vae, var, slices = sampler.vae, sampler.var, sampler.vae.schedule.slices
    wanted = torch.zeros(6, dtype=torch.float64)
    for k, scale in enumerate(slices):
        maps = [tokens[:, each] for each in slices[: k + 1]]
        logits = var(LABELS, vae.quantize.idxBl_to_var_input(maps))[:, scale].double()
        for i in range(6):
            for place, token in enumerate(tokens[i, scale].tolist()):
                wanted[i] += logits[i, place, token] - logits[i, place].logsumexp(0)
    found = Likelihood(sampler)(tokens, LABELS)
    # float32 sums and a float32 softmax of 24 codes, averaged over 30 tokens
    torch.testing.assert_close(found, wanted / tokens.shape[1], rtol=1e-5, atol=0)
    assert found.dtype == torch.float64 and (found < 0).all()


def test_likelihood_is_of_the_image_alone(sampler: Sampler) -> None:
    tokens, score = sampler.tokens(LABELS, range(6)), Likelihood(sampler)
    alone = torch.cat([score(tokens[i : i + 1], LABELS[i : i + 1]) for i in range(6)])
    assert torch.equal(score(tokens, LABELS), alone)
    one, two = (sampler.best_of(LABELS.repeat(3), range(18), score, 1, batch_size=size) for size in (4, 18))
    assert torch.equal(one.scores, two.scores) and torch.equal(one.images, two.images)


def test_likelihood_knows_the_class_and_prefers_greedy_drawing(sampler: Sampler) -> None:
    tokens, score = sampler.tokens(LABELS, range(6)), Likelihood(sampler)
    assert not torch.equal(score(tokens, LABELS), score(tokens, (LABELS + 1) % 5))
    greedy = sampler.tokens(LABELS, range(6), top_k=1, cfg=0)
    assert (score(greedy, LABELS) > score(sampler.tokens(LABELS, range(6), top_k=0, top_p=0), LABELS)).all()


def test_likelihood_needs_the_weights() -> None:
    with pytest.raises(ValueError, match="got a sampler that frees them: release=False"):
        Likelihood(Sampler(*small_pair(), precision="bf16", release=True))


# ---------------------------------------------------------------------- judge


def test_the_judge_is_sure_of_real_digits(judge: DigitsJudge) -> None:
    score = JudgeMargin(judge)
    images, labels = judge.real.images[:60, None].expand(-1, 3, -1, -1), judge.real.labels[:60]
    found = score(images, labels)
    right = judge.predict(judge.real.images[:60]) == labels
    assert found.shape == (60,) and found.dtype == torch.float64
    assert (found[right] > 0).all()
    assert (score(images, (labels + 1) % 10)[right] < 0).all()
    alone = torch.cat([score(images[i : i + 1], labels[i : i + 1]) for i in range(60)])
    assert torch.equal(found, alone)
    assert torch.equal(found, judge.margins(Labelled(judge.real.images[:60], labels)))
    with pytest.raises(ValueError, match=r"knows the labels 0..9, got 10"):
        score(images, labels + 1)


def test_the_judges_digest_is_of_what_it_learned(judge: DigitsJudge) -> None:
    assert judge.digest == DigitsJudge(8, "val").digest != DigitsJudge(16).digest


# ---------------------------------------------------------------------- by name


class Drawing:
    """Stands for a sampler of ImageNet."""

    num_classes, image_size, device = 1000, 64, torch.device("cpu")


@torch.no_grad()
def test_a_file_is_a_classifier_of_imagenet(tmp_path: Path) -> None:
    file, sampler = tmp_path / "lite0.pth", Drawing()
    torch.save(random_network().state_dict(), file)
    score = named_score(f"classifier:{file}", sampler)  # type: ignore[arg-type]
    images, labels = torch.rand(3, 3, 64, 64), torch.tensor([0, 417, 999])
    found = score(images, labels)
    assert isinstance(score, Classifier) and isinstance(score.network, nn.Module)
    wanted = score.network(images).softmax(1)[torch.arange(3), labels]
    torch.testing.assert_close(found, wanted.double(), rtol=1e-4, atol=0)
    assert torch.equal(found[1:2], score(images[1:2], labels[1:2]))
    assert score.digest == hashlib.sha256(file.read_bytes()).hexdigest()


def test_names_are_those_of_scores(sampler: Sampler) -> None:
    assert isinstance(named_score("likelihood", sampler), Likelihood)


@pytest.mark.parametrize(
    ("name", "model", "error", "message"),
    [
        (
            "classifier",
            Drawing(),
            ValueError,
            r"must name its file, classifier:FILE, the wheel .*; got 'classifier'",
        ),
        ("classifier:", Drawing(), ValueError, "must name its file"),
        ("classifier:FILE/no.pth", Drawing(), CheckpointError, "no.pth"),
        ("classifier:FILE/no.whl", Drawing(), CheckpointError, "could not read .*no.whl"),
        ("classifier:FILE/empty.whl", Drawing(), CheckpointError, "must hold one .pth file, got 0"),
        (
            "classifier:FILE/no.pth",
            None,
            ValueError,
            "tells 1000 classes, ImageNet's, and the model draws 5: take",
        ),
        ("judge", None, ValueError, "must have 10 classes to draw digits, got 5"),
        ("clip", None, ValueError, "score must be classifier:FILE, likelihood or judge, got 'clip'"),
        ("judge:FILE", None, ValueError, "score must be classifier:FILE, likelihood or judge, got 'judge:"),
        ("", None, ValueError, "got ''"),
    ],
)
def test_bad_names_are_refused(
    sampler: Sampler, tmp_path: Path, name: str, model: Any, error: type[Exception], message: str
) -> None:
    with zipfile.ZipFile(tmp_path / "empty.whl", "w") as wheel:
        wheel.writestr("a.txt", "")
    with pytest.raises(error, match=message):
        named_score(name.replace("FILE", str(tmp_path)), model or sampler)
