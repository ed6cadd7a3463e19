"""The server at work: requests at once, clients that leave, failures, its start and its end."""

import json
import os
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import pytest
import served
from commands import Command
from conftest import CONFIG, random_network, write_folder
from scripted import scripted
from served import CHAT, DEADLINE, client_of, post, refusal, running, until
from test_distributed import free_ports

import mlxquant
from mlxquant.base.errors import BadValue, MlxquantError, Unsupported
from mlxquant.runtime.loop import Loop
from mlxquant.server.engine import Engine
from mlxquant.server.forms import Options
from mlxquant.server.serving import serve

heard = served.heard  # a fixture
pytestmark = pytest.mark.usefixtures("heard")


def test_requests_at_once_share_passes_over_the_weights(tiny_folder, monkeypatch):
    model, passes = mlxquant.load(str(tiny_folder)), []
    original = type(model.network).__call__

    def counted(self, inputs, **options):
        passes.append(inputs.shape[0])
        return original(self, inputs, **options)

    monkeypatch.setattr(type(model.network), "__call__", counted)
    with running(model) as (_, address), client_of(address) as client, \
            ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: client.completions.create(
            model="any", prompt=f"number {i}", max_tokens=200), range(4)))
    assert 4 in passes and len(passes) < 2 * 200, len(passes)


def test_a_client_by_itself_is_served_as_quickly_as_a_single_prompt(watched):
    """Before and after others are there; and all get the replies that they get alone."""
    model, single, taken = watched
    asked = [("Once upon", 300), ("number 1", 20), ([7], 20)]
    alone = [mlxquant.generate(model, prompt, max_tokens=count).text for prompt, count in asked]
    single.clear(), taken.clear()

    def reply(prompt, count):
        return client.completions.create(model="any", prompt=prompt, max_tokens=count)

    with running(model) as (_, address), client_of(address) as client, \
            ThreadPoolExecutor(1) as pool:
        long = pool.submit(reply, *asked[0])
        until(lambda: sum(taken) > 5)
        replies = [reply(*asked[1]), reply(*asked[2]), long.result()]
        assert [r.choices[0].text for r in replies] == [*alone[1:], alone[0]]
        single.clear(), taken.clear()
        assert reply("y", 20).choices[0].text and sum(taken) >= 20 and all(single)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("alone", [False, True])
def test_a_client_that_leaves_stops_the_computing(tiny_folder, stream, alone):
    model = scripted(tiny_folder, ["a" * 400], seconds=0.02)
    with running(model) as (engine, address):
        body = {"messages": CHAT, "max_tokens": 400, "stream": stream}
        body |= {"temperature": 0.01, "seed": 1} if alone else {}
        data = json.dumps(body).encode()
        host, port = address.removeprefix("http://").split(":")
        connection = socket.create_connection((host, int(port)))
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
                           + f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
        until(lambda: engine._jobs)
        if stream:
            assert connection.recv(100)
        connection.close()
        until(lambda: not engine._jobs)
        assert len(model.network._next) > 100  # most was never computed
        with post(address, {"messages": CHAT, "max_tokens": 1}) as answer:
            assert answer.status == 200


def test_a_model_with_constants_beside_its_weights_is_served(tmp_path):
    """Rotary frequencies, computed by the thread that loads and used by the one that answers."""
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    config = CONFIG | {"rope_scaling": scaling}
    model = mlxquant.load(str(write_folder(tmp_path / "model", random_network(config), config)))
    with running(model) as (_, address), \
            post(address, {"messages": CHAT, "max_tokens": 1}) as answer:
        assert answer.status == 200


def test_a_failure_while_computing_fails_its_request_alone(tiny_folder, monkeypatch):
    model = mlxquant.load(str(tiny_folder))
    original = type(model.network).__call__

    def broken(self, inputs, **options):
        if (inputs == 250).any():
            raise RuntimeError("out of\nmemory")
        logits = original(self, inputs, **options)
        spoilt = (inputs == 251).any(axis=-1)[:, None, None]
        return mx.where(spoilt, float("nan"), logits)

    monkeypatch.setattr(type(model.network), "__call__", broken)
    hot = {"temperature": 1.0, "seed": 1}
    with running(model) as (engine, address), client_of(address) as client:
        for prompt, reason in (([5, 250], "RuntimeError"), ([5, 251], "not finite")):
            for options in ({}, hot):
                body = {"prompt": prompt, "max_tokens": 4, **options}
                status, said = refusal(address, body, path="/v1/completions")
                assert status == 500 and reason in said
                with pytest.raises(Exception, match=reason) as told:
                    list(client.completions.create(model="any", stream=True, **body))
                assert told.value.type == "server_error"
                with post(address, {"messages": CHAT, "max_tokens": 2}) as answer:
                    assert answer.status == 200
        assert engine.healthy


def test_a_dead_thread_ends_the_server(tiny, monkeypatch):
    """Not answers of 503 for ever: whoever watches the process starts it again."""
    monkeypatch.setattr(Engine, "_begin", lambda self: 1 / 0)
    said = []

    def ready(address):
        threading.Thread(target=lambda: said.append(refusal(
            address.removesuffix("/v1"), {"messages": CHAT}))).start()

    with pytest.raises(MlxquantError, match="failed for good: ZeroDivisionError"):
        serve(tiny, Options(port=0), ready)
    until(lambda: said)
    assert said[0][0] in (500, 503)


def test_stopping_tells_those_who_wait(tiny_folder):
    with running(scripted(tiny_folder, ["a" * 400], seconds=0.02)) as (engine, address), \
            ThreadPoolExecutor(1) as pool:
        answer = pool.submit(refusal, address, {"messages": CHAT, "max_tokens": 400})
        until(lambda: engine._jobs)
        engine.stop()
        assert answer.result() == (500, "the server is stopping")


def test_a_draft_model_guesses_for_the_server(tiny):
    """In this process, stopped as Ctrl-C does."""
    result = {}

    def ready(address):
        def ask():
            with post(address.removesuffix("/v1"), {"messages": CHAT, "max_tokens": 12}) as answer:
                result.update(json.loads(answer.read()))
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=ask).start()

    serve(tiny, Options(port=0, loop=Loop(draft=tiny)), ready)
    text = result["choices"][0]["message"]["content"]
    assert text == mlxquant.generate(tiny, CHAT, max_tokens=12).text


def test_quantised_keys_and_values(tiny):
    with running(tiny, loop=Loop(kv_bits=8)) as (_, address), \
            post(address, {"messages": CHAT, "max_tokens": 8}) as answer:
        text = json.loads(answer.read())["choices"][0]["message"]["content"]
    assert text == mlxquant.generate(tiny, CHAT, max_tokens=8, kv_bits=8).text


def test_options_are_checked(tiny):
    for wrong, message in ((dict(port=99999), "port is 99999"), (dict(port="x"), "port is 'x'"),
                           (dict(max_tokens=0), "max_tokens is 0"),
                           (dict(prompt_caches=-1), "prompt_caches is -1")):
        with pytest.raises(BadValue, match=message):
            Options(**wrong)
    with pytest.raises(BadValue, match="exclude each other"):
        Options(loop=Loop(kv_bits=8, draft=tiny))
    with pytest.raises(MlxquantError, match="cannot listen on 203.0.113.1:80"):
        serve(tiny, Options(host="203.0.113.1", port=80))
    with socket.create_server(("127.0.0.1", 0)) as taken, \
            pytest.raises(MlxquantError, match="the port is taken"):
        serve(tiny, Options(port=taken.getsockname()[1]))
    with pytest.raises(BadValue, match="kv_bits is 7"):
        serve(tiny, Options(loop=Loop(kv_bits=7)))


def test_what_the_model_cannot_do_is_said_at_start(tiny_folder):
    from mlx_lm.models.cache import RotatingKVCache

    model = mlxquant.load(str(tiny_folder))
    model.network.make_cache = lambda: [RotatingKVCache(8) for _ in model.network.layers]
    with pytest.raises(Unsupported, match="cannot keep its keys and values"):
        serve(model, Options(port=0, loop=Loop(kv_bits=4)))
    with pytest.raises(Unsupported, match="cannot take tokens back"):
        serve(model, Options(port=0, loop=Loop(draft=model)))


def test_two_machines_answer_as_one(tiny, tiny_folder, tmp_path):
    """The first listens, the second computes with it; both end together."""
    hosts, port = tmp_path / "hosts.json", free_ports(3)
    hosts.write_text(json.dumps([[f"127.0.0.1:{p}"] for p in port[:2]]))
    machines = [Command("serve", tiny_folder, "--port", port[2], MLX_RANK=str(rank),
                        MLX_HOSTFILE=str(hosts)) for rank in (0, 1)]
    try:
        address = machines[0].says(r"http://127\.0\.0\.1:\d+")[0]
        for options in ({}, {"temperature": 0.001, "seed": 1}):
            with post(address, {"messages": CHAT, "max_tokens": 6, **options}) as answer:
                text = json.loads(answer.read())["choices"][0]["message"]["content"]
            assert text == mlxquant.generate(tiny, CHAT, max_tokens=6).text
        machines[0].interrupt()
    finally:
        codes = [machine.ended(DEADLINE).returncode for machine in machines]
    assert codes == [0, 0]
