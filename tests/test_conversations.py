"""Conversations of a model with itself: in its template from the first token, the same for the same seed."""

import dataclasses

import mlxquant  # first: it loads the BLAS before MLX
import numpy as np
import pytest
from conftest import CONFIG, random_network, write_folder

from mlxquant.batch import BatchResponse
from mlxquant.errors import Unsupported
from mlxquant.quant import conversations


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


def test_no_more_are_held_at_once_than_are_needed(talker, monkeypatch):
    asked = []

    def batch_generate(model, prompts, **options):
        asked.append(len(prompts))
        return BatchResponse(("a word " * 200,) * len(prompts), (), (), None)

    monkeypatch.setattr(conversations, "batch_generate", batch_generate)
    conversations.converse(talker, 10, 320)
    assert set(asked) == {8}  # 320 tokens at most for a question and its answer, and a power of two
