"""A few hundred of the mutated inputs of ``benchmarks/fuzz.py``, and proof that it would notice
what it looks for."""

import signal
import socket
import sys
import threading
import tracemalloc
from pathlib import Path

import commands
import pytest

from mlxquant.runtime import probe

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import fuzz
import fuzz_bodies
from served import running


@pytest.fixture
def fuzzer(tmp_path):
    previous = signal.signal(signal.SIGALRM, fuzz.hang)
    tracemalloc.start()
    yield fuzz.Fuzzer(tmp_path)
    tracemalloc.stop()
    signal.signal(signal.SIGALRM, previous)


def test_mutated_files_cause_nothing_but_our_errors(fuzzer):
    outcomes = {fuzzer.run(number) for number in range(600)}
    assert {"gguf BadCheckpoint", "gguf accepted",
            "safetensors BadCheckpoint", "safetensors accepted"} <= outcomes


def test_seeds_are_whole(fuzzer, monkeypatch):
    monkeypatch.setattr(fuzz, "mutated", lambda data, *_: data)
    assert {fuzzer.run(number) for number in range(8)} == {"gguf accepted", "safetensors accepted"}


def test_what_it_looks_for_is_noticed(fuzzer, monkeypatch):
    monkeypatch.setattr(fuzz, "SECONDS", 0.2)

    def forever():
        while True:
            pass

    wrong = ((lambda: bytes(20 << 20), MemoryError), (forever, TimeoutError),
             (lambda: {}["a"], KeyError))
    for parse, error in wrong:
        with pytest.raises(error):
            fuzzer._watched("test", parse, 100)


def test_mutated_bodies_leave_the_server_sound(monkeypatch, tmp_path):
    monkeypatch.setenv("MLXQUANT_CACHE", str(tmp_path))
    probe._kept(commands.measured())  # or its server would measure for half a minute
    made = fuzz_bodies.run(0, 200, fuzz.mutated)
    assert made["failures"] == [] and sum(made["outcomes"].values()) == 200
    assert made["outcomes"]["200"] > 30 and made["outcomes"]["400"] > 50


def test_bodies_that_are_not_spoilt_are_answered(tiny, monkeypatch):
    monkeypatch.setattr(fuzz_bodies, "spoil", lambda *_: None)
    with running(tiny) as (_, address):
        port = int(address.rpartition(":")[2])
        server = fuzz_bodies.Server(("127.0.0.1", port), lambda data, *_: data)
        for number in range(1, 21):
            server.run(number)
    assert server.outcomes == {"200": 20} and server.failures == []


@pytest.mark.parametrize("answer, noticed", [
    (b"HTTP/1.1 500 E\r\nContent-Length: 2\r\n\r\n{}", "500"), (b"", "RemoteDisconnected"),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\ndata: ", "a stream that did not end"),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", "no choices"),
    (b'HTTP/1.1 400 No\r\nContent-Length: 16\r\n\r\n{"error":"\\n\\n"}', "more than one line")])
def test_what_a_server_must_not_say_is_noticed(answer, noticed):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        def once():
            connection, _ = listener.accept()
            with connection:
                connection.recv(1 << 20)
                connection.sendall(answer)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(1 << 20):  # closed before all is read, it would be reset
                    pass

        thread = threading.Thread(target=once)
        thread.start()
        server = fuzz_bodies.Server(listener.getsockname(), lambda data, *_: data)
        server.run(1)
        thread.join()
    assert noticed in server.failures[0]["error"] and not server.outcomes
