"""Blocks that take a token in ten dispatches: what they compute, whatever happens to the cache."""

import copy
import gc
import threading
import weakref

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import CONFIG
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm.models import llama
from mlx_lm.models.cache import (
    KVCache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)
from mlx_lm.tuner.utils import linear_to_lora_layers
from test_packed import FORMS as packed_forms
from test_packed import emulated, emulation, network_of, on_kernels  # noqa: F401 (fixtures)

import mlxquant
from mlxquant.codes.width import Width
from mlxquant.kernels import backend, rotary
from mlxquant.layers import outline
from mlxquant.layers.blocks import held_bytes
from mlxquant.layers.in_place import InPlaceCache
from mlxquant.layers.pack import pack

FORMS = ("llama", "qwen2", "qwen3",
         pytest.param("mistral", marks=pytest.mark.slow))  # by mlx-lm's table a llama
TURNS = {"traditional": {"rope_traditional": True},
         "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
         "llama3": {"rope_scaling": {
             "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
             "high_freq_factor": 4.0, "original_max_position_embeddings": 16}}}
# Rotary embeddings that are no rotation by a fixed angle a position.
OTHER_TURNS = {"dynamic": {"rope_scaling": {"type": "dynamic", "factor": 4.0},
                           "max_position_embeddings": 16},
               "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0,
                                         "original_max_position_embeddings": 16}}}


# Values and up are stored in another way than their siblings, as budgets and GGUF files have it.
APART = (("*.v_proj", {"bits": Width.THREE}), ("*.up_proj", {"replicas": 2}))


def widen(network):
    """Values and up in affine groups, as rules may store them."""
    mx.random.seed(1)
    for layer in network.layers:
        for parent, name in ((layer.self_attn, "v_proj"), (layer.mlp, "up_proj")):
            rows, inputs = parent[name].shape
            parent[name] = nn.Linear(inputs, rows, "bias" in parent[name]).to_quantized(32, 6)
    return network


def stock_network(form="llama", bits=None, dtype=mx.float32, apart=False, **changes):
    """A random network of MLX's own layers, of 16 bits or affine in groups of 32, the same at each
    call; ``apart`` has values and up in 8 bits."""
    network = outline.network_of(CONFIG | packed_forms[form] | changes)
    mx.random.seed(0)
    network.update(tree_map(lambda array: 0.1 * mx.random.normal(array.shape),
                            network.parameters()))
    if bits:
        wider = ("v_proj", "up_proj") if apart else ()
        nn.quantize(network, class_predicate=lambda path, layer: hasattr(layer, "to_quantized")
                    and {"group_size": 32, "bits": 8 if path.endswith(wider) else bits})
    network.set_dtype(dtype)
    mx.eval(network.parameters())
    return network


@pytest.fixture
def turned(request, monkeypatch, on_kernels):  # noqa: F811
    """How often the kernel, or what takes its place, ran."""
    calls = []
    for name in ("turn", "reference"):
        own = getattr(rotary, name)
        monkeypatch.setattr(rotary, name, lambda *a, own=own, name=name: (
            calls.append(name), own(*a))[1])
    yield calls
    assert set(calls) == ({"turn"} if on_kernels else {"reference"})


def both(form="llama", **changes):
    """A network as it is stored, and packed with fused blocks, each with a cache."""
    stored, packed = network_of(form, **changes), pack(network_of(form, **changes))
    return [(network, make_prompt_cache(network)) for network in (stored, packed)]


def alike(networks, tokens, allowed=5e-5):
    """That both say the same to ``tokens``; what is most probable then."""
    stored, packed = (network(mx.array([tokens]), cache=cache) for network, cache in networks)
    mx.eval(stored, packed)
    assert backend.relative_error(packed, stored) < allowed
    assert allowed > 1e-4 or mx.array_equal(packed.argmax(-1), stored.argmax(-1))
    return packed[0, -1].argmax().item()


@emulated
@pytest.mark.parametrize("form", FORMS)
def test_a_text_goes_on_as_with_stored_layers(turned, form):
    networks = both(form)
    token = alike(networks, [5, 80, 200])
    for _ in range(4):
        token = alike(networks, [token])
    assert len(turned) >= 2


@pytest.mark.parametrize("emulated", [False])
@pytest.mark.parametrize("form", FORMS)
def test_sixty_four_greedy_tokens_are_the_same(turned, form):
    networks = both(form)
    token = alike(networks, [5, 80, 200, 7])
    for _ in range(64):
        token = alike(networks, [token])


@pytest.mark.parametrize("form", [*FORMS, "bias"])
@pytest.mark.parametrize("bits, dtype", [(None, mx.float32), (4, mx.float32), (4, mx.float16)],
                         ids=str)
def test_layers_of_mlx_are_stacked_and_held_once(form, bits, dtype):
    own, fused = stock_network(form, bits, dtype), stock_network(form, bits, dtype)
    networks = [(network, make_prompt_cache(network)) for network in (own, pack(fused))]
    allowed = 5e-5 if dtype == mx.float32 else 1e-2
    for tokens in ([5, 80, 200], [7], [99], [31, 150], [6]):
        alike(networks, tokens, allowed)
    assert all(type(layer) is InPlaceCache for layer in networks[1][1])
    assert held_bytes(fused) == held_bytes(own)
    q, k, v = (memoryview(fused.layers[0].self_attn[f"{name}_proj"].weight) for name in "qkv")
    ends = [np.asarray(part).ctypes.data + part.nbytes for part in (q, k)]
    assert ends == [np.asarray(part).ctypes.data for part in (k, v)]  # of one array


@emulated
@pytest.mark.parametrize("form", FORMS)
def test_siblings_that_are_stored_in_several_ways_are_fused_too(turned, form):
    networks = both(form, rules=APART)
    token = alike(networks, [5, 80, 200])
    for _ in range(3):
        token = alike(networks, [token])
    assert all(type(layer) is InPlaceCache for layer in networks[1][1])


@emulated
@pytest.mark.parametrize("form", ["qwen2", "qwen3"])
def test_so_are_replicated_and_affine_siblings(turned, form):
    stored, packed = widen(network_of(form)), pack(widen(network_of(form)))
    networks = [(network, make_prompt_cache(network)) for network in (stored, packed)]
    token = alike(networks, [5, 80, 200])
    for _ in range(3):
        token = alike(networks, [token])
    assert all(type(layer) is InPlaceCache for layer in networks[1][1])


@pytest.mark.parametrize("form", [*FORMS, "bias"])
def test_so_are_layers_of_mlx_in_several_widths(form):
    own, fused = (stock_network(form, 4, apart=True) for _ in range(2))
    networks = [(network, make_prompt_cache(network)) for network in (own, pack(fused))]
    for tokens in ([5, 80, 200], [7], [99], [31, 150], [6]):
        alike(networks, tokens)
    assert all(type(layer) is InPlaceCache for layer in networks[1][1])
    assert held_bytes(fused) == held_bytes(own)


@pytest.mark.parametrize("make", [network_of, stock_network])
def test_weights_go_as_soon_as_nobody_uses_them(make):
    """Two models one after the other must not be held at once."""
    network = pack(make())
    cache = make_prompt_cache(network)
    for text in ([5, 80, 200], [7]):
        mx.eval(network(mx.array([text]), cache=cache))
    held = [weakref.ref(array) for _, array in tree_flatten(network.parameters())]
    gc.collect()
    gc.disable()
    try:
        del network
        assert not any(array() is not None for array in held)
    finally:
        gc.enable()


@pytest.mark.slow
def test_sixty_four_tokens_of_a_real_model_are_the_same(smollm2):
    model = mlxquant.load(str(smollm2))
    prompt = [{"role": "user", "content": "How do I tell whether a number is prime?"}]
    own = mlxquant.generate(model, prompt, max_tokens=64)
    pack(model.network)
    cache = mlxquant.PromptCache()
    fused = mlxquant.generate(model, prompt, max_tokens=64, cache=cache)
    assert all(type(layer) is InPlaceCache for layer in cache.layers)
    assert own.text == fused.text and own.report.generation_tokens == 64


@emulated
@pytest.mark.parametrize("turns", TURNS)
def test_any_angle_a_position_is_taken(turned, turns):
    networks = both(**TURNS[turns])
    for tokens in ([5, 80, 200], [7], [99]):
        alike(networks, tokens)


@pytest.mark.parametrize("turns", OTHER_TURNS)
def test_other_rotary_embeddings_stay_the_blocks_own(turns):
    networks = both(**OTHER_TURNS[turns])
    for tokens in ([5] * 30, [7], [99]):
        alike(networks, tokens)
    assert all(type(layer) is KVCache for layer in networks[1][1])


@emulated
def test_tokens_taken_back_guessed_ahead_and_batches_leave_the_cache_right(turned, monkeypatch):
    monkeypatch.setattr(KVCache, "step", 4)  # so that it grows, again and again
    networks = both()
    for tokens in ([5, 80, 200], [7], [99], [31, 150, 6], [11], [250], [42], [17, 90], [3]):
        alike(networks, tokens)
    for _, cache in networks:
        trim_prompt_cache(cache, 6)
    for tokens in ([8], [9], [1, 2], [4]):
        alike(networks, tokens)
    for layer in networks[1][1]:  # strided, MLX would hand a kernel a copy to write to
        assert type(layer) is InPlaceCache and memoryview(layer.keys).c_contiguous


@emulated
def test_a_copy_sees_nothing_of_what_is_written_after(turned):
    networks = both()
    for tokens in ([5, 80, 200], [7], [99], [31]):
        alike(networks, tokens)
    copied = [(network, copy.deepcopy(cache)) for network, cache in networks]
    for _, cache in networks:
        trim_prompt_cache(cache, 3)
    for each, token in zip([networks] * 4 + [copied] * 2 + [networks], (1, 2, 4, 8, 16, 32, 64)):
        alike(each, [token])


def test_a_saved_cache_is_mlx_lms_own(tmp_path):
    networks = both()
    for tokens in ([5, 80, 200], [7]):
        alike(networks, tokens)
    save_prompt_cache(str(tmp_path / "cache.safetensors"), networks[1][1])
    loaded = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    assert {type(layer) for layer in loaded} == {KVCache}
    alike([networks[0], (networks[1][0], loaded)], [9])


def test_a_graph_that_waits_writes_in_its_turn():
    """Tokens laid out one behind the other before any is computed, and a step of several."""
    (stored, cache), (packed, own) = both()
    texts = [[5, 80, 200], [7], [99], [31, 150], [6], [11]]
    expected = [stored(mx.array([text]), cache=cache)[:, -1] for text in texts]
    found = [packed(mx.array([text]), cache=own)[:, -1] for text in texts]
    assert backend.relative_error(mx.concatenate(found), mx.concatenate(expected)) < 1e-5


@pytest.mark.parametrize("of", ["added", "scaled", "masked"])
def test_a_block_that_does_anything_else_keeps_its_own_call(monkeypatch, of):
    def block(self, x, mask=None, cache=None):
        h = x + self.self_attn(self.input_layernorm(x), mask, cache)
        made = self.mlp(self.post_attention_layernorm(h))
        return {"added": h + made + x, "scaled": h + 0.5 * made,
                "masked": mx.where(h > 0, h, 0) + made}[of]

    monkeypatch.setattr(llama.TransformerBlock, "__call__", block)
    packed = pack(network_of())
    assert all(type(layer) is llama.TransformerBlock for layer in packed.layers)


def adapt(network):
    """Put adapters beside the linear layers that are not nothing."""
    linear_to_lora_layers(network, 4, {"rank": 2, "scale": 20.0, "dropout": 0.0})
    for path, array in tree_flatten(network.trainable_parameters()):
        if "lora" in path:
            network.update(tree_unflatten([(path, mx.full(array.shape, 0.1))]))


def double(network):
    network.update(tree_map(lambda array: 2 * array, network.parameters()))


@pytest.mark.parametrize("change", [adapt, double])
@pytest.mark.parametrize("before", [[], [[5, 80, 200], [7]]], ids=["at once", "in between"])
@pytest.mark.parametrize("prompt", [[7], [5, 80, 200]], ids=["token", "prompt"])
def test_layers_and_weights_that_are_replaced_count(change, before, prompt):
    changed = []
    for network in (stock_network(), pack(stock_network())):
        for tokens in before:
            mx.eval(network(mx.array([tokens]), cache=make_prompt_cache(network)))
        change(network)
        changed.append((network, make_prompt_cache(network)))
    for tokens in (prompt, [7], [99]):
        alike(changed, tokens)


def test_a_copy_of_a_network_has_its_own_weights():
    network, kept, changed = pack(stock_network()), stock_network(), stock_network()
    copied = copy.deepcopy(network)
    double(copied)
    double(changed)
    for pair in ((changed, copied), (kept, network)):
        pair = [(each, make_prompt_cache(each)) for each in pair]
        for tokens in ([5, 80], [7], [99]):
            alike(pair, tokens)


def attend(self, x, mask, cache):
    """Llama's attention, of a single token to the last three alone."""
    q, k, v = (layer(x).reshape(1, x.shape[1], -1, self.rope.dims).swapaxes(1, 2)
               for layer in (self.q_proj, self.k_proj, self.v_proj))
    q, k = (self.rope(heads, offset=cache.offset) for heads in (q, k))
    k, v = cache.update_and_fetch(k, v)
    if mask is None:
        k, v = k[:, :, -3:], v[:, :, -3:]
    y = mx.fast.scaled_dot_product_attention(q, k, v, scale=self.scale, mask=mask)
    return self.o_proj(y.swapaxes(1, 2).reshape(*x.shape[:2], -1))


def test_a_window_over_the_cache_is_kept(monkeypatch):
    monkeypatch.setattr(llama.Attention, "__call__", attend)
    networks = [(network, make_prompt_cache(network))
                for network in (stock_network(), pack(stock_network()))]
    for tokens in ([5, 80, 200, 31, 9], [7], [99]):
        alike(networks, tokens)


def test_another_thread_computes_as_ever_while_a_block_is_read(monkeypatch):
    own, found = llama.Attention.__call__, []

    def turn():
        found.append(nn.RoPE(8)(mx.ones((1, 1, 1, 8)), offset=1).tolist())

    def call(self, *args):
        other = threading.Thread(target=turn)
        other.start()
        other.join()
        return own(self, *args)

    turn()
    monkeypatch.setattr(llama.Attention, "__call__", call)
    assert any(hasattr(layer, "one_token") for layer in pack(stock_network()).layers)
    assert len(found) > 4 and all(each == found[0] for each in found)
