"""From a folder to a quantised folder: stock loading, resume, rotation, bad requests."""

import gc
import json
import shutil
from dataclasses import replace

import architectures
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import CONFIG, job, random_network, write_folder
from mlx_lm.utils import load as stock_load

import mlxquant  # first: it loads the BLAS before MLX
from mlxquant.base.errors import BadValue, MlxquantError, Unsupported
from mlxquant.layers.transformed import ActivationSpec
from mlxquant.model.inspection import inspect
from mlxquant.quantise import observe, pipeline, walk
from mlxquant.quantise.job import PROPAGATIONS, Text
from mlxquant.quantise.methods import METHODS
from mlxquant.quantise.observe import Observation

TOKENS = mx.array([[5, 80, 200, 7, 99, 31]])


def quantise(source, output, text, progress=lambda *_: None, **options):
    return mlxquant.quantize(str(source), output, job(text, **options), progress=progress)


def distance(a, b):
    return (mx.square(a - b).mean() / mx.square(b).mean()).item()


@pytest.mark.parametrize("options", [
    dict(method="rtn", bits=4), dict(method="gptq", bits=3),
    dict(method="gptq", bits=1, group_size=32), dict(method="gptq", bits="ternary"),
    dict(method="awq", bits=4), dict(method="gptq", bits=8, rotation="fused"),
    dict(method="awq", bits=6, rotation="fused"), dict(method="gptq", bits=4, act_order=True),
    dict(method="gptq", bits=4, propagation="corrected"),
    dict(method="gptq", bits=4, embedding_bits=8),
])
def test_every_plain_result_loads_in_stock_mlx_lm(tmp_path, tiny_folder, tiny, text, options):
    quantise(tiny_folder, tmp_path / "out", text, **options)
    stock, _ = stock_load(str(tmp_path / "out"))
    ours = mlxquant.load(str(tmp_path / "out"))
    logits = stock(TOKENS).astype(mx.float32)
    assert distance(ours.network(TOKENS), logits) < 1e-4  # stock runs in half precision
    limit = {8: 1e-2, 6: 2e-2, 4: 0.2}.get(options["bits"], 1.5)
    assert distance(logits, tiny.network(TOKENS)) < limit


@pytest.mark.parametrize("options", [
    dict(method="gptq", bits=8, rotation="online"), dict(method="gptq", bits=8, group_size=0),
    dict(method="rtn", bits=8, group_size=-1, symmetric=True),
    dict(method="awq", bits=6, rotation="online", group_size=16),
    dict(method="smoothquant", bits=8, group_size=0, activation=ActivationSpec()),
    dict(method="smoothquant", bits=8, group_size=0, alpha=0.5,
         activation=ActivationSpec(granularity="tensor")),
    dict(method="smoothquant", bits=8, group_size=0, alpha=0.5,
         activation=ActivationSpec(granularity="static")),
])
def test_our_own_format_loads_here_and_is_refused_by_stock_mlx_lm(tmp_path, tiny_folder, tiny, text,
                                                                  options):
    quantise(tiny_folder, tmp_path / "out", text, **options)
    ours = mlxquant.load(str(tmp_path / "out"))
    assert distance(ours.network(TOKENS), tiny.network(TOKENS)) < 5e-2
    with pytest.raises(ValueError, match="Model type mlxquant not supported"):
        stock_load(str(tmp_path / "out"))
    assert inspect(str(tmp_path / "out")).architecture == "llama"


@pytest.mark.parametrize("options", [
    dict(bits=4), dict(bits=3, replicas=4, replica_group=16, rotation="online"),
    dict(bits=2, replicas=1), dict(bits="ternary", propagation="corrected"),
    dict(bits=1, replicas=16, refine=1),
])
def test_replicas_load_here_and_run_as_they_were_fitted(tmp_path, tiny_folder, tiny, text, options):
    quantise(tiny_folder, tmp_path / "out", text, method="replica", **options)
    ours = mlxquant.load(str(tmp_path / "out"))
    limit = {4: 0.1, 3: 0.3}.get(options["bits"], 2.0)
    assert distance(ours.network(TOKENS), tiny.network(TOKENS)) < limit
    dense = mlxquant.load(str(tmp_path / "out"), dense=True)
    assert distance(ours.network(TOKENS), dense.network(TOKENS)) < 1e-4
    with pytest.raises(ValueError, match="Model type mlxquant not supported"):
        stock_load(str(tmp_path / "out"))
    kinds = {layer.path: layer for layer in inspect(str(tmp_path / "out")).layers}
    assert kinds["model.layers.0.self_attn.q_proj"].bits == options["bits"]


def test_bits_per_weight_are_those_of_codes_scales_and_biases(tmp_path, tiny_folder, text):
    quantise(tiny_folder, tmp_path / "out", text, bits=2, group_size=64)
    result = inspect(str(tmp_path / "out"))
    assert result.bits_per_weight == 2 + 2 * 16 / 64
    quantise(tiny_folder, tmp_path / "channel", text, bits=8, group_size=0)
    by_channel = inspect(str(tmp_path / "channel")).bits_per_weight
    assert 8 + 2 * 16 / 128 < by_channel <= 8 + 2 * 16 / 64


def test_tokenizer_files_come_along(tmp_path, tiny_folder, text):
    source = shutil.copytree(tiny_folder, tmp_path / "source")
    (source / "tokenizer.model").write_bytes(b"\x00\xff not text")
    (source / "code.py").write_text("raise SystemExit")
    quantise(source, tmp_path / "out", text, method="rtn")
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"\x00\xff not text"
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert not (tmp_path / "out" / "code.py").exists()


def test_overrides_reach_the_checkpoint(tmp_path, tiny_folder, text):
    quantise(tiny_folder, tmp_path / "out", text, bits=2, rules=(("*.down_proj", {"bits": 8}),))
    bits = {layer.path.split(".")[-1]: layer.bits
            for layer in inspect(str(tmp_path / "out")).layers}
    assert bits["down_proj"] == 8 and bits["up_proj"] == 2
    stock_load(str(tmp_path / "out"))


@pytest.mark.parametrize("propagation", PROPAGATIONS)
def test_a_killed_run_resumes_to_identical_bytes(tmp_path, tiny_folder, text, propagation):
    options = dict(bits=3, propagation=propagation)
    quantise(tiny_folder, tmp_path / "whole", text, **options)

    def kill(done, total, seconds, stage):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantise(tiny_folder, tmp_path / "killed", text, progress=kill, **options)
    assert not (tmp_path / "killed").exists() and (tmp_path / "killed.partial").is_dir()
    with pytest.raises(MlxquantError, match="unfinished work of another job"):
        quantise(tiny_folder, tmp_path / "killed", text, bits=4)
    resumed = []
    quantise(tiny_folder, tmp_path / "killed", text, progress=lambda *s: resumed.append(s),
             **options)
    assert not (tmp_path / "killed.partial").exists()
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "killed" / file).read_bytes()


def test_the_inputs_of_a_block_are_let_go_when_it_has_run():
    layer, x = nn.Sequential(nn.Linear(1 << 10, 4)), mx.zeros((1 << 10, 1 << 10))
    gc.collect()
    gc.disable()
    try:
        before = mx.get_active_memory()
        for _ in range(8):
            mx.eval(observe.Watch(layer).run(lambda: layer(x + 1))[0])
        assert mx.get_active_memory() - before < 2 * x.nbytes
    finally:
        gc.enable()


@pytest.mark.parametrize("propagation", PROPAGATIONS)
def test_the_statistics_of_finished_blocks_are_let_go(tmp_path, text, propagation):
    folder = write_folder(tmp_path / "deep", config=CONFIG | {"num_hidden_layers": 4})

    def held(*_):
        found = [o for o in gc.get_objects() if isinstance(o, Observation) and o.statistics]
        assert len(found) <= 1

    gc.collect()
    quantise(folder, tmp_path / "out", text, progress=held, bits=3, propagation=propagation)


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(tmp_path, tiny_folder, text):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        quantise(tiny_folder, tmp_path / name, text, bits=3, rotation="fused", seed=seed)
    a, b, c = ((tmp_path / n / "model.safetensors").read_bytes() for n in "abc")
    assert a == b != c


def test_without_text_the_model_writes_its_own(tmp_path, tiny_folder):
    mlxquant.quantize(str(tiny_folder), tmp_path / "out", job(bits=4, samples=3, length=16))
    record = json.loads((tmp_path / "out" / "config.json").read_text())["mlxquant_record"]
    assert record["calibration"]["source"] == "written by the model itself"
    assert record["method"] == "gptq" and record["seed"] == 0
    assert 0 < record["output_error"]["mean"] < record["output_error"]["largest"] < 0.1
    assert record["output_error"]["layer"].startswith("model.layers.")


@pytest.mark.parametrize("files", [True, False])
def test_some_of_the_samples_are_conversations(tmp_path, tiny_folder, text, monkeypatch, files):
    asked, tokens = [], []

    def converse(model, samples, length, seed, batch):
        asked.append((model.network.args.model_type, samples, length, seed, batch))
        return np.full((samples, length), 7)

    monkeypatch.setattr(pipeline, "converse", converse)
    monkeypatch.setattr(pipeline.Run, "make", lambda run, *_: tokens.append(run.tokens))
    wanted = job(text if files else None, 6, 16, bits=4, seed=3)
    wanted = replace(wanted, text=replace(wanted.text, conversations=2))
    mlxquant.quantize(str(tiny_folder), tmp_path / "out", wanted)
    made, = tokens
    assert asked == [("llama", 2, 16, 3, 16)] and made.tokens.shape == (6, 16)
    talk = (made.tokens == 7).all(axis=1)
    assert talk.sum() == 2 and not talk[-2:].all()  # what is held out to train by is both
    assert made.source.endswith(", 2 conversations of the model with itself")
    with pytest.raises(BadValue, match="conversations is 6, allowed are fewer than the 6 samples"):
        replace(wanted.text, conversations=6)


def test_a_model_that_cannot_talk_is_refused_before_it_writes(tmp_path, tiny_folder, monkeypatch):
    def converse(*_, **__):
        raise Unsupported("no chat template")

    monkeypatch.setattr(pipeline, "converse", converse)
    monkeypatch.setattr(pipeline, "self_written", None)
    wanted = replace(job(bits=4), text=Text(samples=6, length=16, conversations=2))
    with pytest.raises(Unsupported, match="no chat template"):
        mlxquant.quantize(str(tiny_folder), tmp_path / "out", wanted)


def test_rounding_needs_no_text_and_writes_none(tmp_path, tiny_folder, monkeypatch):
    monkeypatch.setattr(pipeline, "self_written", None)
    mlxquant.quantize(str(tiny_folder), tmp_path / "out",
                      job(method="rtn", rotation="online", bits=4))
    record = json.loads((tmp_path / "out" / "config.json").read_text())["mlxquant_record"]
    assert record["calibration"]["source"] == "none needed"


def test_an_architecture_without_the_right_norms_is_refused_for_the_fused_rotation(
        tmp_path, tiny_folder, text):
    folder = shutil.copytree(tiny_folder, tmp_path / "gemma")
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "mixtral"}
    with pytest.raises(Unsupported, match="llama, qwen2, qwen3, mistral, not mixtral"):
        pipeline.rotation.check(config)


@pytest.mark.parametrize("options,message", [
    (dict(bits=7), "allowed are 1, ternary"),
    (dict(method="smoothquant"), "give --activation-bits 8"),
    (dict(method="replica", bits=6), "bits is 6, allowed are 1, ternary"),
    (dict(method="replica", replicas=17), "replicas is 17"),
    (dict(method="replica", activation=ActivationSpec()), "leave"),
    (dict(refine=-1), "allowed are 0 to 100"),
    (dict(propagation="hope"), "float, quantised, corrected"),
    (dict(embedding_bits=7), "embedding_bits is 7, allowed are 1, 2, 3, 4, 5, 6, 8"),
    (dict(embedding_bits=True), "embedding_bits is True"),
    (dict(embedding_bits=0), "embedding_bits is 0"),
    (dict(alpha=1.5), "alpha is 1.5, allowed are 0 to 1"),
    (dict(alpha=-0.1), "alpha is -0.1"), (dict(alpha=float("nan")), "alpha is nan"),
    (dict(samples=0), "samples is 0"), (dict(length=1), "sequence length is 1"),
])
def test_impossible_requests_are_refused_before_any_work(tmp_path, tiny_folder, text, options,
                                                         message):
    with pytest.raises(BadValue, match=message):
        quantise(tiny_folder, tmp_path / "out", text, **options)
    assert list(tmp_path.iterdir()) == []


def test_statistics_of_the_float_model_are_kept_for_the_next_width(tmp_path, tiny_folder, text,
                                                                   monkeypatch):
    monkeypatch.setattr(walk, "_KEPT_BYTES", (0, 1e9))
    quantise(tiny_folder, tmp_path / "a", text, bits=2, propagation="float")
    monkeypatch.setattr(walk, "visits", None)  # would be called if the walk ran again
    quantise(tiny_folder, tmp_path / "b", text, bits=2, propagation="float")
    assert ((tmp_path / "a" / "model.safetensors").read_bytes()
            == (tmp_path / "b" / "model.safetensors").read_bytes())


def test_an_existing_output_is_kept(tmp_path, tiny_folder, text):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(MlxquantError, match="already exists"):
        quantise(tiny_folder, tmp_path / "out", text)
    with pytest.raises(BadValue, match="a sample needs 100000"):
        mlxquant.quantize(str(tiny_folder), tmp_path / "new", job(text=text, length=100_000))


def test_a_quantised_result_is_not_quantised_again(tmp_path, tiny_folder, text):
    quantise(tiny_folder, tmp_path / "one", text, bits=8, rotation="online")
    with pytest.raises(Unsupported, match="start from the original"):
        quantise(tmp_path / "one", tmp_path / "two", text)


def test_the_fused_rotation_of_an_untied_model_with_biases(tmp_path, text):
    config = CONFIG | {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}
    network = random_network(config)
    for layer in network.layers:
        layer.input_layernorm.weight = mx.random.uniform(0.5, 2.0, (64,))
        layer.self_attn.o_proj.bias = mx.random.normal((64,))
    source = write_folder(tmp_path / "untied", network, config)
    quantise(source, tmp_path / "out", text, bits=8, rotation="fused")
    assert distance(mlxquant.load(str(tmp_path / "out")).network(TOKENS), network(TOKENS)) < 1e-2


def test_the_fused_rotation_unties_a_head_that_no_configuration_mentions(tmp_path, text):
    source = architectures.write("qwen2", tmp_path / "source")  # Qwen 2 ties it by default
    quantise(source, tmp_path / "out", text, bits=8, rotation="fused")
    logits = mlxquant.load(str(tmp_path / "out")).network(TOKENS)
    assert distance(logits, mlxquant.load(str(source)).network(TOKENS)) < 1e-2


def test_awq_folds_into_norms_and_layers_with_biases_and_shared_heads(tmp_path, text, monkeypatch):
    monkeypatch.setitem(METHODS, "awq", replace(METHODS["awq"], balance=lambda weights, *_: mx.exp(
        mx.random.normal((weights[0].shape[1],), key=mx.random.key(0)))))
    config = CONFIG | {"attention_bias": True, "mlp_bias": True}
    network = random_network(config)
    for layer in network.layers:
        layer.self_attn.v_proj.bias = mx.random.normal((64,))
        layer.mlp.up_proj.bias = mx.random.normal((128,))
    source = write_folder(tmp_path / "biased", network, config)
    quantise(source, tmp_path / "out", text, method="awq", bits=8)
    stock, _ = stock_load(str(tmp_path / "out"))
    assert distance(stock(TOKENS).astype(mx.float32), network(TOKENS)) < 1e-2
    changed = stock.layers[0].input_layernorm.weight.astype(mx.float32)
    assert not mx.allclose(changed, network.layers[0].input_layernorm.weight, atol=1e-2)


@pytest.mark.parametrize("method, layer, changes", [
    ("awq", "v_proj", dict(method="replica", bits=4, replicas=8)),
    ("gptq", "v_proj", dict(method="awq"))])
def test_siblings_are_balanced_each_as_its_own_method_does(tmp_path, text, monkeypatch, method,
                                                           layer, changes):
    """Where no norm can take the factors, and replicas cannot have their input scaled."""
    balanced = []
    monkeypatch.setitem(METHODS, "awq", replace(METHODS["awq"], balance=lambda weights, *_: (
        balanced.append(len(weights)), mx.exp(mx.random.normal((weights[0].shape[1],))))[1]))
    source = architectures.write("starcoder2", tmp_path / "source")
    quantise(source, tmp_path / "out", text, method=method, bits=8, samples=1, length=16,
             rules=((f"*.{layer}", changes),))
    assert balanced == ([1, 1, 1, 2] if method == "awq" else [1]) * 4  # v alone, or all else
    logits = mlxquant.load(str(tmp_path / "out")).network(TOKENS)
    assert distance(logits, mlxquant.load(str(source)).network(TOKENS)) < 0.1
