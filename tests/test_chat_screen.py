"""What a terminal shows: through an emulated one, and the whole chat through a pseudo-terminal."""

import functools
import os
import pty
import re
import select
import signal
import sys
import termios
import time
from pathlib import Path

import pyte
import pytest
from commands import Command
from rich.console import Console
from scripted import chat_here

from mlxquant.base.text import clean
from mlxquant.chat import markdown, session, terminal
from mlxquant.chat.screen import LiveScreen
from mlxquant.runtime.reply import ReplyPart

TEXT = ("# Title\n\nA paragraph with **bold** text that is longer than forty columns are wide.\n\n"
        "1. one\n2. two\n\n   more of two\n\n```python\nx = 1  # [not markup]\n\ny = 2\n```\n\n"
        "| a | b |\n|---|---|\n| 1 | 2 |\n\nThe end.")


class Window:
    """An emulated terminal that counts what is written to it."""

    def __init__(self, width: int, height: int = 24):
        self.screen = pyte.HistoryScreen(width, height, history=10_000, ratio=1)
        self.stream = pyte.Stream(self.screen)
        self.written = ""

    def write(self, text: str) -> None:
        self.written += text
        self.stream.feed(text.replace("\n", "\r\n"))

    def flush(self) -> None:
        pass

    def lines(self) -> list[str]:
        columns = range(self.screen.columns)
        above = ["".join(row[x].data for x in columns) for row in self.screen.history.top]
        return [line.rstrip() for line in [*above, *self.screen.display]]


def show(monkeypatch, parts, width, height=24, pause=0.0, **options):
    """Stream parts, a few letters at a time; returns the window."""
    from mlxquant.chat import screen

    window = Window(width, height)
    monkeypatch.setattr(sys, "stdout", window)
    monkeypatch.setattr(screen, "_PAUSE_S", pause)
    console = Console(force_terminal=True, width=width, height=height, color_system="256",
                      highlight=False, **options)
    live = LiveScreen(console, lambda: False, lambda: "9 tokens/s")
    live.begin()
    for part in parts:
        for start in range(0, len(part.text), 3):
            live.feed((ReplyPart(part.kind, part.text[start:start + 3]),))
    live.end()
    return window


@pytest.mark.parametrize("width", [80, 40, 20])
def test_a_streamed_reply_ends_as_if_it_had_been_there_at_once(monkeypatch, width):
    streamed = show(monkeypatch, [ReplyPart("answer", TEXT)], width)
    at_once = show(monkeypatch, [ReplyPart("answer", TEXT)], width, pause=1e9)
    assert streamed.lines() == at_once.lines()
    text = "\n".join(streamed.lines())
    assert "tokens/s" not in text and "**" not in text and "```" not in text
    assert "  x = 1  # [not markup]" in text.split("Title")[1] or width == 20
    assert all(len(line) < width for line in streamed.lines())


def test_a_reply_longer_than_the_window_is_whole_in_the_scrollback(monkeypatch):
    code = "\n".join(f"line_{i} = {i}" for i in range(60))
    text = f"Before.\n\n```python\n{code}\n```\n\nAfter."
    window = show(monkeypatch, [ReplyPart("answer", text)], 60, 12)
    found = [line.strip() for line in window.lines() if line.strip()]
    assert found == ["Before.", *code.splitlines(), "After."]


def test_only_lines_that_changed_are_written_again(monkeypatch):
    window = show(monkeypatch, [ReplyPart("answer", "word " * 400)], 60, 40)
    assert len(window.written) < 40 * 2000  # drawing all each time takes some 800,000


def test_reasoning_is_one_line(monkeypatch):
    parts = [ReplyPart("thought", "Let me see. " * 30), ReplyPart("answer", "\n\nYes.")]
    lines = [line for line in show(monkeypatch, parts, 60).lines() if line]
    assert lines == ["thought, 90 words (/show thoughts)", "Yes."]


def test_without_colour_nothing_is_coloured(monkeypatch):
    coloured = show(monkeypatch, [ReplyPart("answer", TEXT)], 60).written
    monkeypatch.setenv("NO_COLOR", "1")
    plain = show(monkeypatch, [ReplyPart("answer", TEXT)], 60).written
    colour = re.compile(r"\x1b\[[0-9;]*(3[0-7]|9[0-7]|38)[;m]")
    assert colour.search(coloured) and not colour.search(plain)


def test_a_reply_cannot_steer_the_terminal(monkeypatch):
    attack = ("a\x1b[2Jb\x07c\r\x9bd\u202e &#x202e;&#12; `&#27;`\n\n    \x1b]0;t\u2066\n\n"
              "| \x1b |\n|---|\n")
    window = show(monkeypatch, [ReplyPart("thought", attack), ReplyPart("answer", attack)], 60)
    assert not re.search("[\x07\x0c\x9b\u202e\u2066]|\x1b[^[]|\x1b\\[2J", window.written)
    assert clean("a\x1b]0;t\x07b\tc\n") == "a]0;tb\tc\n"


@pytest.mark.parametrize("text", [
    "Use std::vector<int> here.", "<div>hello</div>", "<details>\n<br>\n\nx", "# A <b>\n\n<x>",
    "| <x> |\n|---|\n| <y> |", "<!-- x -->", "[foo]: http://x", "See [foo].\n\n[foo]: http://x",
    "Look: ![a](http://b)"])
def test_nothing_the_model_writes_is_left_out(text):
    blocks, rest = markdown.split(text)
    console = Console(width=60)
    shown = "\n".join(line for block in [*blocks, rest] for line in markdown.render(console, block))
    assert set(re.findall(r"[\w.:/<>]+", text)) <= set(re.findall(r"[\w.:/<>]+", shown))


@pytest.mark.parametrize("text,blocks", [
    ("one", 0), ("one\n\ntwo", 1), ("- a\n\n- b", 0), ("```\na\n\nb", 0),
    ("```\na\n```\n\nb", 1), ("", 0), ("1. a\n\n   b\n\n2. c\n\nd", 1)])
def test_blocks_are_finished_once_another_begins(text, blocks):
    done, rest = markdown.split(text)
    assert len(done) == blocks and "".join(done) + rest == text


def test_the_status_line_fits_any_width():
    parts = ["a-long-model", "2.15 bits", "context 12/512", "9.0 tokens/s"]
    assert session.fit(parts, 80) == "a-long-model · 2.15 bits · context 12/512 · 9.0 tokens/s"
    assert {session.fit(parts, width) for width in (27, 28, 30)} == {"a-long-model · 2.15 bits"}
    assert session.fit(parts, 23) == "a-long-model" and session.fit(parts, 5) == "a-lon"


def test_completion_of_commands_arguments_and_paths(tmp_path, monkeypatch):
    from prompt_toolkit.completion import CompleteEvent
    from prompt_toolkit.document import Document

    from mlxquant.chat.commands import TABLE

    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").touch()
    completer = terminal._completer({name: command.takes for name, command in TABLE.items()})

    def complete(text):
        return [text[:len(text) + c.start_position] + c.text for c in
                completer.get_completions(Document(text), CompleteEvent())]

    assert complete("/s") == ["/save", "/set", "/show", "/stats", "/system"]
    assert complete("/set top") == ["/set top_k", "/set top_p"]
    assert complete("/read no") == ["/read notes.txt"]
    assert complete("/model smol") == ["/model smollm2-135m"]
    assert complete("hello") == complete("/clear x") == complete("/nonsense x") == []


def test_history_is_kept_private_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setenv("MLXQUANT_STATE", str(tmp_path / "state"))
    terminal._history().store_string("asked before")
    assert list(terminal._history().load_history_strings()) == ["asked before"]
    assert (tmp_path / "state" / "chat_history").stat().st_mode & 0o077 == 0
    history = terminal._history()
    history.store_string("caf\udce9")  # a terminal that types Latin-1
    (tmp_path / "state" / "chat_history").unlink()
    (tmp_path / "state" / "chat_history").mkdir()
    history.store_string("not kept")
    (tmp_path / "file").touch()
    monkeypatch.setenv("MLXQUANT_STATE", str(tmp_path / "file" / "state"))
    terminal._history().store_string("not kept")
    assert list(terminal._history().load_history_strings()) == []


@pytest.mark.parametrize("typed,text", [
    (b"one two\n", "one two"), (b"tow\x7f\x7fwo", "two"), (b"wrong\x15right", "right"),
    (b"\x7f\x7f", ""), (b"\x1b[A\x1b[1;5Cup\x1bOP\x1b", "up"), (b"\x1b[12;40Rx\x04\x01\t", "x\t"),
    ("é\U0001f600\x7f!".encode(), "é!"), (b"\xff\xc3", ""), (b"a\nb\n\n", "a\nb")])
def test_what_was_typed_meanwhile_is_edited_as_on_a_line(typed, text):
    assert terminal.edited(typed) == text


class Chat:
    """The chat in a pseudo-terminal, seen through an emulated one."""

    def __init__(self, folder, width, state: Path, *streams: str, **environment):
        self.window = Window(width)
        self.terminal, self.slave = pty.openpty()
        termios.tcsetwinsize(self.slave, (24, width))
        self.command = Command(
            program=functools.partial(chat_here, folder, 0.002, state / "log", *streams),
            terminal=os.ttyname(self.slave), MLXQUANT_STATE=str(state),
            MLXQUANT_CACHE=str(state / "cache"), **{"TERM": "xterm-256color"} | environment)
        self.window.screen.write_process_input = self.type  # where the cursor is, when asked

    def type(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def until(self, pattern: str, patience: float = 60) -> str:
        deadline = time.monotonic() + patience
        while not re.search(pattern, self.text(), re.DOTALL | re.MULTILINE):
            assert time.monotonic() < deadline, self.text()
            self.read()
        return self.text()

    def read(self) -> None:
        if select.select([self.terminal], [], [], 0.05)[0]:
            try:
                data = os.read(self.terminal, 65536).decode("utf-8", "replace")
            except OSError:
                return
            self.window.written += data
            self.window.stream.feed(data)

    def text(self) -> str:
        return "\n".join(self.window.lines())

    def echoes(self) -> bool:
        return bool(termios.tcgetattr(self.slave)[3] & termios.ECHO)

    def leave(self) -> int:
        deadline = time.monotonic() + 30
        while self.command.process.is_alive() and time.monotonic() < deadline:
            self.type("\x04")  # again, should it come before the editor is back
            self.read()
        return self.command.ended(10).returncode

    def close(self) -> None:
        self.command.process.kill()
        os.close(self.terminal)
        os.close(self.slave)


@pytest.fixture
def start(tiny_folder, tmp_path):
    chats = []

    def make(width, *streams, **environment):
        chats.append(Chat(tiny_folder, width, tmp_path, *streams, **environment))
        return chats[-1]

    yield make
    for chat in chats:
        chat.close()


@pytest.mark.parametrize("width", [80, 40])
def test_in_a_real_terminal(start, width):
    chat = start(width)
    chat.until("^>")
    chat.type("hello\r")
    shown = chat.until("That is all.*peak.*^>.*context [0-9]+/512")  # the line under the prompt
    assert "thought, 14 words" in shown and "<think>" not in shown
    assert "def area(radius: float) -> float:" in shown
    chat.type('"""two\rlines"""\r')
    chat.until("A second answer.*^>")
    chat.type("long\r")
    chat.until("Line 3 of many")
    chat.type("\x03")
    chat.until(r"\(stopped\).*^>")
    chat.type("/show\r")
    chat.until("3 turns, 1 forgotten.*^>")
    chat.type("\x1b[200~pasted\nlines\x1b[201~\x03")  # Ctrl-C at the prompt
    chat.until(r"\(Ctrl-D or /exit leaves\)")
    assert chat.leave() == 0 and chat.echoes()


def test_what_is_typed_while_an_answer_comes_begins_the_next_prompt(start):
    chat = start(60)
    chat.until("^>")
    chat.type("hello\r")
    chat.until("thought, 14 words")
    assert not chat.echoes()
    chat.type("what nexx\x7ft?\r")
    shown = chat.until("That is all.*peak.*^> what next[?]")
    assert shown.count("what nex") == 1
    chat.type("\r")
    chat.until("A second answer.*^>")
    assert chat.leave() == 0 and chat.echoes()


@pytest.mark.parametrize("number,busy", [(signal.SIGTERM, True), (signal.SIGHUP, False)])
def test_a_chat_that_is_ended_from_outside_leaves_the_terminal_as_it_was(start, number, busy):
    chat = start(60)
    chat.until("^>")
    if busy:
        chat.type("hello\r")
        chat.until("thought, 14 words")
    os.kill(chat.command.process.pid, number)
    deadline = time.monotonic() + 30
    while chat.command.process.is_alive() and time.monotonic() < deadline:
        chat.read()  # it may be writing
    assert chat.command.ended(10).returncode == 128 + number and chat.echoes()


def test_the_prompt_stays_on_the_terminal_where_replies_go_to_a_file(start, tmp_path):
    chat = start(60, "stdout")
    chat.until("^>.*context 0/512")
    chat.type("hello\r")
    assert "That is all" not in chat.until("peak.*^>")
    assert chat.leave() == 0 and chat.echoes()
    log = (tmp_path / "log").read_text()
    assert log.startswith("# Hello") and log.endswith("That is all.\n")


def test_plain_lines_where_nobody_sees_an_editor(start, tmp_path):
    chat = start(60, "stdout", "stderr")
    chat.type("hello\r\x04")
    assert chat.leave() == 0 and chat.echoes()
    log = (tmp_path / "log").read_text()
    assert "That is all." in log and "context" not in log


def test_in_a_dumb_terminal(start):
    chat = start(80, TERM="dumb")
    chat.until("^>")
    chat.type("hello\r")
    shown = chat.until("That is all.*peak")
    assert "**bold**" in shown and not re.search(r"\x1b\[[0-9;]*[mAJK]", chat.window.written)
    assert chat.leave() == 0
