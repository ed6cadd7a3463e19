"""A model that says what a test wrote down, through the real cache, loop and tokenizer."""

import io
import sys
import time

import mlx.core as mx
import mlx.nn as nn
import pytest

import mlxquant  # first: it loads the BLAS before MLX
from mlxquant.chat.conversation import Conversation
from mlxquant.chat.repl import run
from mlxquant.chat.session import Session

REPLIES = [
    "<think>The user greets me. I should be friendly, and show what I can do.</think>\n\n"
    "# Hello\n\nI can write **bold** words, `code`, and lists:\n\n"
    "1. one thing, which is long enough to be wrapped in any narrow window\n"
    "2. another\n\n   with a second paragraph\n3. a third\n\n"
    "```python\ndef area(radius: float) -> float:\n    \"\"\"Of a circle.\"\"\"\n"
    "    return 3.14159 * radius ** 2\n```\n\n"
    "| chip | GB/s |\n|---|---:|\n| M1 Pro | 200 |\n| M4 Max | 546 |\n\nThat is all.",
    "A second answer.",
    "".join(f"Line {i} of many.\n\n" for i in range(40)),
]


class Scripted(nn.Module):
    """Each new prompt gets the next of ``replies``: its tokens one by one, and the end of turn."""

    def __init__(self, network: nn.Module, tokenizer, replies: list[str], seconds: float):
        super().__init__()
        self.inner, self.args = network, network.args
        self._replies = iter([tokenizer.encode(r, add_special_tokens=False) for r in replies])
        self._end, self._seconds = tokenizer.eos_token_id, seconds
        self._next: list[int] = []

    @property
    def layers(self) -> list[nn.Module]:
        return self.inner.layers

    def make_cache(self) -> list:
        return self.inner.make_cache()

    def __call__(self, inputs: mx.array, cache=None) -> mx.array:
        logits = self.inner(inputs, cache=cache)
        if inputs.shape[1] > 1 or (not self._next and inputs.item() != self._end):
            self._next = [*next(self._replies, []), self._end]
        if inputs.shape[1] > 1:  # a prompt but for its last token, whose turn it then is
            return logits
        time.sleep(self._seconds)
        token = self._next.pop(0) if self._next else self._end
        return mx.broadcast_to(50.0 * (mx.arange(logits.shape[-1]) == token), logits.shape)


def scripted(folder, replies=REPLIES, seconds: float = 0.0) -> mlxquant.LanguageModel:
    """The model of ``folder``, saying ``replies``."""
    model = mlxquant.load(str(folder))
    model.network = Scripted(model.network, model.tokenizer, list(replies), seconds)
    return model


def chat_here(folder, seconds: float, log=None, *streams: str) -> None:
    """A chat in this terminal, but for the ``streams`` that go to the file ``log``."""
    for name in streams:
        setattr(sys, name, open(log, "a", buffering=1))  # noqa: SIM115 - until the end
    model = scripted(folder, seconds=seconds)
    run(Session(Conversation(model), scripted))


@pytest.fixture
def talk(tiny_folder, monkeypatch, capsys):
    """Run a scripted conversation; returns (stdout, stderr, conversation)."""

    def start(*lines, replies=("One.", "Two.", "Three."), load=None, **options):
        model = scripted(tiny_folder, replies)
        conversation = Conversation(model, **{"max_tokens": 200, **options})
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        run(Session(conversation, load or (lambda name: scripted(name, ["From another."]))))
        captured = capsys.readouterr()
        return captured.out, captured.err, conversation

    return start


def contents(conversation):
    return [message["content"] for message in conversation.messages]
