"""A model over two processes of this machine: the same tokens as one, or a clear refusal."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import CONFIG, random_network, write_folder

import mlxquant
from mlxquant import Sampling

LAUNCH = Path(sys.executable).parent / "mlx.launch"
PROMPT = list(range(3, 40))
GENERATE = """
import json, sys, mlxquant
import mlx.core as mx
from mlxquant.distributed import rank
model = mlxquant.load(sys.argv[1], dense={dense})
kinds = sorted({{type(module).__name__ for module in model.network.modules()}})
text = mlxquant.generate(model, {prompt}, max_tokens=8, sampling=mlxquant.Sampling({sampling})).text
logits = model.network(mx.array([{prompt}]))[0, -1, :24].tolist()
if sys.argv[2] in (str(rank()), "both"):
    print(json.dumps([text, logits, kinds, model.weight_bytes_per_token]))
"""

pytestmark = pytest.mark.skipif(not LAUNCH.exists(), reason="mlx.launch is not installed beside Python")


def launch(*command, count=2):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return subprocess.run([LAUNCH, "-n", str(count), "--backend", "ring", "--starting-port", str(min(port, 65000)),
                           "--env", "OPENBLAS_NUM_THREADS=1", "--", sys.executable, *map(str, command)], capture_output=True, text=True, timeout=120)


def on_two(tmp_path, folder, dense=None, sampling="", rank=0):
    script = tmp_path / "generate.py"
    script.write_text(GENERATE.format(prompt=PROMPT, dense=dense, sampling=sampling))
    result = launch(script, folder, rank)
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    found = [json.loads(line) for line in result.stdout.splitlines()]
    return found if rank == "both" else found[0]


def alone(folder, **options):
    model = mlxquant.load(str(folder), **options)
    logits = model.network(mx.array([PROMPT]))[0, -1, :24].tolist()
    text = mlxquant.generate(model, PROMPT, max_tokens=8).text
    return text, pytest.approx(logits, abs=1e-4), model.weight_bytes_per_token


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_folder):
    """Quantised folders of the tiny model by name."""
    above = tmp_path_factory.mktemp("quantised")
    small = dict(samples=4, sequence_length=32)
    ways = {"affine": dict(method="rtn", bits=4),
            "rotated": dict(method="replica", bits="ternary", replicas=2, rotation="online", **small),
            "grouped": dict(method="replica", bits=3, replicas=2, replica_group=16, rotation="online", **small)}
    for name, options in ways.items():
        mlxquant.quantize(str(tiny_folder), above / name, **options)
    return above


def test_dense_layers(tiny_folder, tmp_path):
    *said, kinds, size = on_two(tmp_path, tiny_folder)
    *expected, whole = alone(tiny_folder)
    assert said == expected and {"AllToShardedLinear", "ShardedToAllLinear"} <= set(kinds)
    assert size < whole


@pytest.mark.parametrize("name,kind", [("affine", "QuantizedShardedToAllLinear"), ("rotated", "AddedReplicated"),
                                       ("grouped", "AddedReplicated")])
def test_packed_layers(made, tmp_path, name, kind):
    *said, kinds, size = on_two(tmp_path, made / name, dense=False)
    *expected, whole = alone(made / name, dense=False)
    assert said == expected and kind in kinds and size < whole


def test_all_machines_sample_the_same(tiny_folder, tmp_path):
    first, second = on_two(tmp_path, tiny_folder, sampling="temperature=30.0", rank="both")
    assert first == second and first[0] != alone(tiny_folder)[0]


def test_the_command_line_speaks_once(tiny_folder):
    options = ("-m", "mlxquant", "generate", tiny_folder, "-p", "hello", "--max-tokens", 6, "--temp", 30)
    result = launch(*options, "--seed", 1)
    assert result.returncode == 0 and result.stderr.count("tokens/s") == 2, result.stderr  # prompt and reply
    expected = mlxquant.generate(mlxquant.load(str(tiny_folder)), [{"role": "user", "content": "hello"}],
                                 max_tokens=6, sampling=Sampling(temperature=30.0, seed=1)).text
    assert result.stdout.strip() == expected.strip()


def test_heads_that_do_not_divide_are_refused(tmp_path):
    config = CONFIG | {"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 3}
    result = launch("-m", "mlxquant", "generate", write_folder(tmp_path / "three", random_network(config), config),
                    "-p", "x")
    assert "has 3 key-value heads, which 2 machines cannot share evenly" in result.stderr
    assert "exited with code 1" in result.stderr and "Traceback" not in result.stderr
