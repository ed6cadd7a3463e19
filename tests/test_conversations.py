"""Conversations of a model with itself: in its template from the first token, the same for the same seed."""

import dataclasses

import mlxquant  # first: it loads the BLAS before MLX
import numpy as np
import pytest
from conftest import CONFIG, random_network, write_folder

from mlxquant.errors import Unsupported
from mlxquant.quant import conversations
from mlxquant.quant.calibration import Calibration


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A random model that says something else at each token, which one with tied embeddings does not."""
    config = CONFIG | {"tie_word_embeddings": False}
    return mlxquant.load(str(write_folder(tmp_path_factory.mktemp("models") / "talker", random_network(config), config)))


def test_rows_are_conversations_in_the_models_template(talker):
    told = []
    rows = conversations.converse(talker, 3, 300, seed=1, batch=4, progress=lambda *done: told.append(done))
    assert rows.shape == (3, 300) and rows.dtype == np.int64 and told[-1] == (3, 3)
    for row in rows:
        text = talker.tokenizer.decode(row.tolist())
        assert text.startswith("<|im_start|>user\n")
        assert "<|im_start|>assistant\n" in text[:700]
    assert (rows == conversations.converse(talker, 3, 300, seed=1, batch=4)).all()
    assert (rows != conversations.converse(talker, 3, 300, seed=2, batch=4)).any()


def test_a_model_without_a_template_or_a_question_cannot_talk(tiny):
    class Mute:
        has_chat_template = False

    with pytest.raises(Unsupported, match="no chat template"):
        conversations.converse(dataclasses.replace(tiny, tokenizer=Mute()), 1, 10)
    with pytest.raises(Unsupported, match="writes nothing where a user would speak"):
        conversations.converse(tiny, 1, 10)  # says one blank after the other


def test_they_are_drawn_as_often_as_each_text():
    texts = Calibration(np.zeros((9, 4), np.int64), "a.txt, b.txt")
    talks = np.arange(1, 9).reshape(2, 4)
    mixed = conversations.mixed_in(texts, talks, 3)
    changed = mixed.tokens.any(axis=1)
    assert list(changed) == [False, False, True] * 3 and not texts.tokens.any()
    assert all(any((row == talk).all() for talk in talks) for row in mixed.tokens[changed])
    assert "2 windows of conversations" in mixed.source


def test_as_many_conversations_at_once_as_keys_and_values_allow(talker, monkeypatch):
    assert conversations._at_once(talker, 10**6) == 64
    assert conversations._at_once(talker, 10 * 320 + 5) == 10
    position = 2 * 4 * len(talker.network.layers) * CONFIG["num_key_value_heads"] * CONFIG["head_dim"]  # float32
    monkeypatch.setattr(conversations, "_CACHE_BYTES", 5.5 * 320 * position)
    assert conversations._at_once(talker, 10**6) == 5
