"""Mutated request bodies for the server: each is answered or refused, and it goes on.

A part of ``fuzz.py``. A case is its number, as there; some clients leave without waiting.
"""

import http.client
import json
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from conftest import write_folder

Mutate = Callable[[bytes, random.Random, int], bytes]
SECONDS = 60  # for one answer; a machine may be busy
AT_ONCE = 6
CHAT = [{"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
SAMPLING = {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 7,
            "repetition_penalty": 1.1, "repetition_context_size": 9, "presence_penalty": 0.5,
            "presence_context_size": 4, "frequency_penalty": 0.5, "frequency_context_size": 4,
            "xtc_probability": 0.1, "xtc_threshold": 0.2, "logit_bias": {"5": 1.5, "9": -2}}
COMMON = {"model": "any", "max_tokens": 3, "stop": ["\n", "ab"], "n": 1, "stream": False,
          "stream_options": {"include_usage": True}, "user": "me", **SAMPLING}
SEEDS = {
    "/v1/chat/completions": [
        {"messages": CHAT, **COMMON, "logprobs": True, "top_logprobs": 2},
        {"messages": CHAT, "max_completion_tokens": 2, "stream": True},
        {"messages": [*CHAT, {"role": "assistant", "content": None, "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]}],
         "max_tokens": 2, "tool_choice": "auto", "response_format": {"type": "text"}}],
    "/v1/completions": [
        {"prompt": "Once", **COMMON, "logprobs": 2, "echo": False},
        {"prompt": ["a", [5, 6]], "max_tokens": 2, "stream": True},
        {"prompt": [5, 6, 7], "max_tokens": 2, "n": 2}]}
WRONG: list[Any] = [
    None, True, False, 0, -1, 1, 2, 383, 384, 1.5, -0.0, 1e308, 2**31, 2**32, -2**63, 2**64,
    10**40, "", "x", "auto", "\ud800", "\x00", "a" * 2000, [], [None], [[]], ["x"] * 200, {},
    {"x": 1}, {"type": "text"}, [10**6], [-1], {"384": 1}, {"-1": 1}, {"a": "b"}]
FIELDS = [*COMMON, "prompt", "messages", "logprobs", "top_logprobs", "tools", "tool_choice", "echo",
          "max_completion_tokens", "response_format", "chat_template_kwargs", "reasoning_effort",
          "best_of", "suffix", "functions", "role", "content", "tool_calls", "type", "text"]


def body(chance: random.Random, by_bytes: Mutate) -> tuple[str, bytes]:
    """A path and a body: a sound one after some mutations of its values, its bytes, or both."""
    path = chance.choice(list(SEEDS))
    made = deepcopy(chance.choice(SEEDS[path]))
    for _ in range(chance.choice((0, 1, 1, 2))):
        spoil(made, chance)
    data = json.dumps(made, ensure_ascii=True).encode()
    return path, by_bytes(data, chance, len(data)) if chance.random() < 0.2 else data


def spoil(value: Any, chance: random.Random) -> None:
    """Change, remove or add something somewhere in a JSON value, in place."""
    places = [value]
    for place in places:
        inner = place.values() if isinstance(place, dict) else place
        places += [v for v in inner if isinstance(v, (dict, list)) and v]
    place = chance.choice(places)
    keys: list[Any] = list(place) if isinstance(place, dict) else list(range(len(place)))
    if isinstance(place, dict) and chance.random() < 0.3:
        keys = FIELDS
    if keys:
        key = chance.choice(keys)
        if chance.random() < 0.1 and (isinstance(place, list) or key in place):
            del place[key]
        else:
            place[key] = deepcopy(chance.choice(WRONG))


class Server:
    """``mlxquant serve`` with a tiny model, and what came of its cases."""

    def __init__(self, address: tuple[str, int], by_bytes: Mutate):
        self._address, self._by_bytes = address, by_bytes
        self.outcomes: Counter[str] = Counter()
        self.failures: list[dict[str, Any]] = []

    def run(self, number: int) -> None:
        """Send case ``number``; anything but an answer or a reason in one line is a failure."""
        path, data = body(random.Random(number), self._by_bytes)
        try:
            if number % 50 == 0:
                self._leave(path, data)
                outcome = "left"
            else:
                outcome = self._ask(path, data)
            self.outcomes[outcome] += 1
        except Exception as error:
            self.failures.append({"case": number, "error": f"{type(error).__name__}: {error}"})

    def health(self) -> int:
        return self._send("GET", "/health")[0]

    def _ask(self, path: str, data: bytes) -> str:
        status, said = self._send("POST", path, data)
        if status == 400:
            reason = json.loads(said)["error"]
            if "\n" in reason:
                raise ValueError(f"more than one line: {reason}")
        elif status != 200:
            raise ValueError(f"{status}: {said}")
        elif said.startswith(("data:", ":")):
            if not said.endswith("data: [DONE]\n\n"):
                raise ValueError(f"a stream that did not end: {said[-200:]}")
        elif "choices" not in json.loads(said):
            raise ValueError(f"no choices: {said}")
        return str(status)

    def _send(self, method: str, path: str, data: bytes | None = None) -> tuple[int, str]:
        with closing(http.client.HTTPConnection(*self._address, timeout=SECONDS)) as connection:
            connection.request(method, path, data)
            with connection.getresponse() as answer:
                return answer.status, answer.read().decode()

    def _leave(self, path: str, data: bytes) -> None:
        with socket.create_connection(self._address, timeout=SECONDS) as connection:
            connection.sendall(f"POST {path} HTTP/1.1\r\nHost: localhost\r\n"
                               f"Content-Length: {len(data)}\r\n\r\n".encode() + data)


@contextmanager
def server(by_bytes: Mutate) -> Iterator[Server]:
    """A server in a process of its own, which must be sound to the end."""
    with tempfile.TemporaryDirectory(prefix="mlxquant-fuzz-") as folder:
        model = write_folder(Path(folder) / "tiny")
        process = subprocess.Popen(
            [sys.executable, "-m", "mlxquant", "serve", str(model), "--port", "0",
             "--max-tokens", "4"], stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None  # it is a pipe
        try:
            port = next(int(line.split(":")[2].split("/")[0]) for line in process.stderr
                        if "http://" in line)
            made = Server(("127.0.0.1", port), by_bytes)
            yield made
            if made.health() != 200:
                made.failures.append({"error": "/health does not say ok"})
            process.send_signal(signal.SIGINT)
            code, said = process.wait(timeout=SECONDS), process.stderr.read()
            if code or said:
                made.failures.append({"error": f"exit code {code}: {said[-1500:]}"})
        finally:
            process.kill()
            process.stderr.close()
            process.wait()


def run(first: int, count: int, by_bytes: Mutate) -> dict[str, Any]:
    """What came of ``count`` cases, as JSON values."""
    start = time.perf_counter()
    with server(by_bytes) as made, ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(made.run, range(first, first + count)))
    return {"bodies": count, "at_once": AT_ONCE, "seconds": time.perf_counter() - start,
            "outcomes": dict(sorted(made.outcomes.items())), "failures": made.failures}
