"""The importance of outputs against finite differences; predicted and measured divergence."""

import copy

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import CONFIG, random_network

from mlxquant.quantise.observe import Watch, linears
from mlxquant.quantise.sensitivity import expected_divergence, output_importance

NAMES = [f"model.layers.{i}.{name}" for i in range(2) for name in (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")]


def opened(network):
    """What gives the network again and again."""
    return lambda: copy.deepcopy(network)


@pytest.fixture
def network():
    """A Llama whose blocks and attention matter, unsure of the next token (about 3.6 nats).

    A tied head would predict a random model's own input for certain: Fisher information 0.
    """
    network = random_network(CONFIG | {"tie_word_embeddings": False})
    for linear in linears(network).values():
        linear.weight = 2 * linear.weight
    network.lm_head.weight = 0.3 * mx.random.normal((384, 64), key=mx.random.key(1))
    mx.eval(network.parameters())
    return network


def random_tokens(batches, shape, seed=0):
    random = np.random.default_rng(seed)
    return [mx.array(random.integers(0, 384, shape)) for _ in range(batches)]


def log_probabilities(network, tokens):
    logits = mx.concatenate([network(batch) for batch in tokens])
    return np.array(logits - mx.logsumexp(logits, -1, keepdims=True), np.float64)


def exact_importance(network, linear, sequence, step=0.01):
    """E[g²] (m,) over all labels of ``sequence`` (1, length), by central differences.

    The labels of positions u are independent, so the information about output i
    at position t is Σᵤ Var[∂ log p(label at u) / ∂ yₜᵢ]: one bias moved at a time.
    """
    length, rows = sequence.size, len(linear.weight)
    probability = np.exp(log_probabilities(network, [sequence])[0])
    squares = np.zeros((length, rows))
    for at in np.ndindex(length, rows):
        moved = []
        for sign in (1, -1):
            bias = np.zeros((length, rows), np.float32)  # one row a position
            bias[at] = sign * step
            linear.bias = mx.array(bias)
            moved.append(log_probabilities(network, [sequence])[0])
        slope = (moved[0] - moved[1]) / (2 * step)
        mean = (probability * slope).sum(-1, keepdims=True)
        squares[at] = (probability * (slope - mean) ** 2).sum()
    linear.pop("bias")
    return squares.mean(0)


@pytest.mark.parametrize("path", ["model.layers.0.self_attn.v_proj",
                                  "model.layers.1.mlp.down_proj"])
def test_importance_is_the_fisher_information_of_the_outputs(network, path):
    sequence = random_tokens(1, (1, 3))[0]
    exact = exact_importance(network, linears(network)[path], sequence)
    sampled = np.array(output_importance(opened(network),
                                         [mx.repeat(sequence, 1000, axis=0)] * 4)[path])
    assert sampled == pytest.approx(exact, rel=0.15)  # 4000 draws of heavy-tailed squares
    assert sampled.sum() == pytest.approx(exact.sum(), rel=0.03)


def test_importance_is_the_square_of_an_explicit_gradient(network, monkeypatch):
    labels = mx.array([17])
    monkeypatch.setattr(mx.random, "categorical", lambda logits, key: labels)
    token, gate = mx.array([[5]]), network.layers[1].mlp.gate_proj

    def log_likelihood(bias):
        gate.bias = bias
        logits = network(token)[0, 0]
        return logits[17] - mx.logsumexp(logits)

    gradient = mx.grad(log_likelihood)(mx.zeros(128))
    gate.pop("bias")
    importance = output_importance(opened(network),
                                   [token])["model.layers.1.mlp.gate_proj"]
    assert importance.dtype == mx.float32 and mx.abs(gradient).max() > 1e-3
    assert np.allclose(importance, mx.square(gradient), rtol=1e-4, atol=1e-9)


def test_the_prediction_agrees_with_the_measured_divergence(network):
    """Single layers within a factor of 2, as positions do not err independently; all within
    10 %."""
    tokens = random_tokens(4, (8, 32))
    importance = output_importance(opened(network), tokens)
    watch = Watch(network)
    for batch in tokens:
        watch.take(watch.run(lambda batch=batch: network(batch))[1])
    hessians = {path: statistics.hessian for paths, statistics in watch.seen.siblings()
                for path in paths}
    reference = log_probabilities(network, tokens)
    ratios = {}  # measured: 0.70 to 1.14, 0.98 in geometric mean
    for path, key in zip(NAMES, mx.random.split(mx.random.key(5), len(NAMES))):
        linear = linears(network)[path]
        weight, error = linear.weight, mx.random.normal(linear.weight.shape, key=key)
        error *= (1e-3 / expected_divergence(error, hessians[path], importance[path])) ** 0.5
        linear.weight = weight + error
        gap = reference - log_probabilities(network, tokens)
        linear.weight = weight
        measured = (np.exp(reference) * gap).sum(-1).mean()
        ratios[path] = expected_divergence(error, hessians[path], importance[path]) / measured
    assert all(1 / 2 < ratio < 2 for ratio in ratios.values()), ratios
    assert np.exp(np.log(list(ratios.values())).mean()) == pytest.approx(1, abs=0.1)


def test_the_divergence_is_the_sum_over_rows():
    random = np.random.default_rng(0)
    error, factor = random.normal(size=(5, 8)), random.normal(size=(8, 8))
    importance = random.random(5)
    hessian = factor @ factor.T
    expected = 0.5 * sum(f * e @ hessian @ e for f, e in zip(importance, error))
    arrays = (mx.array(x.astype(np.float32)) for x in (error, hessian, importance))
    assert expected_divergence(*arrays) == pytest.approx(expected, rel=1e-5)


def test_every_layer_of_the_blocks_is_covered_and_the_seed_decides(network):
    tokens = random_tokens(2, (2, 8))
    first, again, other = (output_importance(opened(network), tokens, seed)
                           for seed in (3, 3, 4))
    assert sorted(first) == sorted(NAMES)  # no lm_head
    modules = dict(network.named_modules())
    for path in NAMES:
        assert first[path].shape == (len(modules[path].weight),)
        assert mx.array_equal(first[path], again[path])
        assert not mx.array_equal(first[path], other[path])


def test_layers_are_restored_also_when_the_model_raises(network):
    before = linears(network)
    tokens = random_tokens(1, (1, 4))

    def same():
        after = linears(network)
        return after.keys() == before.keys() and all(after[p] is before[p] for p in before)

    output_importance(opened(network), tokens)
    assert same()

    class Broken(nn.Module):
        def __call__(self, x):
            raise RuntimeError("broken on purpose")

    network.model.norm = Broken()
    with pytest.raises(RuntimeError, match="broken on purpose"):
        output_importance(opened(network), tokens)
    assert same()
