"""Repeated blocks: nothing changes at gate 0, caches of every pass, composition."""

from itertools import pairwise

import mlx.core as mx
import pytest
from conftest import CONFIG, random_network
from mlx_lm.models.cache import (
    KVCache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)

from mlxquant.base.errors import BadValue, Unsupported
from mlxquant.layers import repeated, traffic
from mlxquant.layers.hooks import after_each_block
from mlxquant.layers.repeated import PassesCache, Repeat, parse_repeat

DEEP = CONFIG | {"num_hidden_layers": 4, "tie_word_embeddings": False}
SLIDING = DEEP | {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8}
TOKENS = mx.array([[5, 80, 200, 7, 99, 31, 150, 6, 11, 250, 42, 17, 90]])
RANGES = {"first block": ["0:1x2"], "blocks": ["0:1x3", "1:2x3", "3:4x2"], "span": ["1:4x2"],
          "span from the first": ["0:2x3"], "spans": ["2:4x4", "0:2x2"], "whole": ["0:4x2"]}


def network_with(ranges, gates=0.0, config=DEEP):
    """Random blocks that repeat; a gate of pass p is ``gates`` · p. Weights are those of no
    repeats."""
    network = random_network(config)
    repeats = [parse_repeat(text) for text in ranges]
    repeated.install(network, repeats)
    for repeat in repeats:
        network.layers[repeat.last].repeat_gates = gates * mx.arange(1.0, repeat.passes)
    return network


def step_by_step(network, prefill=5):
    """Logits through the cache: some tokens at once, two more, then one by one; and the cache."""
    cache = make_prompt_cache(network)
    ends = [0, prefill, prefill + 2, *range(prefill + 3, TOKENS.shape[1] + 1)]
    logits = [network(TOKENS[:, a:b], cache=cache) for a, b in pairwise(ends)]
    return mx.concatenate(logits, axis=1), cache


def composed(network, ranges, gates):
    """The same in plain Python, on a network without repeats."""
    ends = {(repeat := parse_repeat(text)).last: repeat for text in ranges}
    positions = mx.arange(TOKENS.shape[1])
    ahead = positions[None] > positions[:, None]
    masks = {False: ~ahead, True: ~ahead & (positions[:, None] - positions[None] < 8)}

    def run(index, h):
        return network.layers[index](h, masks[network.layers[index].use_sliding])

    h = network.model.embed_tokens(TOKENS)
    for index in range(len(network.layers)):
        h = run(index, h)
        if repeat := ends.get(index):
            for number in range(1, repeat.passes):
                again = h
                for inner in range(repeat.first, repeat.last + 1):
                    again = run(inner, again)
                h = (1 - gates * number) * h + gates * number * again
    return network.lm_head(network.model.norm(h))


@pytest.mark.parametrize("ranges", RANGES.values(), ids=RANGES)
def test_with_gates_of_zero_nothing_changes_to_the_bit(ranges):
    plain, ours = random_network(DEEP), network_with(ranges)
    assert mx.array_equal(ours(TOKENS), plain(TOKENS))
    assert mx.array_equal(step_by_step(ours)[0], step_by_step(plain)[0])


@pytest.mark.parametrize("config", [DEEP, SLIDING], ids=["full", "sliding"])
@pytest.mark.parametrize("ranges", RANGES.values(), ids=RANGES)
def test_passes_are_composed_and_cached_as_written(ranges, config):
    plain, ours = random_network(config), network_with(ranges, 0.4, config)
    logits = ours(TOKENS)
    assert mx.abs(logits - plain(TOKENS)).max() > 0.05
    assert mx.abs(logits - composed(plain, ranges, 0.4)).max() < 1e-4
    assert mx.abs(step_by_step(ours)[0] - logits).max() < 1e-4


def test_every_pass_of_a_block_has_its_own_keys_and_values():
    network, length = network_with(["0:1x3", "1:3x2"], 0.3), TOKENS.shape[1]
    _, cache = step_by_step(network)
    assert [len(c.caches) if isinstance(c, PassesCache) else 1 for c in cache] == [3, 2, 2, 1]
    assert [c.offset for c in cache] == [length] * 4
    for layer in cache[:3]:
        assert [c.offset for c in layer.caches] == [length] * len(layer.caches)
        assert not mx.allclose(layer.caches[0].keys, layer.caches[1].keys, atol=1e-2)
    one = 2 * 2 * 32 * 4  # keys and values of two heads of 32, float32
    assert traffic.kv_bytes(cache) == 8 * one * length
    assert trim_prompt_cache(cache, 4) == 4
    assert {c.offset for layer in cache[:3] for c in layer.caches} == {length - 4}
    again = network(TOKENS[:, -4:], cache=cache)
    assert mx.abs(again - network(TOKENS)[:, -4:]).max() < 1e-4


def test_a_cache_survives_saving_and_a_foreign_one_is_refused(tmp_path):
    network = network_with(["0:2x2"], 0.3)
    cache = make_prompt_cache(network)
    network(TOKENS[:, :-3], cache=cache)
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    restored = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    assert mx.abs(network(TOKENS[:, -3:], cache=restored) - network(TOKENS)[:, -3:]).max() < 1e-4
    with pytest.raises(BadValue,
                       match="given a KVCache for one pass; allowed are caches made for this"):
        network(TOKENS, cache=[KVCache() for _ in network.layers])


def test_blocks_are_observed_once_each_and_calibrate_by_themselves():
    plain, ours = random_network(DEEP), network_with(["0:1x2", "1:4x3"])
    noted = {network: [] for network in ("plain", "ours")}
    for name, network in (("plain", plain), ("ours", ours)):
        with after_each_block(network, lambda state, name=name: noted[name].append(state) or state):
            network(TOKENS)
    assert len(noted["ours"]) == 4 and all(map(mx.array_equal, noted["ours"], noted["plain"]))


def test_architectures_that_do_not_fit_are_refused(monkeypatch):
    network = random_network(DEEP)
    monkeypatch.setattr(type(network), "make_cache", lambda self: [KVCache()])
    with pytest.raises(Unsupported, match="shares caches between blocks"):
        repeated.install(network, [Repeat(0, 0, 2)])
    monkeypatch.undo()
    monkeypatch.setattr(type(network.layers[0]), "__call__", lambda self, x, *_, **__: (x, None))
    repeated.install(network, [Repeat(0, 0, 2)])
    with pytest.raises(Unsupported, match="TransformerBlock returns more than a hidden state"):
        network(TOKENS)
