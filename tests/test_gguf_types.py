"""Every type of GGUF: exact where MLX has a place for it, else within the reported error."""

from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
import pytest
from conftest import CONFIG, job, random_network
from gguf import GGMLQuantizationType as Type
from gguf_files import interleave_rows, random_blocks, write_gguf

import mlxquant
from mlxquant.base.errors import BadValue, Unsupported
from mlxquant.sources.gguf import import_file, repack, weights
from mlxquant.sources.gguf.model import Source, read
from mlxquant.sources.gguf.reader import GGUFTensor, open_model

EXACT = (Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0, Type.TQ1_0, Type.TQ2_0, Type.MXFP4,
         Type.IQ4_NL)
SCALES_ROUNDED = (Type.Q4_K, Type.Q5_K, Type.IQ1_S, Type.IQ4_XS)
ANEW = [t for t in weights.known() if t not in weights.PLAIN and t not in (*EXACT, *SCALES_ROUNDED)]


def dequantise(made: repack.Packed) -> np.ndarray:
    """MLX's own dequantiser, in float32."""
    scales, biases = (mx.array(a).astype(mx.float32) for a in (made.scales, made.biases))
    return np.array(mx.dequantize(mx.array(made.weight), scales, biases, group_size=32,
                                  bits=made.bits))


def relative(actual: np.ndarray, expected: np.ndarray) -> float:
    lost = np.square(actual.astype(np.float64) - expected).sum()
    return lost / np.square(expected.astype(np.float64)).sum()


@pytest.mark.parametrize("type_", EXACT)
@pytest.mark.parametrize("rows,blocks", [(1, 1), (3, 5), (700, 2)])
def test_repacked_blocks_equal_ggufs_decoder(type_, rows, blocks):
    data = random_blocks(type_, rows, blocks * gguf.GGML_QUANT_SIZES[type_][0])
    made = repack.repacked("w", type_, data)
    assert np.array_equal(dequantise(made), gguf.dequantize(data, type_)) and made.lost == 0


@pytest.mark.parametrize("type_", SCALES_ROUNDED)
def test_scales_too_fine_for_float16_cost_what_is_said(type_):
    data = random_blocks(type_, 20, 512)
    made, expected = repack.repacked("w", type_, data), gguf.dequantize(data, type_)
    error = relative(dequantise(made), expected)
    assert 0 < error < 2e-6 and error == pytest.approx(made.lost / made.whole, rel=1e-3)
    groups = repack.LAYOUTS[type_].read(data)  # in float32 nothing is lost
    codes = groups.codes.reshape(*groups.scales.shape, 32).astype(np.float32)
    whole = groups.scales[..., None] * codes + groups.biases[..., None]
    assert relative(whole.reshape(expected.shape), expected) < 1e-14


@pytest.mark.parametrize("type_", ANEW)
def test_other_types_are_decoded_and_cost_what_is_said(type_):
    data = random_blocks(type_, 20, 512)
    expected, errors = gguf.dequantize(data, type_), []
    for bits in (weights.width_for(type_), 8):
        made = weights.codes("w", type_, data, weights.plan("w", type_, True, bits))
        errors.append(relative(dequantise(made), expected))
        assert made.bits == bits and errors[-1] == pytest.approx(made.lost / made.whole, rel=1e-2)
    assert errors[1] < 3e-4 and errors[1] <= errors[0] < 0.3
    kept, lost, whole = weights.plain(type_, data, mx.float16)
    assert weights.plan("w", type_, True, 16) == weights.TensorPlan()
    error = relative(np.array(kept.astype(mx.float32)), expected)
    assert error < 1e-6 and error == pytest.approx(lost / (whole or 1), rel=1e-2)


def test_default_widths_hold_a_types_bits():
    widths = {type_.name: weights.width_for(type_) for type_ in ANEW}
    assert widths == {"Q2_K": 3, "Q3_K": 4, "Q6_K": 8, "IQ2_XXS": 3, "IQ2_XS": 3, "IQ2_S": 3,
                      "IQ3_XXS": 4,
                      "IQ3_S": 4, "IQ1_M": 2, "NVFP4": 5}
    assert weights.plan("w", Type.IQ4_NL, True) == weights.TensorPlan(5)
    assert weights.plan("w", Type.IQ4_NL, True, 8) == weights.TensorPlan(8, repacked=True)
    own = weights.plan("w", Type.Q4_K, True, 8)
    assert own == weights.TensorPlan(4, repacked=True)  # the file's codes stay


@pytest.mark.parametrize("type_", [Type.Q8_K, Type.Q8_1, Type.F64, Type.I32, Type.Q1_0])
def test_types_without_a_decoder_are_refused_by_name(type_):
    with pytest.raises(Unsupported,
                       match=f"w has type {type_.name}; types that can be imported: F32, F16"):
        weights.plan("w", type_, True)


def test_an_impossible_width_is_refused():
    with pytest.raises(BadValue, match="bits is 7, allowed are 2, 3, 4, 5, 6, 8, 16"):
        weights.plan("w", Type.Q6_K, True, 7)


@pytest.mark.parametrize("type_,place", [(Type.Q8_0, 0), (Type.Q6_K, 208)])
def test_values_outside_float16_are_refused(type_, place):
    data = random_blocks(type_, 1, 256)
    data[0, place:place + 2] = np.frombuffer(np.float16(60000).tobytes(), np.uint8)
    with pytest.raises(Unsupported, match="outside float16"):
        weights.codes("w", type_, data, weights.plan("w", type_, True))


def mixed(name: str) -> Type:
    """As Q4_K_M mixes: each part of a block its own type."""
    part = name.removesuffix(".weight").rpartition(".")[2]
    return {"attn_v": Type.Q6_K, "ffn_down": Type.Q5_K, "token_embd": Type.Q8_0,
            "attn_q": Type.Q4_K,
            "ffn_up": Type.IQ3_S}.get(part, Type.F16)


@pytest.fixture
def mix(tmp_path) -> Path:
    config = CONFIG | {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
    rows = {"attn_q": 256, "attn_v": 128, "ffn_down": 256, "ffn_up": 256}
    blocks = {f"blk.{b}.{part}.weight": random_blocks(mixed(part), count, 256, seed=b)
              for b in (0, 1) for part, count in rows.items()}
    return write_gguf(tmp_path / "mix.gguf", random_network(config), config=config, kind=mixed,
                      drop=blocks.keys(), extra=blocks.items())


def test_mixed_files_keep_their_mix_and_say_what_was_rounded(tmp_path, mix):
    outcome = import_file(mix, tmp_path / "out")
    model = mlxquant.load(str(tmp_path / "out"), dense=False)
    block = model.network.layers[1]
    layers = (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj,
              block.mlp.up_proj, block.mlp.down_proj)
    assert [getattr(layer, "bits", None) for layer in layers] == [4, None, 8, 4, 5]
    record = model.config["mlxquant_import"]
    assert record["types"]["Q6_K"] == 2
    assert record["rounded"]["model.layers.1.self_attn.v_proj"]["type"] == "Q6_K"
    assert {r["type"] for r in record["rounded"].values()} == {"Q4_K", "Q5_K", "Q6_K", "IQ3_S"}
    for name, rounded in record["rounded"].items():
        source = read(open_model(mix)).sources[f"{name}.weight"]
        expected = gguf.dequantize(source.blocks(), source.tensor.type)
        layer = dict(model.network.named_modules())[name]
        actual = np.array(mx.dequantize(layer.weight, layer.scales, layer.biases, 32, layer.bits))
        assert relative(actual, expected) == pytest.approx(rounded["error"], rel=1e-2)
    assert {"file": "mix.gguf", **outcome.record} == record and 0 < record["error"] < 0.02


def test_quantising_a_file_tells_what_it_inherits_from_what_it_adds(tmp_path, mix, monkeypatch):
    monkeypatch.setenv("MLXQUANT_CACHE", str(tmp_path / "cache"))
    outcome = mlxquant.quantize(str(mix), tmp_path / "out",
                                job(method="rtn", bits=3, group_size=64))
    plain = import_file(mix, tmp_path / "plain").record
    assert outcome.inherited["rounded"].keys() == plain["rounded"].keys()
    assert 0 < outcome.inherited["error"] < 0.02 < outcome.added["mean"] < outcome.added["largest"]
    tiny = mlxquant.load(str(tmp_path / "out")).config
    assert tiny["mlxquant_import"] == outcome.inherited
    assert tiny["mlxquant_record"]["output_error"] == outcome.added


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.BF16])
def test_a_bias_of_interleaved_heads_comes_back_in_order_in_every_type(tmp_path, kind):
    bias = np.arange(4 * 32, dtype=np.float32)
    blocks = gguf.quantize(interleave_rows(bias, 4), kind)
    blocks.tofile(tmp_path / "bias")
    tensor = GGUFTensor("blk.0.attn_q.bias", kind, bias.shape, tmp_path / "bias", 0)
    raw = Source(tensor, weights.TensorPlan(), 4).blocks()
    assert np.array_equal(gguf.dequantize(raw, kind).reshape(-1), bias)


def test_replicas_of_a_file(tmp_path, mix, monkeypatch):
    monkeypatch.setenv("MLXQUANT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("All work and no play makes Jack a dull boy. " * 20)
    outcome = mlxquant.quantize(str(mix), tmp_path / "out",
                                job(method="replica", bits=3, text=str(tmp_path / "text.txt"),
                                    samples=4, length=32))
    assert outcome.inherited["error"] > 0 and 0 < outcome.added["mean"] < 0.2
    assert "replica_in" in " ".join(mx.load(str(tmp_path / "out" / "model.safetensors")))


def test_every_tensor_of_the_real_file_is_exact(smollm2):
    imported = read(open_model(smollm2))
    assert len(imported.sources) == 272
    arrays = dict(imported.tensors())
    for name, source in imported.sources.items():
        tensor = source.tensor
        expected = gguf.dequantize(tensor.read(), tensor.type).reshape(tensor.shape)
        for part, heads in (("q_proj", 9), ("k_proj", 3)):
            if part in name:  # undo what the import undoes
                expected = expected.reshape(heads, 32, 2, -1).swapaxes(1, 2).reshape(tensor.shape)
        if tensor.type in weights.PLAIN:
            actual = np.array(arrays[name].astype(mx.float32))
        else:
            path = name.removesuffix(".weight")
            actual = dequantise(repack.Packed(*(np.array(arrays[key]) for key in (
                name, f"{path}.scales", f"{path}.biases")), repack.LAYOUTS[tensor.type].bits))
        assert np.array_equal(actual, expected), name
    assert imported.rounded == {}
