"""A few hundred of the mutated files of ``benchmarks/fuzz.py``, and proof that it would notice what it looks for."""

import signal
import sys
import tracemalloc
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import fuzz


@pytest.fixture
def fuzzer(tmp_path):
    previous = signal.signal(signal.SIGALRM, fuzz.hang)
    tracemalloc.start()
    yield fuzz.Fuzzer(tmp_path)
    tracemalloc.stop()
    signal.signal(signal.SIGALRM, previous)


def test_mutated_files_cause_nothing_but_our_errors(fuzzer):
    outcomes = {fuzzer.run(number) for number in range(600)}
    assert {"gguf BadCheckpoint", "gguf accepted", "safetensors BadCheckpoint", "safetensors accepted"} <= outcomes


def test_seeds_are_whole(fuzzer, monkeypatch):
    monkeypatch.setattr(fuzz, "mutated", lambda data, *_: data)
    assert {fuzzer.run(number) for number in range(8)} == {"gguf accepted", "safetensors accepted"}


def test_what_it_looks_for_is_noticed(fuzzer, monkeypatch):
    monkeypatch.setattr(fuzz, "SECONDS", 0.2)

    def forever():
        while True:
            pass

    wrong = ((lambda: bytes(20 << 20), MemoryError), (forever, TimeoutError), (lambda: {}["a"], KeyError))
    for parse, error in wrong:
        with pytest.raises(error):
            fuzzer._watched("test", parse, 100)
