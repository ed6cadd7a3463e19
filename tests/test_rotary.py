"""The kernel between q, k, v and attention: its Metal source executed on the CPU, against its
definition; and that it writes where it should and nowhere else."""

import mlx.core as mx
import numpy as np
import pytest
from metal import OutOfBounds, Unsettled

from mlxquant.kernels import check, rotary
from mlxquant.kernels.cases import Heads, heads

F32, F16, BF16 = mx.float32, mx.float16, mx.bfloat16
ALLOWED = {F32: 1e-5, F16: 2e-3, BF16: 8e-3}
CASES = [*heads(), Heads(2, 1, 8, 8, F32), Heads(1, 1, 64, 24, F16, normed=True),
         Heads(5, 2, 66, 66, BF16, traditional=True), Heads(2, 2, 256, 128, F32, normed=True)]


@pytest.fixture
def emulation(emulate, monkeypatch):
    made = emulate(alignment=16)
    made.install(monkeypatch, rotary)
    return made


def defined(x, position, how, norm=None):
    """Heads (heads, size) in float64, normed and turned."""
    x, steps = np.array(x.astype(F32), np.float64), np.array(how.steps, np.float64)
    if norm is not None:
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + norm.eps)
        x = x * np.array(norm.weight.astype(F32))
    half, made = len(steps), x.copy()
    first = np.arange(half) * (2 if how.traditional else 1)
    second = first + (1 if how.traditional else half)
    turned = (x[:, first] + 1j * x[:, second]) * np.exp(1j * position * steps)
    made[:, first], made[:, second] = turned.real, turned.imag
    return made


@pytest.mark.parametrize("case", CASES, ids=str)
def test_heads_are_normed_turned_and_stored(emulation, case):
    assert check._rotary(case) <= ALLOWED[case.dtype]
    qkv, *cache, place, how = case.draw()
    before = [np.array(array.astype(F32)) for array in cache]
    counts = (case.queries, case.stored, case.stored)
    parts = [whole[0, start:start + heads * case.size].reshape(heads, case.size)
             for whole, start, heads in zip(qkv, how.starts, counts)]
    norms = how.norms or (None, None)
    expected = [*(defined(x, 5, how, norm) for x, norm in zip(parts, norms)),
                np.array(parts[2].astype(F32))]
    queries, *after = rotary.turn(qkv, *cache, place, how)
    found = [queries[0, :, 0], *(array[0, :, 5] for array in after)]
    for x, y in zip(found, expected):
        error = np.linalg.norm(np.array(x.astype(F32)) - y) / np.linalg.norm(y)
        assert error <= ALLOWED[case.dtype]
    others = [0, 1, 2, 3, 4, 6]
    for array, old in zip(after, before):  # in the very arrays, and nothing else in them
        np.testing.assert_array_equal(np.array(array.astype(F32))[:, :, others], old[:, :, others])


@pytest.mark.parametrize("correct, wrong", [
    ("(head - queries) % stored", "head - queries"),
    ("pair >= PAIRS", "pair > PAIRS"), ("pair < PAIRS ? static", "pair < PAIRS + 8 ? static"),
    ("steps[pair]", "steps[pair + 8]"),
    ("* capacity + position", "* capacity + position + 2"),
], ids=["head", "write", "read", "steps", "position"])
def test_an_injected_fault_is_seen(emulation, monkeypatch, correct, wrong):
    assert correct in rotary._KERNEL.body
    monkeypatch.setattr(rotary._KERNEL, "body", rotary._KERNEL.body.replace(correct, wrong))
    with pytest.raises((OutOfBounds, Unsettled)):
        check._rotary(Heads(3, 2, 66, 66, F32, normed=True))
