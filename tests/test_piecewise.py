"""A network in pieces: the same loss and gradients, in less memory; predictions that are kept."""

from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from architectures import network_of
from conftest import CONFIG, random_bytes, random_network, replicated
from mlx.utils import tree_map
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from mlxquant.codes.spec import ReplicaShape
from mlxquant.layers import head
from mlxquant.layers.blocks import find_blocks
from mlxquant.layers.by_block import judged
from mlxquant.layers.head import foreseen
from mlxquant.layers.trainable import Trainable, TrainedParts
from mlxquant.report.divergence import position_kl
from mlxquant.tuning import predictions
from mlxquant.tuning.piecewise import Pieces
from mlxquant.tuning.predictions import Predictions, divergence, likeliest

TOKENS = mx.array(np.random.default_rng(0).integers(0, 288, (2, 24)))


def replicas(shape, config=CONFIG):
    """A replicated network of random codes and scales."""
    def fill(array):
        if array.dtype == mx.uint32:
            bits = random_bytes((array.size, 4), array.size).view(np.uint32)
            return mx.array(bits).reshape(array.shape)
        return mx.random.normal(array.shape) * 0.3 if array.dtype != mx.uint8 else array

    mx.random.seed(0)
    network = replicated(config, shape)
    network.update(tree_map(fill, network.parameters()))
    return network


def affine(name):
    """A tiny network of an architecture, its linear layers in affine codes."""
    network = network_of(name)
    nn.quantize(network, 32, 4, class_predicate=lambda _, module: (
        isinstance(module, (nn.Linear, SwitchLinear)) and module.weight.shape[-1] % 32 == 0))
    return network


def gradients(network, parts, compiled):
    """(loss, gradients) as the network is written, and in pieces."""
    student = Trainable(network, mx.float32, parts)
    pieces = Pieces(network, frozenset(student.base))
    moved = {path: 0.05 * mx.random.normal(u.shape, key=mx.random.key(1)) / (
        1e3 if path.endswith("moves") else 1) for path, u in student.start().items()}
    logits = network(TOKENS)
    wanted = likeliest(3 * mx.random.normal((TOKENS.size, logits.shape[-1]), key=mx.random.key(2)))

    def whole(moved):
        given = student.install(student.values(moved))(TOKENS)
        return divergence(given.reshape(TOKENS.size, -1), wanted)

    def in_pieces(moved):
        student.install(student.values(moved))
        return pieces.loss(TOKENS, lambda logits, place: divergence(logits, wanted.part(place)))

    made = [mx.value_and_grad(function) for function in (whole, in_pieces)]
    if compiled:
        made[1] = mx.compile(made[1], inputs=[student.base, student.size])
    # As training does: a vector of zeros has no length to differentiate.
    return [(loss, tree_map(mx.nan_to_num, slopes)) for loss, slopes in (f(moved) for f in made)]


@pytest.mark.parametrize("make, parts, compiled", [
    (lambda: replicas(ReplicaShape(2, 2, rotation_block=32)), TrainedParts(), True),
    (lambda: replicas(ReplicaShape(2, 2, replica_group=16)), TrainedParts(codes=0.1), False),
    *((lambda name=name: affine(name), TrainedParts(), False) for name in (
        "qwen3_moe", "gemma3n", "cohere2", "mamba2", "deepseek_v3", "rwkv7", "iquestloopcoder"))])
def test_gradients_in_pieces_are_those_of_the_whole(monkeypatch, make, parts, compiled):
    monkeypatch.setattr(head, "AT_ONCE", 384 * 11)  # chunks with an end that is shorter
    network = make()
    experts = any(isinstance(module, QuantizedSwitchLinear) for module in network.modules())
    (loss, whole), (same, pieces) = gradients(network, parts, compiled)
    assert any("switch_mlp" in path for path in whole) == experts
    assert same.item() == pytest.approx(loss.item(), rel=1e-5)
    largest = max(mx.abs(g).max().item() for g in whole.values())
    assert largest > 0
    for path, gradient in whole.items():
        limit = 1e-3 * mx.abs(gradient).max().item() + 1e-6 * largest
        assert mx.abs(gradient - pieces[path]).max().item() <= limit, path


def test_memory_is_that_of_one_block_and_one_chunk(monkeypatch):
    config = CONFIG | {"num_hidden_layers": 12, "vocab_size": 4096, "intermediate_size": 512}
    tokens = mx.array(np.random.default_rng(0).integers(0, 288, (8, 64)))
    network = replicas(ReplicaShape(2, 2), config)
    student = Trainable(network, mx.float32)
    moved, pieces = student.start(), Pieces(network, frozenset(student.base))
    mx.eval(moved, network.parameters(), student.base, student.size)

    def peak(function):
        held = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(mx.grad(function)(moved))
        return mx.get_peak_memory() - held

    def whole(moved):
        return mx.logsumexp(student.install(student.values(moved))(tokens), -1).sum()

    def in_pieces(moved):
        student.install(student.values(moved))
        return pieces.loss(tokens, lambda logits, _: mx.logsumexp(logits, -1).sum())

    monkeypatch.setattr(head, "AT_ONCE", 4096 * 32)
    assert peak(in_pieces) < 0.3 * peak(whole)


class Skipping(nn.Module):
    """Logits of what the first block gives, too: of each token, or ``meant`` over them."""

    def __init__(self, meant):
        super().__init__()
        self.layers = [nn.Sequential(nn.Linear(8, 8)) for _ in range(3)]
        self.embedding, self.meant = nn.Embedding(16, 8), meant

    def __call__(self, tokens):
        first = h = self.layers[0](self.embedding(tokens))
        for layer in self.layers[1:]:
            h = layer(h)
        first = first.mean(1, keepdims=True) if self.meant else first
        return self.embedding.as_linear(h + first)


def test_a_head_that_needs_more_than_the_last_block_is_none_or_gives_no_numbers():
    network = Skipping(meant=False)
    assert not foreseen(network, find_blocks(network))
    network = Skipping(meant=True)
    (path, behind), = foreseen(network, find_blocks(network)).items()
    assert path == "layers.2" and mx.isnan(behind.logits(mx.ones((2, 8)))).all()


def test_what_is_kept_is_the_divergence_but_for_the_rest():
    teacher, student = mx.random.normal((2, 40, 3000), key=mx.random.key(0)) * 3
    wanted = likeliest(teacher)
    assert wanted.ids.dtype == mx.uint16 and wanted.ids.shape == (40, predictions.TOP)
    best = mx.sort(mx.argsort(teacher, -1)[:, -predictions.TOP:], -1)
    assert mx.array_equal(mx.sort(wanted.ids, -1), best.astype(mx.uint16))
    total = mx.exp(wanted.logs.astype(mx.float32)).sum(-1) + wanted.rest
    assert mx.abs(total - 1).max() < 1e-3
    # Its derivative is that of the definition, one bucket for all that is not among the likeliest.
    p, q = (mx.softmax(logits, -1) for logits in (teacher, student))
    inside = mx.zeros_like(p)
    inside[mx.arange(40)[:, None], best] = 1
    rest_p, rest_q = ((x * (1 - inside)).sum(-1) for x in (p, q))
    defined = (inside * p * mx.log(p / q)).sum() + (rest_p * mx.log(rest_p / rest_q)).sum()
    assert divergence(student, wanted).item() == pytest.approx(defined.item(), rel=1e-3)
    assert defined < position_kl(teacher, student).sum()


def test_small_vocabularies_are_kept_whole():
    teacher, student = mx.random.normal((2, 40, 100), key=mx.random.key(0)) * 3
    kept = divergence(student, likeliest(teacher)).item()
    assert kept == pytest.approx(position_kl(teacher, student).sum().item(), rel=1e-3)


def test_killed_predictions_go_on_and_take_what_was_said(tmp_path):
    network, batches = random_network(), [np.array(TOKENS)[:, i:i + 6] for i in range(0, 24, 6)]
    wanted, told = Predictions(tmp_path, batches, 384), []

    def stop(done, total):
        told.append((done, total))
        if len(told) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        wanted.write(partial(judged, network), 1, stop)
    assert wanted.missing == [3]
    wanted.write(partial(judged, network), 1, stop)
    assert told == [(2 * done, 8) for done in (1, 2, 3, 4)] and not wanted.missing
    tokens, kept = wanted[3]
    assert mx.array_equal(tokens, TOKENS[:, 18:])
    expected = likeliest(network(tokens).reshape(tokens.size, -1))
    assert all(mx.array_equal(a, b) for a, b in zip(kept, expected))
    headers = sum(8 + int.from_bytes(wanted.file(i).read_bytes()[:8], "little") for i in range(4))
    assert sum(wanted.file(i).stat().st_size for i in range(4)) - headers == wanted.bytes
