"""Files that hold one matrix as embedding and as head: it is stored once, the finer."""

import json

import mlx.core as mx
import numpy as np
import pytest
from conftest import CONFIG, job, random_network
from gguf import GGMLQuantizationType as Type
from gguf_files import write_gguf
from test_gguf_architectures import CASES, random_model

import mlxquant
from mlxquant.model.loading import open_lazily
from mlxquant.model.original import open_original, without_second
from mlxquant.quantise.pipeline import ONCE
from mlxquant.report.needs import model_of
from mlxquant.sources.gguf import import_file

UNTIED = CONFIG | {"tie_word_embeddings": False, "vocab_size": 2048}
TOKENS = mx.array(np.random.default_rng(0).integers(0, 384, (2, 12)))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLXQUANT_CACHE", str(tmp_path / "cache"))


def written(folder, embedding, head, apart=0.0, times=1.0, body=Type.Q8_0):
    """A GGUF file with a matrix and the same, ``apart`` by noise or ``times`` as large, of two
    types."""
    network = random_network(UNTIED)
    matrix = network.model.embed_tokens.weight
    network.lm_head.weight = times * matrix + apart * mx.random.normal(matrix.shape)
    network.model.norm.weight = 1 + mx.random.normal((UNTIED["hidden_size"],))
    kinds = {"token_embd.weight": embedding, "output.weight": head}
    return write_gguf(folder / "model.gguf", network, config=UNTIED,
                      kind=lambda name: kinds.get(name, body))


@pytest.mark.parametrize("body", [Type.Q8_0, Type.F16])
@pytest.mark.parametrize("embedding, head, bits", [
    (Type.Q4_0, Type.Q8_0, 8), (Type.Q8_0, Type.Q4_0, 8), (Type.Q4_0, Type.F16, 16),
    (Type.Q8_0, Type.Q8_0, 8)])
def test_the_finer_of_both_is_embedding_and_head(tmp_path, embedding, head, bits, body):
    import_file(written(tmp_path, embedding, head, body=body), tmp_path / "model")
    twice, config = open_lazily(tmp_path / "model")
    once, tied = open_original(tmp_path / "model")
    assert not config["tie_word_embeddings"] and tied["tie_word_embeddings"]
    assert "lm_head" not in once and getattr(once.model.embed_tokens, "bits", 16) == bits
    finer = twice.model.embed_tokens if bits == getattr(
        twice.model.embed_tokens, "bits", 16) else twice.lm_head
    for name, array in once.model.embed_tokens.parameters().items():
        assert mx.array_equal(array, finer[name]), name
    hidden = twice.model(TOKENS, input_embeddings=once.model.embed_tokens(TOKENS))
    assert mx.allclose(once(TOKENS), once.model.embed_tokens.as_linear(hidden), 1e-3, 1e-3)


@pytest.mark.parametrize("differs", [dict(apart=2.0), dict(apart=0.3), dict(times=4.0)])
def test_a_head_of_its_own_stays(tmp_path, differs):
    record = import_file(written(tmp_path, Type.Q4_0, Type.Q8_0, **differs),
                         tmp_path / "model").record
    assert "one_matrix" not in record
    network, config = open_original(tmp_path / "model")
    assert "lm_head" in network and without_second(config) is config


@pytest.mark.parametrize("options", [
    dict(method="rtn", bits=4), dict(method="rtn", bits=4, embedding_bits=4),
    dict(method="gptq", bits=4, rotation="fused"),
    dict(method="replica", bits=2, target=mlxquant.Target(gigabytes=0.0006))])
def test_a_result_holds_it_once(tmp_path, options):
    (tmp_path / "text.txt").write_text("All work and no play makes Jack a dull boy. " * 20)
    file = written(tmp_path, Type.Q4_0, Type.Q8_0)
    made = mlxquant.quantize(str(file), tmp_path / "out",
                             job(tmp_path / "text.txt", 4, 32, **options))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    tensors = mx.load(str(tmp_path / "out" / "model.safetensors"))
    fused = options.get("rotation") == "fused"  # which makes another head of it
    assert config["tie_word_embeddings"] is not fused
    assert any(name.startswith("lm_head") for name in tensors) is fused
    assert (made.notes[:1] == (ONCE,)) is not fused
    model = mlxquant.load(str(tmp_path / "out"))
    assert mx.isfinite(model.network(TOKENS)).all()


def test_the_finer_is_that_of_the_file_and_not_of_the_import(tmp_path):
    import_file(written(tmp_path, Type.Q4_0, Type.Q5_0), tmp_path / "model", bits=8)
    assert open_lazily(tmp_path / "model")[1]["mlxquant_import"]["one_matrix"]["finer"] == "lm_head"


# Mixtures keep routers in 32 bits; stablelm's head cannot go, and seed_oss cannot quantise its
# embedding where that is the head.
@pytest.mark.parametrize("name, once", [("qwen3_moe", True), ("qwen2", True), ("stablelm", False),
                                        ("seed_oss", False)])
def test_other_architectures_have_it_once_or_as_before(tmp_path, name, once):
    architecture = "qwen3moe" if name == "qwen3_moe" else name
    changes, fields = CASES[architecture]
    network, config = random_model(architecture, {"tie_word_embeddings": False} | changes)
    network.lm_head.weight = network.model.embed_tokens.weight
    kinds = {"token_embd.weight": Type.Q4_0, "output.weight": Type.Q8_0}
    file = write_gguf(tmp_path / "model.gguf", network, config=config, architecture=architecture,
                      fields=fields, kind=lambda name: kinds.get(
                          name, Type.F32 if "gate_inp" in name else Type.Q8_0))
    made = mlxquant.quantize(str(file), tmp_path / "out", job(method="rtn", bits=8))
    model = mlxquant.load(str(tmp_path / "out"), dense=False)
    assert model.config["tie_word_embeddings"] is once and (ONCE in made.notes) is once
    assert mx.isfinite(model.network(TOKENS)).all()


def test_a_result_with_another_head_is_no_longer_said_to_have_one_matrix(tmp_path):
    """A fused rotation folds the last norm into the head alone."""
    (tmp_path / "text.txt").write_text("All work and no play makes Jack a dull boy. " * 20)
    turned, again = tmp_path / "turned", tmp_path / "again"
    mlxquant.quantize(str(written(tmp_path, Type.F16, Type.F16, body=Type.F16)), turned, job(
        tmp_path / "text.txt", 4, 32, method="gptq", bits=8, rotation="fused"))
    made = mlxquant.quantize(str(turned), again, job(method="rtn", bits=8))
    assert ONCE not in made.notes
    before, after = (mlxquant.load(str(f)).network(TOKENS) for f in (turned, again))
    assert mx.abs(before - after).max() < 0.1 * mx.abs(before).max()


def test_a_head_that_another_tool_changed_is_not_taken_for_the_embedding(tmp_path):
    import_file(written(tmp_path, Type.Q4_0, Type.F16, body=Type.F16), tmp_path / "model")
    assert "lm_head" not in open_original(tmp_path / "model")[0]
    file, = (tmp_path / "model").glob("*.safetensors")
    arrays, metadata = mx.load(str(file), return_metadata=True)
    arrays["lm_head.weight"] = arrays["lm_head.weight"] + 0.01
    mx.eval(arrays)
    mx.save_safetensors(str(file), arrays, metadata)
    network, config = open_original(tmp_path / "model")
    assert "lm_head" in network and not config["tie_word_embeddings"]


def test_a_plan_counts_it_once(tmp_path):
    import_file(written(tmp_path, Type.Q4_0, Type.Q8_0), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    same = {key: value for key, value in config.items() if key != "mlxquant_import"}
    with_both = model_of("x", same, 64).original
    once = model_of("x", config, 64).original
    assert "lm_head" in with_both and "lm_head" not in once
