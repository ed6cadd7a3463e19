"""Conversations that a chat model holds with itself, as training data where texts have none.

As in Magpie (Xu et al. 2024, https://arxiv.org/abs/2406.08464): a chat model that is given its own
template up to the user's turn writes a question that a user might ask; given the template's tokens
before the assistant's turn, it answers; and so on. Nothing but the model is needed, and the data
resemble its use.
"""

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from mlxquant.base.errors import BadValue, Unsupported
from mlxquant.model.loading import LanguageModel
from mlxquant.quantise.self_written import at_once, write_on

# For answers, and for questions: answers are to be as in use, questions varied.
_TEMPERATURES, _LONGEST = (0.7, 1.0), (256, 64)
_PLACES = "THE USER SPEAKS HERE", "THE MODEL SPEAKS HERE", "THE USER SPEAKS AGAIN"


def converse(model: LanguageModel, samples: int, length: int, seed: int = 0,
             batch: int | None = None,
             progress: Callable[[int, int], None] = lambda *_: None) -> np.ndarray:
    """``samples`` rows of ``length`` tokens, int64: each the beginning of one conversation, with
    questions of at most 64 tokens and answers of at most 256.

    ``batch`` are held in each pass, by default as many as memory allows
    (``self_written.at_once``); ``progress`` is told the rows done, and all. Raises ``Unsupported``
    for a model without a chat template or whose template does not show where somebody speaks,
    ``BadValue`` for a ``length`` that the template alone fills.
    """
    opening, *between = _template(model)
    if len(opening) >= length:
        raise BadValue(f"a window of {length} tokens holds no conversation, the template of "
                       f"{model.name} begins with {len(opening)}")
    batch, rows = batch or at_once(model, length), []
    for done in range(0, samples, batch):
        count = min(batch, samples - done)
        turns = _Turns(count, between, model.tokenizer.eos_token_ids, mx.random.key(seed + done))
        rows.append(write_on(model, mx.array([opening] * count), length, turns.choose))
        progress(done + count, samples)
    return np.concatenate(rows).astype(np.int64)


class _Turns:
    """Which speaker's turn it is in each row, and how many template tokens must come before it.

    ``between`` are the template's tokens before the model's turn, and before the user's; ``ends``
    are the tokens that end a turn. All state is in arrays on the device, so that a step can be
    queued before the last one is computed: waiting for each step took most of the time.
    """

    def __init__(self, rows: int, between: list[list[int]], ends: set[int], key: mx.array):
        self._lengths = mx.array([len(tokens) for tokens in between])
        # One column more than needed is read by rows that are given nothing.
        columns = max(map(len, between)) + 1
        self._between = mx.array([tokens + [0] * (columns - len(tokens)) for tokens in between])
        self._temperatures, self._longest = mx.array(_TEMPERATURES), mx.array(_LONGEST)
        self._ends, self._key = mx.array(sorted(ends)), key
        self._asking = mx.ones(rows, mx.int32)
        self._spoken, self._left = mx.zeros(rows, mx.int32), mx.zeros(rows, mx.int32)

    def choose(self, logits: mx.array) -> mx.array:
        """The next token of each row: of the template, or drawn; a turn has at least one token."""
        self._key, key = mx.random.split(self._key)
        ends = (mx.arange(logits.shape[-1])[:, None] == self._ends).any(-1)
        silent = (self._spoken == 0)[:, None]
        logits = logits / self._temperatures[self._asking][:, None]
        drawn = mx.random.categorical(mx.where(silent & ends, -mx.inf, logits), key=key)
        done = ends[drawn] | (self._spoken >= self._longest[self._asking])
        ended = (self._left == 0) & done
        self._asking = mx.where(ended, 1 - self._asking, self._asking)
        self._left = mx.where(ended, self._lengths[self._asking], self._left)
        given = self._left > 0
        place = self._lengths[self._asking] - self._left
        tokens = mx.where(given, self._between[self._asking, place], drawn)
        self._spoken = mx.where(ended, 0, self._spoken) + ~given
        self._left = self._left - given
        return tokens


def _template(model: LanguageModel) -> list[list[int]]:
    """The template's tokens before the user speaks first, before the model does, and before the
    user does again."""
    if not model.tokenizer.has_chat_template:
        raise Unsupported(f"{model.name} has no chat template, so it cannot talk to itself")
    messages = [{"role": role, "content": place}
                for role, place in zip(("user", "assistant", "user"), _PLACES)]
    rest = model.tokenizer.apply_chat_template(messages, add_generation_prompt=False,
                                               tokenize=False)
    parts = []
    for place in _PLACES:
        part, found, rest = rest.partition(place)
        if not found or not part:
            raise Unsupported(f"the template of {model.name} puts nothing before what somebody "
                              "says")
        parts.append(model.tokenizer.encode(part, add_special_tokens=False))
    return parts
