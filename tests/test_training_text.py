"""The text of tuning: what is held out of it, and what the teacher writes of it."""

import numpy as np
import pytest
from conftest import CONFIG

from mlxquant.base.errors import BadValue
from mlxquant.model import windows
from mlxquant.quantise import calibration, self_written


class Counting:
    """A tokenizer of which every token is its place in the text."""

    def encode(self, text, **_):
        return list(range(len(text)))


def test_what_is_held_out_is_in_no_window_of_training(monkeypatch):
    monkeypatch.setattr(windows, "read_text", lambda name: "x" * 1000)
    training, held = calibration.held_apart(Counting(), ["a.txt", "b.txt"], 300, 40, 30,
                                            vocabulary=1000)
    assert training.tokens.shape == (300, 30) and held.tokens.shape == (40, 30)
    assert training.tokens.max() < 950 <= held.tokens.min()
    # a twentieth is less than a window
    training, held = calibration.held_apart(Counting(), ["a.txt"], 300, 40, 400, vocabulary=1000)
    assert training.tokens.max() < 600 <= held.tokens.min()
    with pytest.raises(BadValue, match="there must be 2"):
        calibration.held_apart(Counting(), ["a.txt"], 1, 1, 501, vocabulary=1000)


def test_a_digest_knows_how_tokens_are_cut_into_sequences():
    cut = {calibration.Calibration(np.zeros(shape, np.int64), "").digest
           for shape in ((2, 32), (4, 16), (4, 16))}
    assert len(cut) == 2


def test_what_the_teacher_writes_replaces_its_share():
    texts = calibration.Calibration(np.zeros((9, 4), np.int64), "a.txt, b.txt")
    talks = np.arange(1, 9).reshape(2, 4)
    mixed = texts.mixed_with(talks, 1 / 3, "talks")
    changed = mixed.tokens.any(axis=1)
    assert changed.sum() == 3 and not texts.tokens.any() and mixed.source == "a.txt, b.txt, 2 talks"
    assert all(any((row == talk).all() for talk in talks) for row in mixed.tokens[changed])


def test_the_teacher_goes_on_from_what_it_is_given(tiny):
    starts, told = np.array([[5, 6, 7], [8, 9, 10]]), []
    rows = self_written.self_written(
        tiny, 5, 20, batch=2, starts=starts, progress=lambda *done: told.append(done)
    ).tokens
    assert rows.shape == (5, 20) and (rows[:, :3] == starts[[0, 1, 0, 1, 0]]).all()
    assert told == [(2, 5), (4, 5), (5, 5)]
    assert (rows == self_written.self_written(tiny, 5, 20, batch=2, starts=starts).tokens).all()


def test_as_many_sequences_at_once_as_keys_and_values_allow(tiny, monkeypatch):
    heads = CONFIG["num_hidden_layers"] * CONFIG["num_key_value_heads"]
    position = 2 * 4 * heads * CONFIG["head_dim"]  # float32
    for sequences, at_once in ((5.5, 4), (4, 4), (0.5, 1), (10**6, 512)):
        monkeypatch.setattr(self_written, "memory_limit",
                            lambda n=sequences: int(8 * n * 100 * position))
        assert self_written.at_once(tiny, 100) == at_once
