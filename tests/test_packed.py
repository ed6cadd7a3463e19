"""Packed groups and networks: what they compute, what they cost, against the stored form."""

from itertools import pairwise

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from architectures import CONFIGURATIONS
from conftest import CONFIG, replicated
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlx_lm.models.cache import make_prompt_cache
from test_kernels import installed
from test_replicated import fill, siblings

from mlxquant.codes.spec import ReplicaShape
from mlxquant.kernels import backend, first_step, prepare_input, replicated_matvec
from mlxquant.layers import repeated, traffic
from mlxquant.layers.blocks import held_bytes
from mlxquant.layers.pack import pack
from mlxquant.layers.packed import NormInReader, PackedGroup, PackedLinear, PackedMLP
from mlxquant.layers.repeated import Repeat
from mlxquant.layers.replicated import Replicated, ReplicatedLinear
from mlxquant.layers.traffic import leaf_modules
from mlxquant.model import distributed

SHAPE = ReplicaShape(2, 4, 0)
TOKENS = mx.array([[5, 80, 200, 7, 99, 31, 150, 6, 11, 250, 42, 17, 90]])
OTHERS = {
    "gemma": {"model_type": "gemma"},  # a norm and an activation of its own
    "bias": {"mlp_bias": True, "attention_bias": True},
    "granite": {
        "model_type": "granite",
        "logits_scaling": 2.0,
        "attention_multiplier": 0.2,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_bias": False,
        "mlp_bias": False,
    },
}
# What pack fuses in four blocks: norms and gated MLPs, of a mixture those of its shared experts,
# and for one token whole blocks, or their attention.
FUSED = {"cohere": (0, 0, 0), "deepseek_v3": (9, 4, 0), "falcon_h1": (8, 4, 0),
         "gemma3": (0, 0, 0), "glm4_moe": (5, 4, 4), "gpt_oss": (4, 0, 0), "granite": (8, 4, 4),
         "granitemoehybrid": (4, 0, 2), "internlm2": (8, 4, 0), "lfm2": (8, 4, 2),
         "minicpm3": (16, 4, 0), "mistral3": (8, 4, 4), "olmo2": (0, 4, 0), "qwen3_5": (8, 4, 0),
         "qwen3_moe": (4, 0, 4), "qwen3_next": (4, 0, 0)}
NOT_COMPARED = {"deepseek_v41": "takes no prompt and then tokens without a cache of its own",
                "prism_hadamard_qwen35": "is packed already", "talkie": "its logits are 0 here"}
FORMS = {name: {"model_type": name} for name in ("llama", "qwen2", "qwen3", "mistral")} | OTHERS
emulated = pytest.mark.parametrize("emulated", [False, True], ids=["operations", "kernels"])


@pytest.fixture
def emulation(emulate, monkeypatch):
    with installed(emulate(alignment=16, quick=True), monkeypatch) as made:
        yield made


@pytest.fixture
def on_kernels(request, monkeypatch, emulated):
    """Whether kernels run, emulated, and are believed: else ``mx`` operations take their place."""
    if emulated:
        request.getfixturevalue("emulation")
        monkeypatch.setattr(
            "mlxquant.layers.packed.trusted", lambda kernel: kernel != "replicated_tensor_cores"
        )
        monkeypatch.setattr("mlxquant.layers.fused_block.trusted", lambda kernel: True)
    return emulated


def network_of(form="llama", shape=SHAPE, repeats=(), dtype=mx.float32, rules=(), **changes):
    """A random network of replicated layers, the same at each call, norms and gates too."""
    mx.random.seed(0)
    network = replicated(CONFIG | FORMS[form] | changes, shape, rules)
    for seed, (_, layer) in enumerate(linears(network)):
        fill(layer, seed)
    repeated.install(network, repeats)
    for _, module in network.named_modules():
        module.update(
            {
                name: mx.random.normal(array.shape)
                for name, array in module.items()
                if name in ("bias", "repeat_gates")
                or (isinstance(module, nn.RMSNorm) and name == "weight")
            }
        )
    network.set_dtype(dtype)
    return network


def any_network(name):
    """The same of a row of ``architectures.json``, routers and other layers replicated too."""
    mx.random.seed(0)
    network = replicated(CONFIGURATIONS[name], SHAPE)
    layers = [module for module in network.modules() if isinstance(module, Replicated)]
    for seed, layer in enumerate(layers):
        fill(layer, seed)
    network.set_dtype(mx.float32)
    for module in network.modules():
        if isinstance(module, nn.RMSNorm) and "weight" in module:
            module.weight = 1 + 0.2 * mx.random.normal(module.weight.shape)
    return network


def one_by_one(network, tokens=TOKENS, prefill=10):
    """Logits of a prompt of many tokens, then of the others, one at a time."""
    cache = make_prompt_cache(network)
    ends = [0, *range(prefill, tokens.shape[1] + 1)]
    return mx.concatenate(
        [network(tokens[:, a:b], cache=cache) for a, b in pairwise(ends)], axis=1
    )


def felt(network, change, logits):
    """How far ``logits`` move where the embedding moves by a share of ``change``: some random
    networks enlarge a rounding a thousandfold."""
    kinds = nn.Embedding, nn.QuantizedEmbedding
    embedding = next(module for module in network.modules() if isinstance(module, kinds))
    name = "scales" if "scales" in embedding else "weight"
    noise = mx.random.normal(embedding[name].shape, key=mx.random.key(0))
    embedding[name] = embedding[name] * (1 + change * noise)
    return backend.relative_error(one_by_one(network), logits)


def packed_and_stored(**shape):
    """Siblings as they are stored, and the same ones packed."""
    return siblings(**shape)[0], pack(siblings(**shape)[0])


def linears(parent):
    return [(path, m) for path, m in parent.named_modules() if isinstance(m, ReplicatedLinear)]


@emulated
@pytest.mark.parametrize("tokens", [1, 5, 20])
@pytest.mark.parametrize(
    "shape",
    [
        dict(bits=2, replicas=4, rotation_block=64),
        dict(bits="ternary", replicas=3, replica_group=16),
    ],
    ids=["plain", "grouped"],
)
def test_a_packed_network_computes_what_the_stored_one_does(on_kernels, tokens, shape):
    stored, packed = packed_and_stored(**shape)
    x = mx.array(np.random.default_rng(1).normal(size=(1, tokens, 64)).astype(np.float32))
    assert any(isinstance(m, PackedGroup) for m in packed.modules()) and not linears(packed)
    found = {path: m for path, m in packed.named_modules() if isinstance(m, PackedLinear)}
    for path, layer in linears(stored):
        assert backend.relative_error(found[path](x), layer(x)) < 1e-5


def test_packing_keeps_one_copy_of_the_codes():
    stored, packed = packed_and_stored(bits=4, replicas=2)
    held = {name: array.nbytes for name, array in tree_flatten(packed.parameters())}
    assert sum(size for name, size in held.items() if name.endswith("codes")) == sum(
        layer.codes.nbytes for _, layer in linears(stored))


def test_one_token_costs_each_group_two_dispatches(monkeypatch):
    """Fixed time per token is most of the loss at low bits: q, k and v must not be three calls."""
    calls = []

    def count(name, result):
        monkeypatch.setattr(
            result[0], name, lambda *a, **k: (calls.append(name), result[1](*a, **k))[1]
        )

    monkeypatch.setattr(
        "mlxquant.layers.packed.trusted", lambda kernel: kernel != "replicated_tensor_cores"
    )
    count("prepare", (prepare_input, lambda x, scales, layout, first: x))
    count("multiply", (replicated_matvec,
                       lambda x, matrix, *_, **__: mx.zeros((len(x), matrix.rows))))
    _, packed = packed_and_stored(bits=2, replicas=4)
    x = mx.zeros((1, 1, 64))
    readers = [m for m in packed.modules() if isinstance(m, PackedLinear)]
    assert len(readers) > 1
    mx.eval([reader(x) for reader in readers])
    assert calls == ["prepare", "multiply"]


class Summed(nn.Module):
    """In the place of an MLP: what siblings compute, as one array."""

    def __init__(self, siblings: nn.Module):
        super().__init__()
        self.inner = siblings

    def __call__(self, x: mx.array) -> mx.array:
        return mx.concatenate([self.inner[name](x) for name in "qkv"], axis=-1)


def test_a_token_like_the_last_calls_no_kernel_from_python(monkeypatch):
    """A group and the MLP around it are traced for each number of tokens once, and replayed."""
    traced, by_kernel = [], PackedGroup._by_kernel
    monkeypatch.setattr(
        PackedGroup, "_by_kernel", lambda self, x, *how: traced.append(len(x)) or by_kernel(
            self, x, *how)
    )
    network, stored = nn.Module(), Summed(siblings(bits=2, replicas=4)[0])
    network.mlp = Summed(siblings(bits=2, replicas=4)[0])
    pack(network)
    random = np.random.default_rng(2)
    for tokens in (1, 1, 5, 5, 1, 20):
        x = mx.array(random.normal(size=(1, tokens, 64)).astype(np.float32))
        assert backend.relative_error(network.mlp(x), stored(x)) < 1e-5
    assert traced == [1, 5]
    held = sum(array.nbytes for _, array in tree_flatten(network.parameters()))
    assert sum(held_bytes(module) for _, module in leaf_modules(network)) == held


@emulated
@pytest.mark.parametrize("form", FORMS)
def test_a_whole_packed_model_is_the_stored_one(on_kernels, form):
    stored, packed = network_of(form), pack(network_of(form))
    kinds = [type(module) for module in packed.modules()]
    assert kinds.count(NormInReader) == (0 if form == "gemma" else 4)
    assert kinds.count(PackedMLP) == (0 if form in ("gemma", "bias") else 2)
    assert backend.relative_error(one_by_one(packed), one_by_one(stored)) < 1e-5


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=() if name in FUSED else pytest.mark.slow)
    for name in CONFIGURATIONS if name not in NOT_COMPARED])
def test_any_architecture_says_the_same_fused_and_as_stored(name):
    """A prompt and four tokens: the logits, and with them what is most probable."""
    packed, own = pack(any_network(name)), any_network(name)
    logits, stored = one_by_one(packed), one_by_one(own)
    assert backend.relative_error(logits, stored) < max(2e-5, felt(own, 1e-6, stored))
    assert mx.array_equal(logits.argmax(-1), stored.argmax(-1))
    kinds = [type(module) for module in packed.modules()]
    plain = sum(hasattr(module, "one_token") for module in packed.modules())
    fused = kinds.count(NormInReader), kinds.count(PackedMLP), plain
    assert fused == FUSED.get(name, fused)


@emulated
@pytest.mark.parametrize("shape", [ReplicaShape("ternary", 3, 16), SHAPE], ids=["grouped", "plain"])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["float16", "bfloat16"])
def test_a_packed_model_in_16_bits_is_as_near_as_the_stored_one(on_kernels, shape, dtype):
    packed, exact = pack(network_of(shape=shape, dtype=dtype)), network_of(shape=shape, dtype=dtype)
    logits, stored = one_by_one(packed), one_by_one(exact)
    exact.set_dtype(mx.float32)
    expected = one_by_one(exact)
    assert logits.dtype == stored.dtype == dtype
    assert backend.relative_error(logits, expected) < 2 * backend.relative_error(stored, expected)


@pytest.mark.parametrize("bits", [1, "ternary", 2, 3])
def test_what_a_gpu_will_hold_is_known_before(bits):
    network = replicated(CONFIG, ReplicaShape(bits, 2, 16))
    held, read = (count(network, traffic.gpu_bytes)
                  for count in (traffic.network_bytes, traffic.weight_bytes))
    pack(network)
    assert (held_bytes(network), traffic.weight_bytes(network)) == (held, read)


@emulated
@pytest.mark.parametrize("repeats", [(Repeat(1, 1, 2),), (Repeat(0, 1, 3),)], ids=["block", "span"])
def test_blocks_that_run_again_share_norms_and_groups(on_kernels, repeats):
    stored, packed = network_of(repeats=repeats), pack(network_of(repeats=repeats))
    assert backend.relative_error(one_by_one(packed), one_by_one(stored)) < 1e-5


def test_a_part_of_a_model_over_machines_adds_up_before_the_residual():
    """Layers whose results are added over machines keep their own way: here, of one machine."""
    packed = pack(distributed.shard(network_of(), "tiny", mx.distributed.init()))
    kinds = {type(module) for module in packed.modules()}
    assert distributed.AddedReplicated in kinds and NormInReader in kinds and PackedMLP not in kinds
    assert backend.relative_error(one_by_one(packed), one_by_one(network_of())) < 1e-5


def test_a_fused_norm_counts_once_and_stays_by_its_path(monkeypatch):
    fused, apart = network_of(), network_of()
    weights = {
        path: module.weight
        for path, module in fused.named_modules()
        if isinstance(module, nn.RMSNorm)
    }
    pack(fused)
    monkeypatch.setattr("mlxquant.layers.pack.find_siblings", lambda network: [])
    pack(apart)
    assert not any(isinstance(module, (NormInReader, PackedMLP)) for module in apart.modules())
    held = dict(tree_flatten(fused.parameters()))
    assert all(held[f"{path}.weight"] is weight for path, weight in weights.items())
    for count in (held_bytes, traffic.body_bits_per_weight, traffic.parameters,
                  traffic.weight_bytes, traffic.operations_per_token):
        assert count(fused) == count(apart)


@pytest.mark.parametrize(
    "refused", ["prepare_input", "prepare_input_normed", "prepare_input_gated"]
)
def test_a_fused_form_that_disagrees_leaves_the_others_in_use(
        emulation, monkeypatch, refused):
    monkeypatch.setattr("mlxquant.layers.packed.trusted",
                        lambda kernel: kernel not in (refused, "replicated_tensor_cores"))
    assert backend.relative_error(one_by_one(pack(network_of())), one_by_one(network_of())) < 1e-5


def test_one_token_costs_each_block_eight_dispatches_beside_attention(monkeypatch):
    """Four groups, two each: no norm and no activation is a dispatch of its own."""
    calls, known, unknown = [], pack(network_of()), network_of()
    monkeypatch.setattr("mlxquant.layers.pack.find_siblings", lambda network: [])
    pack(unknown)  # as where nothing can be found

    def count(name, module, instead=None):
        call = instead or getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: (calls.append(name), call(*a, **k))[1])

    monkeypatch.setattr(
        "mlxquant.layers.packed.trusted", lambda kernel: kernel != "replicated_tensor_cores"
    )
    count("prepare", prepare_input, lambda x, scales, layout, first: x)
    count("multiply", replicated_matvec, lambda x, matrix, *a, **_: mx.zeros((len(x), matrix.rows)))
    count("rms_norm", mx.fast)
    for module in (llama, first_step):
        count("swiglu", module)
    mx.eval(known(TOKENS[:, :1]))
    blocks = CONFIG["num_hidden_layers"]
    assert calls == [*["prepare", "multiply"] * 4 * blocks, "rms_norm"]  # that before the head
    calls.clear()
    mx.eval(unknown(TOKENS[:, :1]))
    assert calls.count("prepare") == 4 * blocks and calls.count("rms_norm") == 2 * blocks + 1
