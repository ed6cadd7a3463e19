"""The server, called by OpenAI's own client on this machine."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

import mlxquant
from mlxquant.base.errors import BadValue, MlxquantError
from mlxquant.server import BODY_LIMIT, Options, serve

openai = pytest.importorskip("openai", reason="OpenAI's client is not installed")

CHAT = [{"role": "user", "content": "tell me"}]


@pytest.fixture(scope="module", autouse=True)
def heard():
    """Ctrl-C reaches this process and its children also where the tests were started with it ignored, as by ``&``."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def address(tiny_folder, tmp_path_factory):
    """A server in a process of its own, stopped by Ctrl-C."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mlxquant", "serve", str(tiny_folder), "--port", "0", "--origin", "http://a.example"],
        stderr=subprocess.PIPE, text=True)
    try:
        yield next(m[0] for line in process.stderr if (m := re.search(r"http://127\.0\.0\.1:\d+", line)))
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 0
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.stderr.close()
        process.wait()


@pytest.fixture
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", timeout=30, max_retries=0) as client:
        yield client


def test_a_chat_gets_the_same_reply_as_from_the_api(client, tiny):
    reply = client.chat.completions.create(model="any", messages=CHAT, max_tokens=12)
    assert reply.choices[0].message.content == mlxquant.generate(tiny, CHAT, max_tokens=12).text
    assert reply.choices[0].finish_reason == "length" and reply.usage.completion_tokens == 12


def test_a_stream_and_a_completion(client, tiny):
    stream = client.chat.completions.create(model="any", messages=CHAT, max_tokens=12, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == mlxquant.generate(tiny, CHAT, max_tokens=12).text
    raw = client.completions.create(model="any", prompt="Once", max_tokens=8)
    assert raw.choices[0].text == mlxquant.generate(tiny, "Once", max_tokens=8).text


def test_several_at_once(client, tiny):
    prompts = [f"number {i}" for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(lambda p: client.completions.create(
            model="any", prompt=p, max_tokens=8).choices[0].text, prompts))
    assert replies == [mlxquant.generate(tiny, p, max_tokens=8).text for p in prompts]


def test_only_the_one_model_is_listed_and_served(client, tiny_folder):
    assert [model.id for model in client.models.list()] == [str(tiny_folder)]
    assert client.completions.create(model="../../etc", prompt="Once", max_tokens=2).model == "../../etc"


@pytest.mark.parametrize("body,message", [
    ({"messages": "x"}, "messages must be a list"),
    ({"messages": CHAT, "max_tokens": 0}, "max_tokens must be at least 1"),
    ({"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/x"}}]}]}, "images are not supported"),
])
def test_wrong_requests_are_refused(address, body, message):
    with pytest.raises(urllib.error.HTTPError) as refused:
        post(address, body)
    with refused.value as answer:
        assert answer.code == 400 and message in json.loads(answer.read())["error"]


def test_a_body_too_large_is_refused_unread(address):
    with pytest.raises(urllib.error.HTTPError) as refused:
        post(address, {}, {"Content-Length": str(BODY_LIMIT + 1)})
    with refused.value as answer:
        assert answer.code == 413


def test_web_pages_of_other_origins_get_no_permission(address):
    for origin, allowed in (("http://a.example", "http://a.example"), ("http://b.example", None)):
        with post(address, {"messages": CHAT, "max_tokens": 1}, {"Origin": origin}) as answer:
            assert answer.headers["Access-Control-Allow-Origin"] == allowed


def test_a_draft_model_guesses_for_the_server(tiny):
    """In this process, stopped as Ctrl-C does."""
    result = {}

    def ready(address):
        def ask():
            with post(address.removesuffix("/v1"), {"messages": CHAT, "max_tokens": 12}) as answer:
                result.update(json.loads(answer.read()))
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=ask).start()

    serve(tiny, Options(port=0, draft=tiny), ready)
    assert result["choices"][0]["message"]["content"] == mlxquant.generate(tiny, CHAT, max_tokens=12).text


def test_options_are_checked(tiny):
    with pytest.raises(BadValue, match="port is 99999"):
        Options(port=99999)
    with pytest.raises(BadValue, match="max_tokens is 0"):
        Options(max_tokens=0)
    with pytest.raises(MlxquantError, match="cannot listen on 203.0.113.1:80"):
        serve(tiny, Options(host="203.0.113.1", port=80))


def post(address, body, headers={}):
    request = urllib.request.Request(f"{address}/v1/chat/completions", json.dumps(body).encode(),
                                     {"Content-Type": "application/json", **headers})
    return urllib.request.urlopen(request, timeout=30)
