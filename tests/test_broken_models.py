"""Folders that would run and answer nonsense, or end in a traceback: refused in a line that names
the tensor, the key or the file; and 8-bit floats with scales, which are read as they are meant."""

import json
import os
import re
import shutil

import mlx.core as mx
import numpy as np
import pytest
from conftest import CONFIG, random_network, tokenizer_texts, write_folder
from mlx.utils import tree_flatten

import mlxquant
from mlxquant.base.errors import BadCheckpoint, CannotWrite, MlxquantError, Unsupported
from mlxquant.base.storage import cached, if_writable, write_json
from mlxquant.kernels import backend
from mlxquant.model.loading import open_lazily
from mlxquant.runtime import probe
from mlxquant.sources import checkpoint

MATRIX = "model.layers.1.mlp.down_proj.weight"
CODES = {"F8_E4M3": mx.to_fp8, "I8": lambda w: w.astype(mx.int8), "BOOL": lambda w: w > 0}


def weights() -> dict[str, mx.array]:
    return dict(tree_flatten(random_network().parameters()))


def folder_of(path, tensors: dict[str, mx.array], types: dict[str, str] | None = None, **config):
    """A model folder of any tensors, finite or not; ``types`` are other names for their types."""
    types = types or {}
    path.mkdir()
    mx.save_safetensors(str(path / "model.safetensors"), tensors)
    data = (path / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + length])
    for name, kind in types.items():
        header[name]["dtype"] = kind
    text = json.dumps(header).encode()
    (path / "model.safetensors").write_bytes(
        len(text).to_bytes(8, "little") + text + data[8 + length:])
    (path / "config.json").write_text(json.dumps(CONFIG | config))
    for name, content in tokenizer_texts().items():
        (path / name).write_text(content)
    return path


def told(kind: type[MlxquantError], folder) -> str:
    with pytest.raises(kind) as caught:
        mlxquant.load(str(folder))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_a_weight_that_is_no_number_is_named(tmp_path, dtype, value):
    made = {name: array.astype(dtype) for name, array in weights().items()}
    made[MATRIX][3, 5] = float(value)
    with pytest.raises(BadCheckpoint, match=f"{MATRIX}: 1 of 8192 values are infinite or not num"):
        checkpoint.write(tmp_path / "written", CONFIG, made.items(), {})
    assert not (tmp_path / "written").exists()
    said = told(BadCheckpoint, folder_of(tmp_path / "read", made))
    assert f"tensor {MATRIX} of {tmp_path / 'read'}: 1 of 8192" in said


@pytest.mark.parametrize("kind", CODES)
def test_codes_without_scales_are_not_taken_for_numbers(tmp_path, kind):
    made = weights()
    made[MATRIX] = CODES[kind](made[MATRIX])
    folder = folder_of(tmp_path / "m", made, {MATRIX: kind})
    assert f"{MATRIX} holds codes of type {kind} without scales" in told(Unsupported, folder)
    with pytest.raises(Unsupported, match="without scales"):
        open_lazily(folder)


def eight_bits(weight: mx.array, rows: int, columns: int) -> tuple[mx.array, mx.array, np.ndarray]:
    """Codes, scales of blocks, and what they stand for, block by block."""
    m, n = weight.shape
    scales = np.random.default_rng(0).uniform(0.5, 2, (-(-m // rows), -(-n // columns)))
    codes = mx.to_fp8(weight)
    values = np.array(mx.from_fp8(codes, dtype=mx.float32))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = np.s_[i * rows:(i + 1) * rows, j * columns:(j + 1) * columns]
            values[block] *= np.float32(scales[i, j])
    return codes, mx.array(scales.astype(np.float32)), values


@pytest.mark.parametrize("block,powers", [(None, False), (None, True), ([48, 40], False)])
def test_8_bit_floats_are_scaled_block_by_block(tmp_path, block, powers):
    """As DeepSeek and Qwen publish them, here for a model that mlx-lm does not do it for."""
    made, types, meant = weights(), {}, {}
    for name in [name for name in made if "_proj" in name]:
        codes, scale, meant[name] = eight_bits(made[name], *(block or (128, 128)))
        if powers:  # of two, as DeepSeek's later scales are
            scale, types[f"{name}_scale_inv"] = mx.full(scale.shape, 124, mx.uint8), "F8_E8M0"
            meant[name] = np.array(mx.from_fp8(codes, dtype=mx.float32)) / 8
        made |= {name: codes, f"{name}_scale_inv": scale}
        types[name] = "F8_E4M3"
    form = {"quant_method": "fp8", "fmt": "e4m3"} | ({"weight_block_size": block} if block else {})
    folder = folder_of(tmp_path / "m", made, types, quantization_config=form)
    network, config = open_lazily(folder)
    found = dict(tree_flatten(network.parameters()))
    assert "quantization_config" not in config  # nor is it true of what is made of the model
    for name, values in meant.items():
        np.testing.assert_allclose(np.array(found[name].astype(mx.float32)), values, rtol=2**-8)
    model = mlxquant.load(str(folder))
    assert mx.isfinite(model.network(mx.array([[5, 80, 200]]))).all()


@pytest.mark.parametrize("scale,kind,says", [
    (mx.ones((3, 1)), "F8_E4M3", r"of shape \[3, 1\] does not scale \[64, 128\]"),
    (mx.ones((1, 1)), "U8", "has no 8-bit floats"),
    (mx.ones((1, 1), mx.uint8), "F8_E4M3", "holds scales of type U8; they must be floats"),
])
def test_scales_that_do_not_fit_are_named(tmp_path, scale, kind, says):
    made = weights()
    made |= {MATRIX: mx.to_fp8(made[MATRIX]), f"{MATRIX}_scale_inv": scale}
    folder = folder_of(tmp_path / "m", made, {MATRIX: kind})
    assert re.search(f"{MATRIX}_scale_inv {says}", told(MlxquantError, folder))


@pytest.mark.parametrize("scale", [mx.array(0.5), mx.array([0.5]), mx.array([[0.5]])])
def test_one_scale_is_that_of_the_whole(tmp_path, scale):
    made = weights()
    made |= {MATRIX: mx.to_fp8(made[MATRIX]), f"{MATRIX}_scale_inv": scale}
    network, _ = open_lazily(folder_of(tmp_path / "m", made, {MATRIX: "F8_E4M3"}))
    expected = 0.5 * mx.from_fp8(made[MATRIX], dtype=mx.float32)
    assert mx.array_equal(dict(tree_flatten(network.parameters()))[MATRIX], expected)


def test_a_type_that_mlx_cannot_read_is_named(tmp_path):
    made = weights()
    made[MATRIX] = mx.view(mx.contiguous(mx.concatenate([made[MATRIX]] * 2, 1)), mx.uint64)
    folder = folder_of(tmp_path / "m", made, {MATRIX: "F64"})
    assert f"tensor {MATRIX} is of type F64" in told(Unsupported, folder)


def test_all_missing_and_all_extra_tensors_are_told(tmp_path, tiny_folder):
    folder = shutil.copytree(tiny_folder, tmp_path / "m")
    for blocks, first, others in ((4, "Missing 18", r"layers\.\*\.mlp\.up_proj\.weight \(2\)"),
                                  (1, "Received 9", r"layers\.1\.mlp\.up_proj\.weight")):
        (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": blocks}))
        said = told(BadCheckpoint, folder)
        assert first in said and re.search(others, said) and "self_attn.v_proj" in said


@pytest.mark.parametrize("change,says", [
    ({"max_position_embeddings": None}, "'max_position_embeddings' expected int, got NoneType"),
    ({"num_attention_heads": 0}, "config and weights do not make a model: .*zero"),
    ({"hidden_size": "big"}, "config and weights do not make a model"),
    ({"rope_scaling": {"type": "bogus"}}, "Unsupported RoPE type bogus"),
    ({"quantization_config": {"bits": 4}}, "quantization_config lacks quant_method"),
    ({"model_type": "siglip_vision_model"}, "siglip_vision_model not supported"),
])
def test_a_configuration_that_makes_no_model_is_one_line(tmp_path, tiny_folder, change, says):
    folder = shutil.copytree(tiny_folder, tmp_path / "m")
    (folder / "config.json").write_text(json.dumps(CONFIG | change))
    assert re.search(says, told(MlxquantError, folder))


@pytest.mark.parametrize("name,content", [
    ("tokenizer.json", b"{}"), ("tokenizer.json", b"\xff"), ("chat_template.jinja", b"\xff\xfe"),
    ("tokenizer_config.json", b"[]")])
def test_a_tokenizer_that_does_not_load_is_one_line(tmp_path, tiny_folder, name, content):
    folder = shutil.copytree(tiny_folder, tmp_path / "m")
    (folder / name).write_bytes(content)
    assert "no usable tokenizer" in told(BadCheckpoint, folder)


def test_an_adapter_is_no_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    mx.save_safetensors(str(tmp_path / "adapter_model.safetensors"), {"a": mx.zeros(2)})
    assert "holds an adapter, no model" in told(Unsupported, tmp_path)


def test_links_that_lead_nowhere_or_out_are_named(tmp_path, tiny_folder):
    secret = tmp_path / "secret"
    secret.write_text("a key")
    folder = shutil.copytree(tiny_folder, tmp_path / "m")
    (folder / "notes.txt").symlink_to(secret)
    assert f"{folder / 'notes.txt'} leads outside the model folder" in told(BadCheckpoint, folder)
    with pytest.raises(BadCheckpoint, match="leads outside"):
        checkpoint.side_files(folder)
    (folder / "notes.txt").unlink()
    for target in ("gone", "model.safetensors"):  # a file that was deleted, and a link to itself
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors").symlink_to(target)
        assert f"is a link to {target}, which is missing" in told(BadCheckpoint, folder)


def test_limits_that_are_infinite_stay_so(tmp_path):
    """Some models' are; JSON has no word for it, and takes what transformers writes."""
    config = CONFIG | {"time_step_limit": [0.0, float("inf")]}
    folder = write_folder(tmp_path / "m", config=config)
    json.loads((folder / "config.json").read_text(), parse_constant=pytest.fail)
    assert checkpoint.read_config(folder) == config


def test_json_names_the_key_of_what_is_no_number(tmp_path):
    with pytest.raises(MlxquantError, match=r"layers\.1\.error is not a finite number"):
        write_json(tmp_path / "x.json", {"layers": [{"error": 0.1}, {"error": float("nan")}]})
    assert list(tmp_path.iterdir()) == []


def test_a_fingerprint_tells_models_of_the_same_weights_apart(tmp_path, tiny_folder, monkeypatch):
    folder = shutil.copytree(tiny_folder, tmp_path / "m")
    seen = {checkpoint.fingerprint(folder), checkpoint.fingerprint(folder)}
    (folder / "config.json").write_text(json.dumps(CONFIG | {"rope_theta": 5000.0}))
    seen.add(checkpoint.fingerprint(folder))
    monkeypatch.setattr(checkpoint, "__version__", "9")
    seen.add(checkpoint.fingerprint(folder))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    seen.add(checkpoint.fingerprint(folder))
    for name in ("log.txt", "result.json"):
        (folder / name).write_text("{}")
        seen.add(checkpoint.fingerprint(folder))
    assert len(seen) == 4


def test_a_model_put_in_anothers_place_is_told_from_it_by_its_bytes(tmp_path, tiny_folder):
    """Of the same size and time, as ``cp -p``, ``tar`` and package managers leave files."""
    folder = shutil.copytree(tiny_folder, tmp_path / "m")
    before = checkpoint.fingerprint(folder)
    weights = folder / "model.safetensors"
    time = weights.stat().st_mtime_ns
    write_folder(tmp_path / "other", random_network(seed=1))
    shutil.copy(tmp_path / "other" / weights.name, weights)
    os.utime(weights, ns=(time, time))
    assert checkpoint.fingerprint(folder) != before


def test_a_cache_that_cannot_be_written_stops_nothing(tmp_path, monkeypatch, capsys):
    (tmp_path / "full").write_text("")
    place = tmp_path / "full" / "cache"
    monkeypatch.setenv("MLXQUANT_CACHE", str(place))
    with pytest.raises(CannotWrite, match="cannot write"):
        write_json(place / "x.json", 1)
    with if_writable():
        write_json(place / "x.json", 1)
    assert cached(place / "y.json", lambda: {"a": (1, 2)}) == {"a": [1, 2]}
    assert backend.trusted("a kernel that is sound", lambda: 0.0, 0.1)
    known = probe.Probe(probe.Ceiling(1.0, 0.0, "", "", ""), {}, 1.0)
    assert probe._kept(known) == known
    assert capsys.readouterr().err.count("measured again next time") == 1
