"""What the server does not let in: bodies, fields, hosts, origins; each said in one line."""

import json
import socket
import urllib.error

import pytest
import served
from served import CHAT, post, raw, refusal, running
from test_reply import TOOLS

from mlxquant.base.errors import BadValue
from mlxquant.server.forms import BODY_LIMIT, Options

address, client, heard = served.address, served.client, served.heard  # fixtures


@pytest.mark.parametrize("body, message", [
    ({"messages": "x"}, "messages must be a list"), ({}, "messages is missing"),
    ({"messages": []}, "messages must have at least 1"),
    ({"messages": ["x"]}, "messages[0] must be"),
    ({"messages": [{"content": "x"}]}, "messages[0] must be an object with role"),
    ({"messages": CHAT, "max_tokens": 0}, "max_tokens must be at least 1"),
    ({"messages": CHAT, "max_tokens": 1.5}, "max_tokens must be a whole number"),
    ({"messages": CHAT, "max_tokens": True}, "max_tokens must be a whole number"),
    ({"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/x"}}]}]},
     "images are not supported"),
    ({"messages": CHAT, "stop": 5}, "stop must be a list"),
    ({"messages": CHAT, "stop": [None]}, "stop[0] must be text"),
    ({"messages": CHAT, "stop": [""]}, "stop[0] must not be empty"),
    ({"messages": CHAT, "top_k": -1}, "top_k is -1"),
    ({"messages": CHAT, "top_k": 10**40}, "top_k is 1000"),
    ({"messages": CHAT, "temperature": "hot"}, "temperature must be a number"),
    ({"messages": CHAT, "repetition_penalty": 1.5, "repetition_context_size": 10**12},
     "repetition_context_size is"),
    ({"messages": CHAT, "logit_bias": {"999999": 5.0}}, "logit_bias names token 999999"),
    ({"messages": CHAT, "logit_bias": {"384": 5.0}}, "logit_bias names token 384"),
    ({"messages": CHAT, "logit_bias": {"-1": 5.0}}, "logit_bias must give"),
    ({"messages": CHAT, "logit_bias": {"5": -1e308}}, "logit_bias[5] must be at least -100"),
    ({"messages": CHAT, "logit_bias": [5]}, "logit_bias must be an object"),
    ({"messages": CHAT, "logit_bias": {"5": "x"}}, "logit_bias[5] must be a number"),
    ({"messages": CHAT, "n": 0}, "n must be at least 1"),
    ({"messages": CHAT, "n": 99}, "n must be at most 16"),
    ({"messages": CHAT, "seed": 1.5}, "seed must be a whole number"),
    ({"messages": CHAT, "response_format": {"type": "json_object"}},
     "response_format is 'json_object'"),
    ({"messages": CHAT, "response_format": "json"}, "response_format is 'json'"),
    ({"messages": CHAT, "tools": TOOLS, "tool_choice": "required"}, "tool_choice is 'required'"),
    ({"messages": CHAT, "tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice is"),
    ({"messages": CHAT, "tools": [{"type": "function"}]}, "tools must be a list of functions"),
    ({"messages": CHAT, "tools": TOOLS}, "no place for tools"),
    ({"messages": CHAT, "top_logprobs": 2}, "top_logprobs needs logprobs"),
    ({"messages": CHAT, "logprobs": True, "top_logprobs": 99}, "top_logprobs must be at most 20"),
    ({"messages": CHAT, "functions": []}, "functions is not supported"),
    ({"messages": CHAT, "adapters": "x"}, "adapters is not supported"),
    ({"messages": CHAT, "stream_options": {"x": 1}}, "stream_options.x is not supported"),
    ({"messages": CHAT, "reasoning_effort": "low"}, "reasoning_effort is not supported"),
    ({"messages": CHAT, "chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs"),
    ({"messages": CHAT, "chat_template_kwargs": {"nowhere": 1}}, "no variable 'nowhere'"),
    ({"messages": CHAT, "model": "half \ud800"}, "surrogates"),
    ({"messages": [{"role": "user", "content": "half \ud800"}]}, "surrogates"),
    ({"messages": [{"role": "user", "content": "a" * 600}]}, "holds 512"),
])
def test_wrong_chats_are_refused_by_name(address, body, message):
    status, reason = refusal(address, body)
    assert status == 400 and message in reason and "\n" not in reason


@pytest.mark.parametrize("body, message", [
    ({}, "prompt is missing"), ({"prompt": ""}, "the prompt is empty"),
    ({"prompt": []}, "the prompt is empty"), ({"prompt": 5}, "prompt"),
    ({"prompt": ["a", [5]], "max_tokens": 1, "best_of": 3}, "best_of is not supported"),
    ({"prompt": ["a", 5]}, "prompt must be text"), ({"prompt": [10**6]}, "token 1000000"),
    ({"prompt": [[-1]]}, "token -1"), ({"prompt": [1.5]}, "the prompt is [1.5]"),
    ({"prompt": "a", "echo": True}, "echo must be False"),
    ({"prompt": "a", "suffix": "b"}, "suffix is not supported"),
    ({"prompt": "a", "logprobs": 99}, "logprobs must be at most 20"),
    ({"prompt": ["a"] * 100, "n": 2}, "ask for 200 replies, allowed are 128"),
    ({"prompt": "a", "messages": CHAT}, "messages is not supported")])
def test_wrong_completions_are_refused_by_name(address, body, message):
    status, reason = refusal(address, body, path="/v1/completions")
    assert status == 400 and message in reason and "\n" not in reason


def test_openais_client_tells_the_reason(client):
    for ask, status, reason in (
            (lambda: client.completions.create(model="any", prompt=""), 400, "the prompt is empty"),
            (lambda: client.models.retrieve("another"), 404, "there is no model of this name"),
            (lambda: client.get("/nowhere", cast_to=object), 404, "Not Found")):
        with pytest.raises(Exception, match=reason) as refused:
            ask()
        assert refused.value.status_code == status and refused.value.body["message"] in str(
            refused.value) and refused.value.type == "invalid_request_error"


def test_null_is_absent_and_prompts_of_one_kind_each_are_fine(address):
    nulls = dict.fromkeys(("max_tokens", "temperature", "stream", "stop", "seed", "n", "tools",
                           "logit_bias", "response_format", "user"))
    with post(address, {"messages": CHAT, **nulls, "max_completion_tokens": 3}) as answer:
        assert json.loads(answer.read())["usage"]["completion_tokens"] == 3
    with post(address, {"prompt": ["a", [5]], "max_tokens": 1}, path="/v1/completions") as answer:
        assert len(json.loads(answer.read())["choices"]) == 2
    with post(address, {"messages": CHAT, "stream": True, "stream_options": {},
                        "max_tokens": 2}) as answer:
        assert answer.read().endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("body", [
    b"", b"x", b'{"messages": "\xff\xfe"}', b"[" * 100_000, b'{"seed": ' + b"9" * 5000 + b"}",
    b'{"temperature": NaN}', b'{"messages": [{}], "temperature": 1e999}', b"[]", b'"x"',
    '{"prompt": "x"}'.encode("utf-16")])
def test_bodies_that_do_not_parse_are_refused(address, body):
    assert refusal(address, body)[0] == 400


def test_a_body_too_large_is_refused_unread(address):
    status, reason = refusal(address, {}, {"Content-Length": str(BODY_LIMIT + 1)})
    assert status == 413 and str(BODY_LIMIT) in reason


@pytest.mark.parametrize("headers, status", [
    ("Host: evil.example\r\nContent-Length: 2", 403), ("Host: 127.0.0.1.evil.example", 403),
    ("Host: localhost:1\r\nContent-Length: -1", 400), ("Host: [::1]\r\nContent-Length: +70", 400),
    ("Host: localhost\r\nContent-Length: 1e3", 400), ("Host: localhost\r\nContent-Length: ", 400),
    (f"Host: localhost\r\nContent-Length: {'9' * 5000}", 400),
    ("Host: LOCALHOST\r\nContent-Length: 99999999", 413),
    ("Host: localhost\r\nContent-Length: 2\r\nOrigin: http://b.example", 403),
    ("Host: localhost\r\nContent-Length: 2\r\nOrigin: null", 403),
    ("Host: 127.0.0.1\r\nContent-Length: 2", 400)])
def test_requests_in_bytes_are_bounded(address, headers, status):
    request = f"POST /v1/chat/completions HTTP/1.1\r\n{headers}\r\nConnection: close\r\n\r\n{{}}"
    assert raw(address, request.encode()).startswith(f"HTTP/1.1 {status} ")


def test_web_pages_of_other_origins_get_no_permission(address):
    body = {"messages": CHAT, "max_tokens": 1}
    with post(address, body, {"Origin": "http://a.example"}) as answer:
        assert answer.headers["Access-Control-Allow-Origin"] == "http://a.example"
    with pytest.raises(urllib.error.HTTPError) as refused:  # nor does it make the model compute
        post(address, body, {"Origin": "http://b.example"})
    with refused.value as answer:
        assert answer.code == 403 and answer.headers["Access-Control-Allow-Origin"] is None
    for origin, allowed in (("http://a.example", 200), ("http://b.example", 400)):
        asked = (f"OPTIONS /v1/completions HTTP/1.1\r\nHost: localhost\r\nOrigin: {origin}\r\n"
                 "Access-Control-Request-Method: POST\r\nConnection: close\r\n\r\n")
        assert raw(address, asked.encode()).startswith(f"HTTP/1.1 {allowed} ")


def test_paths_and_methods_that_are_none(address):
    assert raw(address, b"GET /health HTTP/1.0\r\n\r\n").startswith("HTTP/1.1 200 ")
    for request, status in ((b"GET /v1/completions", 405), (b"GET /etc/passwd", 404),
                            (b"GET /v1/models", 200), (b"GET /health", 200)):
        rest = b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        answer = raw(address, request + rest)
        assert answer.startswith(f"HTTP/1.1 {status} "), answer


def test_an_ipv6_host(tiny):
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            pass
    except OSError:
        pytest.skip("this machine has no IPv6")
    with running(tiny, host="::1") as (_, address):
        assert address.startswith("http://[::1]:")
        with post(address, {"messages": CHAT, "max_tokens": 1}) as answer:
            assert answer.status == 200
        assert refusal(address, {"messages": CHAT}, {"Host": "evil.example"})[0] == 403


def test_other_machines_may_name_a_server_that_is_open_to_them(tiny):
    with running(tiny, host="0.0.0.0") as (_, address):
        with post(address, {"messages": CHAT, "max_tokens": 1}, {"Host": "my.server"}) as answer:
            assert answer.status == 200
        headers = {"Host": "my.server", "Origin": "http://my.server"}
        assert refusal(address, {"messages": CHAT}, headers)[0] == 403


def test_an_origin_may_be_copied_from_the_address_bar():
    given = ("http://localhost:3000/", "HTTPS://A.Example", "http://[::1]:80", "*")
    assert Options(origins=given).origins == (
        "http://localhost:3000", "https://a.example", "http://[::1]:80", "*")
    for wrong in ("localhost:3000", "http://a/b", "http://", "http://a:x", "null", ""):
        with pytest.raises(BadValue, match="allowed are scheme://host"):
            Options(origins=(wrong,))
