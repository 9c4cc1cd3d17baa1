"""Random numbers by row: a split of the batch changes none, compiled ones are the same, and they are uniform."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.ops import oracle
from tests.tiny import tiny
from var_ext.models.keyed import Draws, Rows, row_keys
from var_ext.models.modules import Dropout
from var_ext.splitmix64 import GOLDEN, words


def draws(rows: slice, place: int = 3) -> Draws:
    found = Draws(Rows(), place)
    found.rows.keys = row_keys(5, rows)
    return found


def words_of(rows: slice, place: int, count: int) -> Tensor:
    here = draws(rows, place)
    return words(here.rows.keys, here.counter, count)


def keyed(rate: float, rows: slice) -> Dropout:
    layer = Dropout(rate)
    layer.draws = draws(rows)
    return layer


def test_words_are_those_of_the_definition() -> None:
    here = draws(slice(2, 4))
    wanted = [
        [oracle.splitmix64(key + int(here.counter[0]) + GOLDEN * (i + 1)) for i in range(9)]
        for key in here.rows.keys.tolist()
    ]
    found = words(here.rows.keys, here.counter, 9)
    assert [[word % 2**64 for word in row] for row in found.tolist()] == wanted


def test_compiled_words_are_the_same() -> None:
    here = draws(slice(0, 3))
    compiled = torch.compile(words, dynamic=True, fullgraph=True)
    for count in (7, 100):
        args = here.rows.keys, here.counter, count
        assert torch.equal(compiled(*args), words(*args))


def test_rows_places_and_seeds_draw_different_numbers() -> None:
    found = torch.cat([words_of(slice(0, 50), place, 200).flatten() for place in (0, 1, 2)])
    other = row_keys(6, slice(0, 50))
    assert len(found.unique()) == len(found) and not (other[:, None] == row_keys(5, slice(0, 50))).any()


def test_numbers_are_uniform() -> None:
    numbers = draws(slice(0, 400)).uniform(500)
    assert numbers.min() >= 0 and numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 4 * (1 / 12 / numbers.numel()) ** 0.5  # four standard errors
    for bit in range(0, 64, 7):
        share = (words_of(slice(0, 400), 3, 500) >> bit & 1).double().mean()
        assert abs(share - 0.5) < 4 * 0.5 / numbers.numel() ** 0.5
    rows, columns = numbers - numbers.mean(1, keepdim=True), numbers - numbers.mean()
    assert abs((rows[1:] * rows[:-1]).mean()) < 4 / 12 / rows[1:].numel() ** 0.5
    assert abs((columns[:, 1:] * columns[:, :-1]).mean()) < 4 / 12 / rows[:, 1:].numel() ** 0.5


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        ((2, 24), ["011111001010100110001101", "111110111000010111100111"]),
        ((2, 3, 2, 2), ["010011011110", "111011101010"]),
    ],
    ids=str,
)
def test_dropout_keeps_what_it_kept_before(
    either_backend: str, shape: tuple[int, ...], wanted: list[str]
) -> None:
    """A run that an earlier version began goes on with the same numbers."""
    kept = keyed(0.3, slice(0, 2))(torch.ones(shape)).flatten(1) != 0
    assert ["".join(str(int(bit)) for bit in row) for row in kept] == wanted


def test_dropout_of_a_split_batch_is_the_same(either_backend: str) -> None:
    x = torch.randn(7, 3, 5)
    parts = [keyed(0.3, slice(a, b))(x[a:b]) for a, b in ((0, 2), (2, 3), (3, 7))]
    assert torch.equal(keyed(0.3, slice(0, 7))(x), torch.cat(parts))


def test_compiled_dropout_is_the_same(either_backend: str) -> None:
    """In bfloat16, contiguous: loops one by one, which a constant step would end early."""
    layer = keyed(0.3, slice(0, 2))
    x, grad = torch.randn(2, 2, 32, 16, 16).bfloat16()
    found = []
    for call in (layer, torch.compile(layer, fullgraph=True)):
        leaf = x.detach().requires_grad_()
        y = call(leaf)
        found.append((y.detach(), *torch.autograd.grad(y, leaf, grad)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_dropout_by_row_keeps_the_mean() -> None:
    layer = keyed(0.3, slice(0, 64))
    dropped = layer(torch.ones(64, 1000))
    assert abs((dropped == 0).float().mean() - 0.3) < 4 * (0.21 / 64000) ** 0.5
    torch.testing.assert_close(dropped[dropped > 0].unique(), torch.tensor([1 / 0.7]), rtol=1e-4, atol=0)
    assert torch.equal(layer.eval()(torch.ones(64, 10)), torch.ones(64, 10))


def test_a_model_without_keys_draws_from_torchs_generators() -> None:
    vae, var = tiny()
    labels, inputs = torch.tensor([0, 1, 2]), torch.randn(3, 20, vae.Cvae)
    var.train().cond_drop_rate = 0.5
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(var(labels, inputs))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    rows = var.key_rows(torch.device("cpu"))
    rows.keys = row_keys(0, slice(0, 3))
    by_row = var(labels, inputs)
    rows.keys = row_keys(0, slice(1, 3))
    torch.testing.assert_close(var(labels[1:], inputs[1:]), by_row[1:])  # sums of products in another order
