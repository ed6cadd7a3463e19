"""Model folders: written whole or not at all, and refused when they lie."""

import json
import struct
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import CONFIG, write_folder
from mlx_lm.utils import load as stock_load

import mlxquant
from mlxquant.base import storage
from mlxquant.base.errors import BadCheckpoint, BadValue, MlxquantError
from mlxquant.sources import checkpoint


def safetensors(header, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape=(2,), begin=0, end=8, dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def folder_with(tmp_path, data: bytes):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors").write_bytes(data)
    return tmp_path


@pytest.mark.parametrize("data,message", [
    (b"", "header too small"),
    (struct.pack("<Q", 2**60) + b"{}", "header too large"),
    (safetensors(b"{nonsense"), "invalid JSON"),
    (safetensors(b"[" * 100_000), "invalid JSON"),
    (safetensors(b"[]"), "invalid JSON"),
    (safetensors(b'{"a": {}, "a": {}}'), "missing field"),
    (safetensors({"a": entry()}), "not fully covered"),
    (safetensors({"a": entry()}, bytes(9)), "not fully covered"),
    (safetensors({"a": entry(end=4)}, bytes(4)), "invalid shape"),
    (safetensors({"a": entry(shape=(-1, -2))}, bytes(8)), "invalid value"),
    (safetensors({"a": entry(shape=(2.0,))}, bytes(8)), "floating point"),
    (safetensors({"a": entry(dtype="F33")}, bytes(8)), "unknown variant `F33`"),
    (safetensors({"a": {"dtype": "F32"}}, bytes(8)), "missing field `shape`"),
    (safetensors({"a": entry(), "b": entry()}, bytes(8)), "invalid offset for tensor"),
    (safetensors({"a": entry(begin=4, end=12)}, bytes(12)), "invalid offset for tensor `a`"),
    (safetensors({"a": entry(shape=(2**40, 2**40), end=2**82)}, bytes(8)), "invalid type"),
])
def test_lying_safetensors_end_in_one_line(tmp_path, data, message):
    folder = folder_with(tmp_path, data)
    with pytest.raises(BadCheckpoint, match=message) as caught:
        checkpoint.validate(folder)
    assert "\n" not in str(caught.value)
    assert f"{folder}/model.safetensors is truncated or no safetensors file" in str(caught.value)


@pytest.mark.parametrize("weight_map,message", [
    ({"a": "../model.safetensors"}, "outside its folder"),
    ({"a": "/etc/passwd"}, "outside its folder"),
    ({"a": 3}, "outside its folder"),
    ({"a": "model-00002-of-00002.safetensors"}, "which is missing"),
    ({"a": "m" * 5000}, "which is missing"),
    ({"a": "model\0.safetensors"}, "which is missing"),
    ({"b": "model.safetensors"}, "does not hold"),
    ([], "no object"),
])
def test_lying_index_is_refused(tmp_path, weight_map, message):
    folder = folder_with(tmp_path, safetensors({"a": entry()}, bytes(8)))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(BadCheckpoint, match=message):
        checkpoint.validate(folder)


def test_a_name_in_two_shards_is_refused(tmp_path):
    folder = folder_with(tmp_path, safetensors({"a": entry()}, bytes(8)))
    (folder / "model-2.safetensors").write_bytes(safetensors({"a": entry()}, bytes(8)))
    with pytest.raises(BadCheckpoint, match="is in both"):
        checkpoint.validate(folder)


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    (tmp_path / "secret").write_bytes(safetensors({"a": entry()}, bytes(8)))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").symlink_to(tmp_path / "secret")
    with pytest.raises(BadCheckpoint, match="leads outside"):
        checkpoint.validate(folder)


@pytest.mark.parametrize("config,message", [
    (None, "holds no config.json"), ("{", "not readable JSON"), ("[]", "lacks"),
    ("{}", "lacks model_type")])
def test_bad_config_is_refused(tmp_path, config, message):
    folder = folder_with(tmp_path, safetensors({"a": entry()}, bytes(8)))
    (folder / "config.json").unlink()
    if config is not None:
        (folder / "config.json").write_text(config)
    with pytest.raises(BadCheckpoint, match=message):
        mlxquant.resolve(str(folder))


def test_a_folder_without_weights_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(BadCheckpoint, match="holds no model"):
        mlxquant.resolve(str(tmp_path))


def test_a_truncated_copy_of_a_good_model_is_refused(tmp_path, tiny_folder):
    data = (tiny_folder / "model.safetensors").read_bytes()
    folder = folder_with(tmp_path, data[:-1])
    with pytest.raises(BadCheckpoint, match="truncated"):
        mlxquant.load(str(folder))


def test_weights_that_do_not_fit_the_config_are_refused(tmp_path, tiny_folder):
    folder = folder_with(tmp_path, (tiny_folder / "model.safetensors").read_bytes())
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": 3}))
    with pytest.raises(BadCheckpoint, match="do not make a model"):
        mlxquant.load(str(folder))


def test_a_plain_folder_loads_in_stock_mlx_lm(tiny_folder, tiny):
    stock, tokenizer = stock_load(str(tiny_folder))
    tokens = mx.array([tokenizer.encode("plain as day")])
    assert mx.array_equal(stock(tokens), tiny.network(tokens))


def test_shards_are_cut_named_and_indexed(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 64_000)
    folder = write_folder(tmp_path / "sharded")
    files = sorted(p.name for p in folder.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert set(checkpoint.validate(folder)) == set(
        json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"])


def test_a_failed_write_leaves_nothing(tmp_path):
    def tensors():
        yield "a", mx.array(np.zeros(8, np.float32))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint.write(tmp_path / "out", CONFIG, tensors(), {})
    assert list(tmp_path.iterdir()) == []


def test_only_scratch_of_the_same_name_is_stale(tmp_path):
    names = {name: tmp_path / f".{name}.1a2b3c4d.part" for name in ("a[1]", "a", "a[1].5", "a1")}
    for scratch in names.values():
        scratch.mkdir()
    (tmp_path / ".a[1].z_9abcde.part").mkdir()  # as tempfile names it
    storage.drop_stale(tmp_path / "a[1]")
    assert set(tmp_path.iterdir()) == {names[name] for name in ("a", "a[1].5", "a1")}


@pytest.mark.parametrize("output", [".", "..", "x/..", "/"])
def test_an_output_without_a_name_of_its_own_is_refused(tmp_path, monkeypatch, output):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(BadValue, match="is no name for an output"):
        mlxquant.quantize("nothing", output)
    with pytest.raises(MlxquantError, match="is no name for an output|already exists"):
        checkpoint.write(Path(output), CONFIG, iter([]), {})
    assert list(tmp_path.rglob("*")) == [tmp_path / "here"]


def test_an_existing_folder_is_not_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(MlxquantError, match="already exists"):
        checkpoint.write(tmp_path / "out", CONFIG, iter([]), {})
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"
