"""Conversations that a chat model holds with itself, to train on where texts hold none.

As in Magpie (Xu et al. 2024, https://arxiv.org/abs/2406.08464): given its own template up to where a user
speaks, a chat model writes what a user might ask; given that, it answers. Nothing but the model is needed, and what it
is trained on is what it is used for.
"""

from dataclasses import replace
from typing import Callable

import numpy as np

from mlxquant.batch import batch_generate
from mlxquant.errors import Unsupported
from mlxquant.loading import LanguageModel
from mlxquant.quant.calibration import at_once
from mlxquant.sampling import Sampling

_ASKS, _ANSWERS = Sampling(temperature=1.0), Sampling(temperature=0.7)  # many questions, answers as in use
_LONGEST_QUESTION, _LONGEST_ANSWER = 64, 256
_MOST_AT_ONCE = 256  # a pass costs a small model on a GPU the same for one conversation as for many
_PLACE = "THE USER SPEAKS HERE"


def converse(model: LanguageModel, samples: int, length: int, seed: int = 0, batch: int | None = None,
             progress: Callable[[int, int], None] = lambda *_: None) -> np.ndarray:
    """``samples`` rows of ``length`` tokens, int64: one conversation after the other from the start of a row.

    ``batch`` conversations are held at a time; by default as many as memory allows (``calibration.at_once``), no more
    than are needed for sure, and at most 256. ``progress`` is told the rows that are full, and all. Raises
    ``Unsupported`` for a model without a chat template, or that has nothing to ask.
    """
    longest = _LONGEST_QUESTION + _LONGEST_ANSWER
    opening, batch = _opening(model), batch or at_once(model, longest, min(_MOST_AT_ONCE, samples * length // longest))
    rows: list[list[int]] = [[]]
    while len(rows) <= samples:
        questions = batch_generate(model, [opening] * batch, max_tokens=_LONGEST_QUESTION,
                                   sampling=replace(_ASKS, seed=seed), batch_size=batch).texts
        asked = [[{"role": "user", "content": text.strip()}] for text in questions if text.strip()]
        seed += 1
        if not asked:
            raise Unsupported(f"{model.name} writes nothing where a user would speak")
        answers = batch_generate(model, asked, max_tokens=_LONGEST_ANSWER, sampling=replace(_ANSWERS, seed=seed),
                                 batch_size=batch).texts
        for messages, answer in zip(asked, answers):
            messages.append({"role": "assistant", "content": answer.strip()})
            rows[-1] += model.tokenizer.apply_chat_template(messages, add_generation_prompt=False)
            if len(rows[-1]) >= length:
                rows[-1] = rows[-1][:length]
                rows.append([])
        progress(min(len(rows) - 1, samples), samples)
    return np.array(rows[:samples], np.int64)


def _opening(model: LanguageModel) -> list[int]:
    """The template's tokens up to where a user speaks."""
    if not model.tokenizer.has_chat_template:
        raise Unsupported(f"{model.name} has no chat template, so it cannot talk to itself")
    text = model.tokenizer.apply_chat_template([{"role": "user", "content": _PLACE}], add_generation_prompt=False,
                                               tokenize=False)
    before, found, _ = text.partition(_PLACE)
    if not found or not before:
        raise Unsupported(f"the template of {model.name} puts nothing before what a user says")
    return model.tokenizer.encode(before, add_special_tokens=False)
