"""The conversation and its terminal, by transcript with the small random model."""

import io
import os
import pty
import re
import select
import subprocess
import sys
import time

import pytest

from mlxquant import chat
from mlxquant.chat import Conversation


@pytest.fixture
def talk(tiny, monkeypatch, capsys):
    """Run a scripted conversation; returns (stdout, stderr, conversation)."""

    def run(*lines, **options):
        conversation = Conversation(tiny, max_tokens=12, **options)
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        chat.run(conversation)
        captured = capsys.readouterr()
        return captured.out, captured.err, conversation

    return run


def test_a_piped_conversation_answers_each_line_and_ends(talk):
    out, err, conversation = talk("hello", "", "again")
    assert [m["role"] for m in conversation.messages] == ["user", "assistant"] * 2
    assert out == "".join(m["content"] + "\n" for m in conversation.messages[1::2])
    assert err.count("tokens/s") >= 2


def test_a_turn_does_not_process_the_conversation_again(talk):
    _, _, conversation = talk("hello there, how are you today?", "again")
    assert conversation.last_report.cached_tokens > conversation.last_report.prompt_tokens


def test_commands(talk):
    out, err, conversation = talk("/help", "/stats", "/system", "/system Be brief.", "/system", "/nonsense")
    assert out == "" and conversation.messages == []
    for expected in ("Ctrl-C stops a reply", "no reply yet; 0 of 512 tokens", "(no system prompt)",
                     "(system prompt set", "Be brief.", "no command /nonsense"):
        assert expected in err


def test_exit_leaves_at_once(talk):
    _, _, conversation = talk("/exit", "never asked")
    assert conversation.messages == []


def test_clear_forgets_messages_but_not_the_system_prompt(talk):
    _, err, conversation = talk("hello", "/clear", "/stats", system="Be brief.")
    assert conversation.messages == [] and conversation.system == "Be brief."
    assert "tokens of context in use" in err


def test_the_system_prompt_reaches_the_model(talk):
    _, _, with_system = talk("hello", system="Be brief.")
    _, _, without = talk("hello")
    assert with_system.last_report.prompt_tokens > without.last_report.prompt_tokens


def test_ctrl_c_stops_the_reply_and_keeps_the_session(talk, monkeypatch):
    original, calls = Conversation.reply, []

    def interrupted(self, text):
        pieces = original(self, text)
        calls.append(text)
        if len(calls) > 1:
            yield from pieces
            return
        try:
            yield next(pieces)
            raise KeyboardInterrupt
        finally:
            pieces.close()

    monkeypatch.setattr(Conversation, "reply", interrupted)
    _, err, conversation = talk("hello", "go on")
    assert "(stopped)" in err and len(conversation.messages) == 4
    assert conversation.messages[1]["content"] and conversation.last_report.cached_tokens > 0


def test_ctrl_c_at_the_prompt_keeps_the_session(tiny, monkeypatch, capsys):
    answers = iter([KeyboardInterrupt, "hello", EOFError])

    def read():
        answer = next(answers)
        if isinstance(answer, str):
            return answer
        raise answer

    monkeypatch.setattr(chat, "_reader", lambda: read)
    conversation = Conversation(tiny, max_tokens=3)
    chat.run(conversation)
    assert len(conversation.messages) == 2 and "leaves" in capsys.readouterr().err


def test_a_full_context_is_said_and_survived(talk):
    _, err, conversation = talk("x" * 600, "short")
    assert "error: the prompt has" in err and "the context of" in err
    assert [m["content"] for m in conversation.messages[::2]] == ["short"]


def test_in_a_real_terminal(tiny_folder, tmp_path):
    """Through a pseudo-terminal: the line editor, a reply, Ctrl-D."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "mlxquant", "chat", str(tiny_folder), "--max-tokens", "5"],
        stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
        env=os.environ | {"TERM": "dumb", "PROMPT_TOOLKIT_NO_CPR": "1"})
    os.close(slave)
    seen = _until(master, "> ")
    os.write(master, b"hello\r")
    seen += _until(master, "peak.*> ")
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        os.write(master, b"\x04")  # again, should it come before the editor is back
        _read(master)
    os.close(master)
    assert process.wait(timeout=10) == 0
    assert "/help lists the commands" in seen and "tokens/s" in seen


def _until(terminal: int, pattern: str, patience: float = 120) -> str:
    seen, deadline = "", time.monotonic() + patience
    while not re.search(pattern, seen, re.DOTALL) and time.monotonic() < deadline:
        seen += _read(terminal)
    assert re.search(pattern, seen, re.DOTALL), seen
    return seen


def _read(terminal: int) -> str:
    """What the terminal shows within a second; nothing once the other side has closed it."""
    if not select.select([terminal], [], [], 1)[0]:
        return ""
    try:
        return os.read(terminal, 4096).decode("utf-8", "replace")
    except OSError:
        return ""
