"""The conversation goes on after Ctrl-C, a failure, or a text that steers a terminal."""

import io
import sys

import jinja2
import pytest
import scripted as scripts
from scripted import contents, scripted

from mlxquant.base.errors import TooLarge
from mlxquant.chat import terminal
from mlxquant.chat.conversation import Conversation
from mlxquant.chat.repl import handle, run
from mlxquant.chat.session import Session

talk = scripts.talk  # a fixture


def test_a_reply_that_is_cut_says_why(talk):
    _, err, _ = talk("a", replies=["A long reply."], max_tokens=4)
    assert "(cut at 4 tokens; /set max_tokens allows more)" in err
    _, err, _ = talk("x" * 300, replies=["y" * 400], max_tokens=500)
    assert "(cut: the context is full)" in err


def test_ctrl_c_stops_the_reply_and_keeps_the_conversation(tiny_folder, capsys):
    model = scripted(tiny_folder, ["A long reply that goes on.", "Two."])
    session = Session(Conversation(model, max_tokens=100))
    feed, fed = session._screen.feed, []

    def interrupted(parts):
        fed.append(parts)
        feed(parts)
        if len(fed) == 8:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGINT)

    session._screen.feed = interrupted
    handle(session, "hello")
    handle(session, "go on")
    assert "(stopped)" in capsys.readouterr().err
    kept = contents(session.conversation)
    assert "A long reply that goes on.".startswith(kept[1]) and 0 < len(kept[1]) < 20
    assert kept[2:] == ["go on", "Two."]
    assert session.conversation.last_report.cached_tokens > 0


def test_ctrl_c_while_the_prompt_is_read_keeps_the_conversation(tiny_folder, capsys):
    session = Session(Conversation(scripted(tiny_folder, ["One.", "Two."])))
    reading = session._reading

    def once(interrupted):
        session._reading = reading
        return reading(lambda: True)

    session._reading = once
    handle(session, "hello")
    handle(session, "again")
    assert "(stopped)" in capsys.readouterr().err
    kept = contents(session.conversation)
    assert kept[:3] == ["hello", "", "again"] and kept[3]


def test_ctrl_c_at_the_prompt_keeps_the_session(tiny_folder, monkeypatch, capsys):
    answers = iter([KeyboardInterrupt, "hello", EOFError])

    def read(_):
        answer = next(answers)
        if isinstance(answer, str):
            return answer
        raise answer

    monkeypatch.setattr(terminal, "reader", lambda names, status: read)
    session = Session(Conversation(scripted(tiny_folder)))
    run(session)
    assert len(session.conversation.messages) == 2 and "leaves" in capsys.readouterr().err


def test_an_unexpected_failure_keeps_the_conversation(tiny_folder, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("MLXQUANT_STATE", str(tmp_path))
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nagain\n"))
    session = Session(Conversation(scripted(tiny_folder)))
    answer = session.answer
    monkeypatch.setattr(session, "answer", lambda text: answer(text) if text == "hello" else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(session)
    assert "the conversation is kept" in capsys.readouterr().err
    back = Session(Conversation(scripted(tiny_folder)))
    handle(back, f"/load {tmp_path}/kept.json")
    assert contents(back.conversation)[0] == "hello"


@pytest.mark.parametrize("failure", [
    RuntimeError("[malloc] Unable to allocate"), MemoryError(), OSError(28, "No space left")])
def test_a_failure_of_mlx_or_the_system_is_one_line_and_the_chat_goes_on(
        tiny_folder, monkeypatch, capsys, failure):
    session, failing = Session(Conversation(scripted(tiny_folder, ["One."]))), [failure]
    answer = session.answer

    def once(text):
        if failing:
            raise failing.pop()
        answer(text)

    monkeypatch.setattr(session, "answer", once)
    handle(session, "hello")
    handle(session, "again")
    assert capsys.readouterr().err.count("error: ") == 1
    assert contents(session.conversation) == ["again", "One."]


def test_no_command_ends_the_chat(talk, monkeypatch):
    from mlxquant.chat import commands

    monkeypatch.setattr(commands, "generate", lambda *_, **__: 1 / 0)
    _, err, conversation = talk("/set seed -1", "/set temperature 1", "a", "/bench", "b")
    assert contents(conversation)[::2] == ["a", "b"]
    assert "error: ZeroDivisionError: division by zero" in err


def test_a_conversation_that_cannot_be_kept_hides_no_failure(
        tiny_folder, monkeypatch, tmp_path, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MLXQUANT_STATE", str(tmp_path / "file"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    session = Session(Conversation(scripted(tiny_folder)))
    monkeypatch.setattr(session, "answer", lambda text: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(session)
    assert "cannot be kept: cannot write" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("failure", [TooLarge("too large"), KeyboardInterrupt()])
def test_a_way_back_that_fails_too_loses_no_conversation(talk, tiny_folder, tmp_path, failure):
    failing = [failure, failure]

    def load(name):
        if failing:
            raise failing.pop()
        return scripted(name, ["From another."])

    out, err, conversation = talk(
        "a", f"/model {tiny_folder}", "b", "/bench", f"/save {tmp_path}/talk", "/clear",
        f"/load {tmp_path}/talk", f"/model {tiny_folder}", "c", load=load)
    assert err.count("error: no model is loaded; /model NAME loads one") == 2
    assert "(saved: " in err and out == "One.\nFrom another.\n"
    assert contents(conversation) == ["a", "One.", "c", "From another."]


def test_what_is_not_utf8_is_refused_and_the_chat_goes_on(talk):
    _, err, conversation = talk("caf\udce9", "hello")  # as main() has standard input decoded
    assert contents(conversation) == ["hello", "One."] and "is not text in UTF-8" in err


def test_a_reply_steers_no_terminal_from_a_plain_screen_or_a_remark(talk):
    attack = "a\x1b[2Jb\x9bc\x07\u202ed\u2066e\u200ff"
    out, err, conversation = talk("/set thoughts shown", "x", "/show thoughts",
                                  replies=[f"<think>{attack}</think>{attack}"])
    assert out == "a[2Jbcdef\n" and err.count("a[2Jbcdef") == 2
    assert contents(conversation)[1].count(attack) == 2


def test_a_template_that_refuses_is_one_line(talk, capsys):
    def refusing(messages, *args, **kwargs):
        if messages[0]["role"] == "system":
            raise jinja2.TemplateError("System role not supported")
        return "hi"

    conversation = talk("hello")[2]
    conversation.system = "Be brief."  # as of a model whose template had a place for it
    conversation.model.tokenizer._chat_template = refusing
    session = Session(conversation)
    before = list(conversation.messages)
    handle(session, "hi")
    assert conversation.messages == before
    assert "refuses these messages: System" in capsys.readouterr().err
    handle(session, "/system none")
    handle(session, "hi")
    assert contents(conversation)[::2] == ["hello", "hi"]
