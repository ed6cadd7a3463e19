"""Standard streams as they are in the wild: other encodings, closed, a terminal to be steered."""

import io
import json
import os
import sys
from contextlib import suppress

import pytest
from scripted import scripted

from mlxquant.base.errors import MlxquantError
from mlxquant.base.text import clean
from mlxquant.cli import common, main, talk

ATTACK = "é\U0001f600 \x1b[2J\x1b]0;title\x07\x9b1m\u202eevil\u2066"
CLEANED = "é\U0001f600 [2J]0;title1mevil"


class Terminal(io.TextIOWrapper):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def call(monkeypatch, tiny_folder, capsys):
    """Run ``mlxquant generate`` with a scripted reply: (exit code, bytes of stdout, stderr)."""

    def start(*arguments, reply=ATTACK, stdin=b"hello", kind=io.TextIOWrapper, encoding="utf-8"):
        written = io.BytesIO()
        monkeypatch.setattr(talk, "load_model", lambda *_, **__: scripted(tiny_folder, [reply]))
        monkeypatch.setattr(sys, "argv", ["mlxquant", "generate", "TINY", *arguments])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), "utf-8"))
        monkeypatch.setattr(sys, "stdout", kind(written, encoding))
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, written.getvalue(), capsys.readouterr().err

    return start


def test_a_terminal_is_not_steered_and_a_pipe_gets_the_text_as_it_is(call):
    assert call(kind=Terminal)[1].decode() == f"{CLEANED}\n"
    assert call()[1].decode() == f"{ATTACK}\n"
    assert json.loads(call("--json", kind=Terminal)[1])["text"] == ATTACK


def test_a_stream_may_be_cleaned_in_pieces():
    for size in range(1, len(ATTACK)):
        pieces = [ATTACK[i:i + size] for i in range(0, len(ATTACK), size)]
        assert "".join(map(clean, pieces)) == clean(ATTACK) == CLEANED
    assert clean("a\tb\nc") == "a\tb\nc"


def test_what_an_ascii_terminal_cannot_show_is_escaped(call):
    code, out, err = call(reply="é and \U0001f600", encoding="ascii")
    assert (code, out) == (0, b"\\xe9 and \\U0001f600\n") and "tokens/s" in err
    assert json.loads(call("--json", reply="é", encoding="ascii")[1])["text"] == "é"


def test_latin1_on_standard_input_is_one_line(call):
    code, out, err = call(stdin="first\ncafé".encode("latin-1"))
    assert (code, out, err) == (1, b"", "error: standard input is not text in UTF-8 (line 2)\n")
    for arguments in (("-p", "caf\udce9"), ("--system", "\udce9")):
        assert call(*arguments) == (2, b"", "error: the prompt is no text that can be tokenised\n")


@pytest.mark.parametrize("seed", [-1, 2**64, 10**30])
def test_any_whole_number_is_a_seed(call, seed):
    assert call("--seed", str(seed), "--temp", "1", reply="x")[:2] == (0, b"x\n")


def test_a_reader_that_has_enough_ends_it_without_a_word(call):
    for arguments in ((), ("--json",)):  # while it streams, and when the buffer goes at the end
        reader, writer = os.pipe()
        os.close(reader)
        with suppress(BrokenPipeError), os.fdopen(writer, "w") as pipe:
            code, _, err = call(*arguments, kind=lambda *_, pipe=pipe: pipe)
            assert code == 1 and "error" not in err and "Broken" not in err


def test_closed_streams_are_empty_files(monkeypatch, capsys):
    for name in ("stdin", "stderr"):
        monkeypatch.setattr(sys, name, None)
    monkeypatch.setattr(sys, "argv", ["mlxquant", "chips", "--json"])
    with pytest.raises(SystemExit):
        main()
    assert sys.stdin.read() == "" and json.loads(capsys.readouterr().out)["here"]
    sys.stdin.close()
    sys.stderr.close()


@pytest.mark.parametrize("failure,code,message", [
    (KeyboardInterrupt(), 130, ""),
    (PermissionError(13, "Permission denied", "/x"), 1, "error: Permission denied: /x\n"),
    (MemoryError(), 1, "error: out of memory\n"),
    (RuntimeError("[malloc] Unable to allocate\nmore"), 1, "error: [malloc] Unable to allocate\n"),
    (MlxquantError("a\x1b[2J"), 1, "error: a\\x1b[2J\n")])
def test_what_is_no_bug_is_one_line(call, monkeypatch, failure, code, message):
    def fail(*_, **__):
        raise failure

    monkeypatch.setattr("mlxquant.runtime.generation.stream_generate", fail)
    assert call() == (code, b"", message)


def test_a_bug_is_shown_whole(call, monkeypatch):
    monkeypatch.setattr("mlxquant.runtime.generation.stream_generate", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call()


def test_no_json_holds_a_number_that_is_none():
    with pytest.raises(MlxquantError, match="perplexity is not a finite number"):
        common.print_json({"perplexity": float("nan")})
