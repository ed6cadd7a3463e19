"""Repeated blocks in checkpoints: format, replies, batches, tuning, what is refused."""

import json

import mlx.core as mx
import pytest
from conftest import job, random_network, write_folder, write_telling
from mlx_lm.generate import batch_generate
from mlx_lm.models.cache import KVCache, QuantizedKVCache, trim_prompt_cache
from mlx_lm.utils import load as stock_load
from test_repeated import DEEP, TOKENS, step_by_step
from typer.testing import CliRunner

import mlxquant  # first: it loads the BLAS before MLX
from mlxquant.base.errors import BadCheckpoint, BadValue, Unsupported
from mlxquant.cli import app
from mlxquant.layers import repeated, traffic
from mlxquant.layers.blocks import held_bytes
from mlxquant.layers.formats import config_with
from mlxquant.layers.repeated import Repeat, parse_repeat
from mlxquant.layers.trainable import Trainable
from mlxquant.model.loading import open_lazily
from mlxquant.report.divergence import position_kl


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A source model with something to say, a text, and it quantised with repeats."""
    folder = write_telling(tmp_path_factory.mktemp("repeated"), DEEP)
    repeats = (*parse_repeat("0:2x2").one_by_one(), parse_repeat("2:4x3"))
    for name, given in (("plain", ()), ("repeated", repeats)):
        mlxquant.quantize(str(folder / "source"), folder / name,
                          job(method="rtn", bits=2, group_size=32, repeats=given))
    return folder


def tensors(folder):
    return mx.load(str(folder / "model.safetensors"))


def test_the_checkpoint_holds_weights_once_and_gates_of_zero(places):
    config = json.loads((places / "repeated" / "config.json").read_text())
    assert (config["model_type"], config["base_model_type"]) == ("mlxquant", "llama")
    assert config["mlxquant"]["repeats"] == [{"first": 0, "last": 0, "passes": 2},
                                             {"first": 1, "last": 1, "passes": 2},
                                             {"first": 2, "last": 3, "passes": 3}]
    plain, ours = tensors(places / "plain"), tensors(places / "repeated")
    gates = {f"model.layers.{last}.repeat_gates": passes - 1
             for last, passes in ((0, 2), (1, 2), (3, 3))}
    assert ours.keys() - plain.keys() == gates.keys()
    assert all(mx.array_equal(array, ours[path]) for path, array in plain.items())
    for path, count in gates.items():
        assert ours[path].dtype == mx.float16 and mx.array_equal(ours[path], mx.zeros(count))
    with pytest.raises(ValueError, match="Model type mlxquant not supported"):
        stock_load(str(places / "repeated"))
    with pytest.raises(Unsupported, match="start from the original"):
        mlxquant.quantize(str(places / "repeated"), places / "twice", job(method="rtn"))


def test_a_loaded_model_reads_the_weights_of_its_repeats_again(places):
    plain, ours = (mlxquant.load(str(places / name)) for name in ("plain", "repeated"))
    assert mx.array_equal(ours.network(TOKENS), plain.network(TOKENS))
    first, second, third, fourth = map(held_bytes, ours.network.layers)
    gates = 4 * (1 + 1 + 2)
    assert (ours.weight_bytes_per_token
            == plain.weight_bytes_per_token + gates + first + second + 2 * (third + fourth))
    assert traffic.dense_bytes(ours.network) == traffic.dense_bytes(plain.network) + gates
    bodies = [mlxquant.inspect(str(places / name)) for name in ("plain", "repeated")]
    assert not any(body.untraceable for body in bodies)
    assert bodies[1].bytes_per_token > 1.5 * bodies[0].bytes_per_token
    assert bodies[1].parameters == bodies[0].parameters


@pytest.mark.parametrize("kv_bits", [None, 8])
def test_a_conversation_goes_on_from_its_cache(places, kv_bits):
    plain, ours = (mlxquant.load(str(places / name)) for name in ("plain", "repeated"))
    text, options = "the cat sat on a mat", {"max_tokens": 8, "kv_bits": kv_bits}
    expected = mlxquant.generate(plain, text, **options)
    assert mlxquant.generate(ours, text, **options).text == expected.text  # gates of zero
    ours.network.layers[1].repeat_gates = mx.array([0.8])
    ours.network.layers[3].repeat_gates = mx.array([0.8, -0.6])
    cache = mlxquant.PromptCache()
    reply = mlxquant.generate(ours, text, cache=cache, **options)
    assert reply.text != expected.text
    assert reply.report.bytes_per_token > expected.report.bytes_per_token
    for more in (" and ran", " on a mat"):  # the second shares only the start: the cache is trimmed
        prompt = cache.tokens[:26] + ours.tokenizer.encode(more)
        longer = mlxquant.generate(ours, prompt, cache=cache, **options)
        assert longer.report.cached_tokens >= 26
        assert longer.text == mlxquant.generate(ours, prompt, **options).text
    kinds = {type(c) for layer in cache.layers for c in layer.caches}
    assert kinds == {KVCache if kv_bits is None else QuantizedKVCache}


def test_greedy_tokens_are_those_of_the_uncached_logits(places):
    ours = mlxquant.load(str(places / "repeated"))
    ours.network.layers[0].repeat_gates = mx.array([0.8])
    ours.network.layers[3].repeat_gates = mx.array([0.8, -0.6])
    tokens, cache = ours.tokenizer.encode("the cat sat"), mlxquant.PromptCache()
    mlxquant.generate(ours, tokens, max_tokens=6, cache=cache)
    held = cache.tokens
    assert len(held) > len(tokens)
    best = mx.argmax(ours.network(mx.array([held]))[0], axis=-1).tolist()
    assert held[len(tokens):] == best[len(tokens) - 1:-1]


def test_prompts_in_one_batch_are_answered_as_one_by_one(places):
    ours = mlxquant.load(str(places / "repeated"))
    ours.network.layers[3].repeat_gates = mx.array([0.3, -0.2])
    prompts = [ours.tokenizer.encode(text) for text in ("the cat sat", "a mat and the cat ran on")]
    batch = batch_generate(ours.network, ours.tokenizer, prompts, max_tokens=6,
                           return_prompt_caches=True)
    assert batch.texts == [mlxquant.generate(ours, prompt, max_tokens=6).text for prompt in prompts]
    for cache, prompt in zip(batch.caches, prompts):
        trim_prompt_cache(cache, cache[0].offset - len(prompt))
        again = ours.network(mx.array([[77]]), cache=cache)
        whole = ours.network(mx.array([[*prompt, 77]]))
        assert mx.abs(again - whole[:, -1:]).max() < 1e-3


def test_tuning_opens_the_gates_towards_the_teachers(places, tmp_path):
    repeats, gate = (parse_repeat("1:3x2"),), "model.layers.2.repeat_gates"
    teacher = mlxquant.load(str(places / "source")).network
    repeated.install(teacher, repeats)
    teacher.layers[2].repeat_gates = mx.array([0.3])
    write_folder(tmp_path / "teacher", teacher, config_with(DEEP, {}, {}, repeats))
    mlxquant.quantize(str(places / "source"), tmp_path / "student",
                      job(method="rtn", bits=8, repeats=repeats))

    student = Trainable(open_lazily(tmp_path / "student")[0], mx.float32)
    start = student.start()

    def loss(u):  # steps in a gate are absolute: it starts at 0
        network = student.install(student.values(start | {gate: u}))
        return position_kl(teacher(TOKENS), network(TOKENS)).mean()

    losses = [loss(mx.array([u])).item() for u in (0.0, 0.01, 0.3)]
    slope = mx.grad(loss)(mx.array([0.005])).item()
    assert losses[2] < 0.01 * losses[0] and slope < 0
    assert (losses[1] - losses[0]) / 0.01 == pytest.approx(slope, rel=0.02)

    result = mlxquant.tune(
        str(tmp_path / "student"), tmp_path / "tuned", mlxquant.Tuning(
            str(tmp_path / "teacher"), [str(places / "text.txt")], sequence_length=32,
            schedule=mlxquant.Schedule(24, 4, learning_rate=2e-3, check_every=12)))
    assert result.divergence_after < 0.7 * result.divergence_before
    assert tensors(tmp_path / "tuned")[gate].item() > 0.005
    tuned = mlxquant.load(str(tmp_path / "tuned")).network
    assert mx.abs(step_by_step(tuned)[0] - tuned(TOKENS)).max() < 1e-3


@pytest.mark.parametrize("ranges,message", [
    (["8"], "'8' is no range of blocks; allowed is FIRST:ENDxPASSES"),
    (["9:3x2"], "blocks 9:3 are none; allowed are FIRST:END"), (["2:2x2"], "blocks 2:2 are none"),
    (["-1:2x2"], "no range of blocks"), (["0:2x"], "no range of blocks"),
    (["0:2x2.5"], "no range of blocks"),
    (["0:99x2"], "the model has 4; allowed are ranges within 0:4"),
    (["0:2x1"], "run 1 times; allowed are 2 to 8"), (["0:2x9"], "run 9 times; allowed are 2 to 8"),
    (["2:4x2", "0:3x2"],
     "blocks 0:3 and 2:4 overlap; allowed are ranges without a block in common"),
    (["1:2x2", "1:2x3"], "overlap"),
])
def test_bad_ranges_are_refused_before_any_work(places, tmp_path, ranges, message):
    with pytest.raises(BadValue, match=message):
        mlxquant.quantize(str(places / "source"), tmp_path / "out",
                          job(method="rtn", repeats=tuple(map(parse_repeat, ranges))))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("entry,message", [
    ({"first": 0, "last": 1}, "a list with first, last, passes each"), ("0:2x2", "a list with"),
    ({"first": 0, "last": 9, "passes": 2}, "the model has 4"),
    ({"first": 0, "last": True, "passes": 2}, "whole number"),
    ({"first": 0, "last": 1, "passes": 99}, "2 to 8 passes"),
])
def test_a_config_that_does_not_fit_is_a_bad_checkpoint(tmp_path, entry, message):
    config = config_with(DEEP, {}, {}, [Repeat(0, 1, 2)])
    config["mlxquant"]["repeats"] = [entry]
    write_folder(tmp_path / "model", random_network(DEEP), config)
    with pytest.raises(BadCheckpoint, match=message):
        mlxquant.load(str(tmp_path / "model"))


def test_the_command_line_takes_both_kinds_more_than_once(places, tmp_path):
    command = ["quantize", str(places / "source"), "-o", str(tmp_path / "out"), "--method", "rtn",
               "--json"]
    result = CliRunner().invoke(app, [*command, "--repeat-blocks", "0:1x2", "--repeat-blocks",
                                      "1:2x3", "--repeat-span", "2:4x2"])
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert ([tuple(entry.values()) for entry in config["mlxquant"]["repeats"]]
            == [(0, 0, 2), (1, 1, 3), (2, 3, 2)])
