"""Servers of tests: one in a process of its own, others in this one; and ways to call them."""

import json
import signal
import socket
import threading
import time
import urllib.request
from contextlib import contextmanager

import pytest
from commands import Command

from mlxquant.server.forms import Options
from mlxquant.server.serving import address_of, listen, make_server

CHAT = [{"role": "user", "content": "tell me"}]
DEADLINE = 60.0  # seconds that a busy machine may take for what takes none


@pytest.fixture(scope="module")
def heard():
    """Ctrl-C reaches this process and its children also where the tests were started with it
    ignored, as by ``&``."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def address(heard, tiny_folder):
    """A server in a process of its own, stopped by Ctrl-C."""
    server = Command("serve", tiny_folder, "--port", 0, "--verbose", "--max-tokens", 64,
                     "--origin", "http://a.example")
    try:
        yield server.says(r"http://127\.0\.0\.1:\d+")[0]
        server.interrupt()
    finally:
        result = server.ended(DEADLINE)
    assert result.returncode == 0 and "Traceback" not in result.stderr
    assert "127.0.0.1 POST /v1/completions 200\n" in result.stderr


@pytest.fixture
def client(address):
    with client_of(address) as client:
        yield client


def client_of(address):
    openai = pytest.importorskip("openai", reason="OpenAI's client is not installed")
    return openai.OpenAI(base_url=f"{address.removesuffix('/v1')}/v1", api_key="none",
                         timeout=DEADLINE, max_retries=0)


@contextmanager
def running(model, **options):
    """A server in a thread of this process; gives its engine and address."""
    options = Options(port=0, **options)
    with listen(options) as listener:
        engine, server = make_server(model, options)
        engine.start()
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield engine, address_of(options.host, listener).removesuffix("/v1")
        finally:
            server.should_exit = True
            thread.join()
            engine.stop()


def post(address, body, headers=None, path="/v1/chat/completions"):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(address + path, data,
                                     {"Content-Type": "application/json", **(headers or {})})
    return urllib.request.urlopen(request, timeout=DEADLINE)


def refusal(address, body, headers=None, path="/v1/chat/completions"):
    """Status and reason of a request that is refused."""
    with pytest.raises(urllib.error.HTTPError) as refused:
        post(address, body, headers, path)
    with refused.value as answer:
        return answer.code, json.loads(answer.read())["error"]["message"]


def raw(address, request):
    """What the server sends to a request in bytes, until it closes the connection."""
    host, port = address.removeprefix("http://").rsplit(":", 1)
    with socket.create_connection((host.strip("[]"), int(port)), timeout=DEADLINE) as connection:
        connection.sendall(request)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    return answer.decode()


def until(condition):
    deadline = time.monotonic() + DEADLINE
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()
