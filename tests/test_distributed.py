"""A model over two processes of this machine: the same tokens as one, or a clear refusal."""

import json
import random
import socket
from functools import partial

import mlx.core as mx
import pytest
from commands import Command
from conftest import CONFIG, job, random_network, write_folder

import mlxquant
from mlxquant import Sampling

PROMPT = list(range(3, 40))
WAYS = {"dense": {}, "affine": dict(method="rtn", bits=4),
        "rotated": dict(method="replica", bits="ternary", replicas=2, rotation="online"),
        "grouped": dict(method="replica", bits=3, replicas=2, replica_group=16, rotation="online")}


def generate(folders):
    """Print what one of the machines finds in each folder."""
    for folder in folders:
        model = mlxquant.load(str(folder), dense=False)
        kinds = sorted({type(module).__name__ for module in model.network.modules()})
        text, sampled = (mlxquant.generate(model, PROMPT, max_tokens=8,
                                           sampling=Sampling(heat)).text
                         for heat in (0.0, 30.0))
        logits = model.network(mx.array([PROMPT]))[0, -1, :24].tolist()
        print(json.dumps([text, logits, kinds, sampled, model.weight_bytes_per_token]))


def launch(folder, *arguments, **options):
    """Run a command twice, as mlx.launch does on this machine; the processes as they ended."""
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(2)]))
    both = [Command(*arguments, MLX_RANK=str(rank), MLX_HOSTFILE=str(hosts), **options)
            for rank in (0, 1)]
    return [command.ended() for command in both]


def free_ports(count):
    """Ports below those that connections are made from: one of those could meet itself, and the
    ring would wait for a minute."""
    found = []
    while len(found) < count:
        with socket.socket() as trial:
            port = random.randrange(20_000, 32_000)
            try:
                trial.bind(("127.0.0.1", port))
            except OSError:
                continue
            found.append(port)
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_folder):
    """Folders of the tiny model by name."""
    above = tmp_path_factory.mktemp("quantised")
    for name, options in WAYS.items():
        if options:
            mlxquant.quantize(str(tiny_folder), above / name, job(samples=4, length=32, **options))
    return {name: above / name if options else tiny_folder for name, options in WAYS.items()}


@pytest.fixture(scope="module")
def said(made, tmp_path_factory):
    """What each of the two says of every folder."""
    results = launch(tmp_path_factory.mktemp("two"), program=partial(generate, list(made.values())))
    assert [result.returncode for result in results] == [0, 0], results
    return [dict(zip(made, map(json.loads, result.stdout.splitlines()))) for result in results]


@pytest.mark.parametrize("name,kind", [
    ("dense", "ShardedToAllLinear"), ("affine", "QuantizedShardedToAllLinear"),
    ("rotated", "AddedReplicated"),
    ("grouped", "AddedReplicated")])
def test_two_say_the_same_as_one(said, made, name, kind):
    model = mlxquant.load(str(made[name]), dense=False)
    expected = model.network(mx.array([PROMPT]))[0, -1, :24].tolist()
    text, logits, kinds, sampled, size = said[0][name]
    assert text == mlxquant.generate(model, PROMPT, max_tokens=8).text
    assert logits == pytest.approx(expected, abs=1e-4) and kind in kinds
    assert size < model.weight_bytes_per_token
    assert said[1][name] == said[0][name] and sampled != text  # both sample the same, unseeded


def test_the_first_machine_speaks(tiny_folder, tmp_path):
    first, second = launch(tmp_path, "generate", tiny_folder, "-p", "hello", "--max-tokens", 6,
                           "--temp", 30, "--seed", 1)
    assert (first.returncode, second.returncode) == (0, 0), (first, second)
    assert (second.stdout, second.stderr) == ("", "")
    expected = mlxquant.generate(mlxquant.load(str(tiny_folder)),
                                 [{"role": "user", "content": "hello"}],
                                 max_tokens=6, sampling=Sampling(temperature=30.0, seed=1)).text
    assert first.stdout == expected + "\n" and "tokens/s" in first.stderr


def test_heads_that_do_not_divide_are_refused(tmp_path):
    config = CONFIG | {"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 3}
    folder = write_folder(tmp_path / "three", random_network(config), config)
    first, second = launch(tmp_path, "generate", folder, "-p", "x")
    assert (first.returncode, second.returncode) == (1, 1)
    assert "Traceback" not in first.stderr + second.stderr
    assert (f"\nerror: {folder} has 3 key-value heads, which 2 machines cannot share evenly"
            in f"\n{first.stderr}")
    assert "machine 1: error: " in second.stderr
