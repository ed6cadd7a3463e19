"""GGUF import: from file to folder, split files, and files that lie."""

import json
import struct
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from commands import run
from conftest import random_network
from gguf import GGMLQuantizationType as Type
from gguf_files import write_gguf
from mlx_lm.utils import load as stock_load

import mlxquant
from mlxquant.base.errors import BadCheckpoint, Unsupported
from mlxquant.sources.gguf import import_file
from mlxquant.sources.gguf.reader import open_model


@pytest.mark.parametrize("kind,tolerance", [(Type.F32, 1e-5), (Type.F16, 2e-2), (Type.BF16, 1e-1)])
def test_imported_model_gives_the_original_logits(tmp_path, kind, tolerance):
    network = random_network()
    path = write_gguf(tmp_path / "tiny.gguf", network, kind=kind)
    import_file(path, tmp_path / "out")
    model = mlxquant.load(str(tmp_path / "out"))
    tokens = mx.array([[5, 80, 200, 7, 99]])
    assert mx.abs(model.network(tokens) - network(tokens)).max().item() < tolerance
    assert model.config["tie_word_embeddings"] is True


def test_quantised_import_loads_in_stock_mlx_lm(tmp_path):
    network = random_network()
    import_file(write_gguf(tmp_path / "q.gguf", network, kind=Type.Q8_0), tmp_path / "out")
    stock, _ = stock_load(str(tmp_path / "out"))
    ours = mlxquant.load(str(tmp_path / "out"))
    tokens = mx.array([[5, 80, 200, 7, 99]])
    expected = np.array(network(tokens))
    assert np.abs(np.array(ours.network(tokens)) - expected).max() < 0.1 * np.abs(expected).max()
    gap = mx.abs(stock(tokens).astype(mx.float32) - ours.network(tokens)).max().item()
    assert gap < 0.02 * np.abs(expected).max()  # stock runs in float16 here


def test_tokenizer_comes_from_the_metadata(tmp_path):
    import_file(write_gguf(tmp_path / "t.gguf", random_network()), tmp_path / "out")
    tokenizer = mlxquant.load(str(tmp_path / "out")).tokenizer
    text = "Zoë said: 42 tests, naïve?\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}],
                                        add_generation_prompt=True)
    assert ids[0] == 1 and tokenizer.eos_token_ids == {2}


def test_real_tokenizer_splits_digits_and_knows_its_template(smollm2_model):
    tokenizer = smollm2_model.tokenizer
    pieces = tokenizer.convert_ids_to_tokens(tokenizer.encode("In 1984 there's"))
    assert pieces == ["In", "Ġ", "1", "9", "8", "4", "Ġthere", "'s"]
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}],
                                        add_generation_prompt=True)
    assert tokenizer.decode(ids).startswith("<|im_start|>system\nYou are a helpful AI assistant")
    assert tokenizer.decode(ids).endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_import_is_cached_until_the_file_changes(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLXQUANT_CACHE", str(tmp_path / "cache"))
    path = write_gguf(tmp_path / "t.gguf", random_network())
    first = mlxquant.resolve(str(path))
    assert mlxquant.resolve(str(path)) == first
    assert capsys.readouterr().err.count("Importing") == 1
    write_gguf(path, random_network(seed=1), fields={"context_length": 256})
    assert mlxquant.resolve(str(path)) != first


@pytest.mark.parametrize("change,message", [
    (dict(architecture="baichuan"), "architecture 'baichuan'; supported: llama, smollm3"),
    (dict(pre="kimi-k2"), "splitting rule 'kimi-k2'; supported: default, gpt-2"),
    (dict(extra=[("blk.0.attn_sinks.weight", np.ones(16, np.float32))]),
     "attn_sinks.weight has no place"),
])
def test_what_is_not_supported_is_refused_by_name(tmp_path, change, message):
    path = write_gguf(tmp_path / "t.gguf", random_network(), **change)
    with pytest.raises(Unsupported, match=message):
        import_file(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change,message", [
    (dict(drop=["blk.1.ffn_up.weight"]), "lacks the tensor for model.layers.1.mlp.up_proj"),
    (dict(fields={"embedding_length": 96}), "the metadata implies"),
    (dict(fields={"block_count": 10**9}), "promises 1000000000 blocks"),
    (dict(fields={"block_count": 0}), "block_count is 0, a positive number is needed"),
])
def test_a_file_that_contradicts_itself_is_refused(tmp_path, change, message):
    path = write_gguf(tmp_path / "t.gguf", random_network(), **change)
    with pytest.raises(BadCheckpoint, match=message):
        import_file(path, tmp_path / "out")


def header(*, magic=b"GGUF", version=3, tensors=0, fields=0, body=b"") -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, fields) + body


def named(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


ENTRY = named(b"w") + struct.pack("<I", 1)


@pytest.mark.parametrize("data,message", [
    (b"GG", "too short"),
    (header(magic=b"GGML"), "does not start with GGUF"),
    (header(version=1), "version 1"),
    (header(fields=2**60), "wanted"),
    (header(tensors=2**60), "wanted"),
    (header(fields=1, body=struct.pack("<Q", 2**62)), "wanted"),
    (header(fields=1, body=named(b"\xff\xfe")), "not UTF-8"),
    (header(fields=1, body=named(b"k") + struct.pack("<I", 99)), "unknown metadata type 99"),
    (header(fields=1, body=named(b"k") + struct.pack("<IIQ", 9, 4, 2**50)), "wanted"),
    (header(fields=1, body=named(b"k") + struct.pack("<IIQ", 9, 8, 2**50)), "wanted"),
    (header(fields=2, body=2 * (named(b"k") + struct.pack("<IB", 0, 1))),
     "duplicate metadata key k"),
    (header(tensors=1, body=named(b"w") + struct.pack("<I", 2**31)), "2147483648 dimensions"),
    (header(tensors=1, body=named(b"\n\x1b[2J") + struct.pack("<I", 2**31)),
     r"tensor \\n\\x1b\[2J has"),
    (header(tensors=1, body=ENTRY + struct.pack("<QIQ", 2**40, 0, 0)), "spans bytes"),
    (header(tensors=1, body=ENTRY + struct.pack("<QIQ", 4, 0, 2**63)), "spans bytes"),
    (header(tensors=1, body=ENTRY + struct.pack("<QIQ", 33, 3, 0)), "do not divide"),
    (header(tensors=1, body=ENTRY + struct.pack("<QIQ", 0, 0, 0)), "spans bytes"),
    (header(tensors=2, body=2 * (ENTRY + struct.pack("<QIQ", 1, 0, 0)) + bytes(64)),
     "duplicate tensor w"),
])
def test_lying_headers_end_in_one_line(tmp_path, data, message):
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(BadCheckpoint, match=message) as caught:
        open_model(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_every_truncation_is_refused(tmp_path):
    whole = write_gguf(tmp_path / "t.gguf", random_network()).read_bytes()
    path = tmp_path / "cut.gguf"
    for length in [*range(0, 4000, 97), len(whole) // 2, len(whole) - 33]:
        path.write_bytes(whole[:length])
        with pytest.raises(BadCheckpoint):
            open_model(path)


def test_a_split_model_is_one_model(tmp_path):
    network = random_network()
    whole = write_gguf(tmp_path / "whole.gguf", network)
    first = write_gguf(tmp_path / "part.gguf", network, parts=3)
    assert first.name == "part-00001-of-00003.gguf"
    last = tmp_path / "part-00003-of-00003.gguf"
    for path, folder in ((whole, "a"), (first, "b"), (last, "c")):
        import_file(path, tmp_path / folder)
    for name in ("model.safetensors", "tokenizer.json"):
        assert len({(tmp_path / folder / name).read_bytes() for folder in "abc"}) == 1
    assert import_cached_folder(first, tmp_path) == import_cached_folder(first, tmp_path)


def import_cached_folder(path: Path, tmp_path: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLXQUANT_CACHE", str(tmp_path / "cache"))
        return mlxquant.resolve(str(path))


def test_a_file_is_known_by_what_it_holds_not_by_its_name(tmp_path):
    """Ollama keeps its blobs by their digests; some publishers shout the ending."""
    for name in ("sha256-0f4ac1", "T.GGUF"):
        write_gguf(tmp_path / name, random_network())
        assert import_cached_folder(tmp_path / name, tmp_path).is_dir()


def test_links_in_a_hubs_cache_keep_the_names_of_parts(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    first = write_gguf(tmp_path / "part.gguf", random_network(), parts=3)
    for number, part in enumerate(sorted(tmp_path.glob("part-*"))):
        part.rename(blobs / str(number))
        (snapshot / part.name).symlink_to(blobs / str(number))
    assert import_cached_folder(snapshot / first.name, tmp_path).is_dir()


def test_an_incomplete_split_model_is_refused(tmp_path):
    first = write_gguf(tmp_path / "part.gguf", random_network(), parts=3)
    second = tmp_path / "part-00002-of-00003.gguf"
    data = second.read_bytes()
    second.unlink()
    with pytest.raises(BadCheckpoint, match="one of 3 parts, part-00002-of-00003.gguf is missing"):
        open_model(first)
    second.write_bytes((tmp_path / "part-00003-of-00003.gguf").read_bytes())
    with pytest.raises(BadCheckpoint, match="is in both part-00002"):
        open_model(first)
    second.write_bytes(data)
    alone = tmp_path / "other-00001-of-00001.gguf"
    alone.write_bytes(first.read_bytes())
    with pytest.raises(BadCheckpoint, match="says it is one of 3 parts, its name says 1"):
        open_model(alone)


def test_import_verb_reports_each_rounded_layer(tmp_path):
    path = write_gguf(tmp_path / "t.gguf", random_network(), kind=Type.Q8_0)
    value = json.loads(run("import", path, "-o", tmp_path / "out", "--json").stdout)
    assert value["rounded"] == {} and value["error"] == 0 and value["tensors"] == 20
    again = run("import", path, "-o", tmp_path / "out")
    assert again.returncode == 1 and "already exists" in again.stderr and again.stdout == ""
