"""Loading through mlx-lm: stock checkpoints, memory limits, dense weights on a CPU."""

import gc
import logging
import shutil
import weakref

import mlx.core as mx
import mlx.nn as nn
import pytest
from conftest import CONFIG, job, random_network, write_folder
from mlx_lm import convert

import mlxquant
from mlxquant.base.errors import BadCheckpoint, BadValue, TooLarge, Unsupported
from mlxquant.layers import traffic
from mlxquant.layers.blocks import held_bytes
from mlxquant.machine.memory import memory_limit, parse_size
from mlxquant.model import loading
from mlxquant.model.inspection import inspect
from mlxquant.sources import checkpoint


@pytest.fixture(scope="module")
def stock_quantised(tiny_folder, tmp_path_factory):
    target = tmp_path_factory.mktemp("stock") / "q4"
    convert(str(tiny_folder), str(target), quantize=True, q_bits=4, q_group_size=32)
    return target


def test_a_stock_mlx_lm_conversion_loads(stock_quantised):
    model = mlxquant.load(str(stock_quantised))
    assert model.network(mx.array([[5, 6, 7]])).shape == (1, 3, 384)


def test_a_network_that_nobody_uses_lets_go_of_its_weights_at_once(tiny_folder):
    gc.disable()
    try:
        network, _ = loading.open_lazily(tiny_folder)
        seen = weakref.ref(network)
        del network
        assert seen() is None
    finally:
        gc.enable()


def test_dense_and_packed_weights_give_the_same_logits(stock_quantised):
    dense = mlxquant.load(str(stock_quantised))
    stored = inspect(str(stock_quantised)).bytes_per_token
    limit = f"{1.2e-3 * stored}KB"  # enough for the packed model only
    packed = mlxquant.load(str(stock_quantised), memory=limit)
    tokens = mx.array([[5, 80, 200, 7]])
    assert mx.allclose(dense.network(tokens), packed.network(tokens), atol=1e-4)
    if mx.default_device() == mx.cpu:
        assert isinstance(dense.network.layers[0].mlp.up_proj, nn.Linear)
        assert isinstance(packed.network.layers[0].mlp.up_proj, nn.QuantizedLinear)
        assert packed.weight_bytes_per_token < dense.weight_bytes_per_token


def test_a_model_over_the_memory_limit_is_refused(tiny_folder):
    with pytest.raises(TooLarge, match="needs 0.00 GB for its weights"):
        mlxquant.load(str(tiny_folder), memory="10KB")


@pytest.mark.parametrize("options", [dict(dtype=mx.float16), dict(group_size=64 * 3, bits=2)])
def test_what_a_loaded_model_holds_is_within_its_limit(tmp_path, options):
    """Also where weights take more as they run than in the file: floats, and groups of 192."""
    config = CONFIG | {"hidden_size": 192, "intermediate_size": 384}
    network = random_network(config)
    network.set_dtype(options.pop("dtype", mx.float32))
    folder = write_folder(tmp_path / "source", network, config)
    if options:
        mlxquant.quantize(str(folder), tmp_path / "made", job(method="rtn", **options))
        folder = tmp_path / "made"
    held = held_bytes(mlxquant.load(str(folder), dense=False).network)
    assert held_bytes(mlxquant.load(str(folder), dense=False, memory=held).network) == held
    with pytest.raises(TooLarge, match="GB for its weights"):
        mlxquant.load(str(folder), dense=False, memory=held - 1)


def test_a_folder_without_tokenizer_is_refused(tmp_path, tiny_folder):
    folder = shutil.copytree(tiny_folder, tmp_path / "mute")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(BadCheckpoint, match="no usable tokenizer"):
        mlxquant.load(str(folder))


def test_an_unknown_architecture_is_refused(tmp_path, tiny_folder):
    folder = shutil.copytree(tiny_folder, tmp_path / "alien")
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"llama"', '"alien9000"'))
    with pytest.raises(Unsupported, match="alien9000 not supported"):
        mlxquant.load(str(folder))


@pytest.mark.parametrize("text,value", [("16GB", 16e9), ("500 mb", 5e8), ("1.5G", 1.5e9),
                                        (2048000, 2048000)])
def test_sizes(text, value):
    assert parse_size(text) == value


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "inf", "nan", "8XB", "0", "16", 16, 16.0])
def test_odd_sizes_are_refused(text):
    with pytest.raises(BadValue, match="is no size"):
        parse_size(text)


def test_the_memory_limit_is_within_the_machine():
    assert 0 < memory_limit() < 4 << 40


def test_on_cuda_the_memory_limit_is_the_gpus_not_the_hosts(monkeypatch):
    monkeypatch.setattr(mx, "device_info", lambda: {"free_memory": 5 << 20})
    own = mx.get_active_memory() + mx.get_cache_memory()
    assert memory_limit() == (5 << 20) + own


def test_inspection_counts_what_the_files_hold(stock_quantised):
    result = inspect(str(stock_quantised))
    assert result.bits_per_weight == 4 + 2 * 32 / 32  # codes, float32 scale and bias
    body = [layer for layer in result.layers if ".layers." in layer.path]
    assert {layer.format for layer in result.layers} == {"affine g32"}
    assert body[0].path == "model.layers.0.self_attn.q_proj" and body[0].shape == [128, 64]
    assert result.file_bytes == sum(p.stat().st_size for p in stock_quantised.iterdir())
    norms = 5 * 64 * 4
    assert result.bytes_per_token == sum(layer.bytes for layer in result.layers) + norms
    assert result.parameters == random_network().model.embed_tokens.weight.size + sum(
        layer.shape[0] * layer.shape[1] for layer in body) + 5 * 64


def test_an_untied_embedding_counts_as_one_row(tmp_path):
    config = CONFIG | {"tie_word_embeddings": False}
    result = inspect(str(write_folder(tmp_path / "untied", config=config)))
    tied = inspect(str(write_folder(tmp_path / "tied")))
    assert result.bytes_per_token == tied.bytes_per_token + 64 * 4


def test_kv_bytes_are_those_of_the_tokens_held(tiny):
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(tiny.network)
    assert traffic.kv_bytes(cache) == 0
    tiny.network(mx.array([[1, 2, 3, 4, 5]]), cache=cache)
    layers, heads, size = 2, 2, 32
    assert traffic.kv_bytes(cache) == 5 * 2 * layers * heads * size * 4


def test_loading_warns_before_memory_runs_out(tiny_folder, capsys):
    stored = sum(header.bytes for header in checkpoint.validate(tiny_folder).values())
    mlxquant.load(str(tiny_folder), memory=f"{stored / 0.95e3}KB", dense=False)
    assert "of the 0.00 GB that may be used: replies may be slow" in capsys.readouterr().err
    mlxquant.load(str(tiny_folder), memory=f"{stored / 0.85e3}KB", dense=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kind,heard", [("qwen2", False), ("mlxquant", False), ("mistral", True)])
def test_a_warning_about_mistral_is_for_mistral_alone(tiny_folder, monkeypatch, kind, heard):
    """transformers 5.7 warns of it for every vocabulary above 100,000 that lies on disk."""
    logger = logging.getLogger("transformers.tokenization_utils_tokenizers")
    said = []
    monkeypatch.setattr(loading, "load_tokenizer", lambda *_, **__: said.append(
        logger.isEnabledFor(logging.WARNING)))
    loading.open_tokenizer(tiny_folder, {"model_type": kind})
    assert said == [heard]
