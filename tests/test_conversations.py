"""Conversations of a model with itself: in its template, the same for the same seed."""

import dataclasses

import mlx.core as mx
import numpy as np
import pytest
from conftest import CONFIG, random_network, write_folder

import mlxquant  # first: it loads the BLAS before MLX
from mlxquant.base.errors import BadValue, Unsupported
from mlxquant.quantise import conversations


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A random model that says something else at each token; one with tied embeddings does not."""
    config = CONFIG | {"tie_word_embeddings": False}
    return mlxquant.load(str(write_folder(tmp_path_factory.mktemp("models") / "talker",
                                          random_network(config), config)))


def test_rows_are_conversations_in_the_models_template(talker):
    told = []
    rows = conversations.converse(talker, 3, 160, seed=1, batch=4,
                                  progress=lambda *done: told.append(done))
    assert rows.shape == (3, 160) and rows.dtype == np.int64 and told[-1] == (3, 3)
    for row in rows:
        text = talker.tokenizer.decode(row.tolist())
        assert text.startswith("<|im_start|>user\n")
        assert "<|im_start|>assistant\n" in text[:700]
    assert (rows == conversations.converse(talker, 3, 160, seed=1, batch=4)).all()
    assert (rows != conversations.converse(talker, 3, 160, seed=2, batch=4)).any()


def test_what_has_no_room_to_talk_is_refused(tiny):
    class Mute:
        has_chat_template = False

    class Bare:
        has_chat_template = True

        def apply_chat_template(self, messages, **_):
            return "\n".join(message["content"] for message in messages)

    with pytest.raises(Unsupported, match="no chat template"):
        conversations.converse(dataclasses.replace(tiny, tokenizer=Mute()), 1, 10)
    with pytest.raises(BadValue,
                       match="a window of 6 tokens holds no conversation, .* begins with 6"):
        conversations.converse(tiny, 1, 6)
    with pytest.raises(Unsupported, match="puts nothing before"):
        conversations.converse(dataclasses.replace(tiny, tokenizer=Bare()), 1, 100)


def test_turns_end_where_a_speaker_does_or_has_said_enough():
    ends, said, terse, wordy = 2, 5, [], []
    logits = np.zeros((2, 30), np.float32)
    logits[0, ends], logits[:, said] = 2000, 1000  # the first row would rather say nothing
    turns = conversations._Turns(2, [[10, 11], [20, 21, 22]], {ends}, mx.random.key(0))
    for _ in range(400):
        for row, token in zip((terse, wordy), np.array(turns.choose(mx.array(logits)))):
            row.append(int(token))
    assert terse[:12] == [said, 10, 11, said, 20, 21, 22, said, 10, 11, said, 20]
    assert wordy[:400] == [*[said] * 64, 10, 11, *[said] * 256, 20, 21, 22, *[said] * 64, 10, 11,
                           *[said] * 9]
