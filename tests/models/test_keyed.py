"""Random numbers by row: a split of the batch changes none, compiled ones are the same, and they are uniform."""

from __future__ import annotations

import torch

from tests.threads import threads
from tests.tiny import tiny
from var_ext.models.keyed import PART, Draws, Rows, _mixed, row_keys
from var_ext.models.modules import Dropout


def draws(rows: slice, place: int = 3) -> Draws:
    found = Draws(Rows(), place)
    found.rows.keys = row_keys(5, rows)
    return found


def test_a_split_batch_draws_the_same() -> None:
    whole = draws(slice(0, 7)).halves(torch.Size((7, 3, 5)))
    parts = [draws(slice(a, b)).halves(torch.Size((b - a, 3, 5))) for a, b in ((0, 2), (2, 3), (3, 7))]
    assert torch.equal(whole, torch.cat(parts))


def test_rows_places_and_seeds_draw_different_numbers() -> None:
    words = torch.cat([draws(slice(0, 50), place).words(200).flatten() for place in (0, 1, 2)])
    other = row_keys(6, slice(0, 50))
    assert len(words.unique()) == len(words) and not (other[:, None] == row_keys(5, slice(0, 50))).any()


def test_numbers_are_uniform() -> None:
    numbers = draws(slice(0, 400)).uniform(500)
    assert numbers.min() >= 0 and numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 4 * (1 / 12 / numbers.numel()) ** 0.5  # four standard errors
    for bit in range(0, 64, 7):
        share = (draws(slice(0, 400)).words(500) >> bit & 1).double().mean()
        assert abs(share - 0.5) < 4 * 0.5 / numbers.numel() ** 0.5
    rows, columns = numbers - numbers.mean(1, keepdim=True), numbers - numbers.mean()
    assert abs((rows[1:] * rows[:-1]).mean()) < 4 / 12 / rows[1:].numel() ** 0.5
    assert abs((columns[:, 1:] * columns[:, :-1]).mean()) < 4 / 12 / rows[:, 1:].numel() ** 0.5


def test_many_words_are_hashed_in_parts() -> None:
    """In place and part by part, the words are those of the formula, whatever the number of threads."""
    here = draws(slice(2, 4))
    counter = torch.arange(1, 2 * PART + 8) * here.golden
    formula = _mixed(here.rows.keys[:, None] + here.first + counter)
    for count in (1, 2):
        with threads(count):
            for length in (PART, PART + 1, 2 * PART + 7):
                assert torch.equal(here.words(length), formula[:, :length])


def test_dropout_of_pictures_does_not_depend_on_their_layout() -> None:
    layer = Dropout(0.3)
    layer.draws = draws(slice(0, 3))
    x = torch.randn(3, 5, 7, 6)
    found = [layer(x.contiguous(memory_format=f)) for f in (torch.contiguous_format, torch.channels_last)]
    assert torch.equal(*found) and found[1].is_contiguous(memory_format=torch.channels_last)


def test_dropout_by_row_keeps_the_mean() -> None:
    layer = Dropout(0.3)
    layer.draws = draws(slice(0, 64))
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
    keyed = var(labels, inputs)
    rows.keys = row_keys(0, slice(1, 3))
    torch.testing.assert_close(var(labels[1:], inputs[1:]), keyed[1:])  # sums of products in another order
