"""The read kernel: its reference, and its Metal source run on the CPU."""

import mlx.core as mx
import numpy as np
import pytest
from metal import OutOfBounds

from mlxquant.kernels import read_ceiling


def buffers(groups, vectors, seed=0):
    random = np.random.default_rng(seed)
    return (mx.array(random.integers(0, 1 << 32, size, np.uint32))
            for size in (groups * read_ceiling.words(vectors), 64))


def test_every_word_counts_once():
    data, previous = buffers(3, 8)
    result = np.array(read_ceiling.reference(data, previous, 8))
    total = np.bitwise_xor.reduce(np.array(data))
    # 8 words of previous count too, an even number of times each
    assert np.bitwise_xor.reduce(result) == total
    data[5] = data[5] ^ 1
    assert (np.array(read_ceiling.reference(data, previous, 8)) != result).sum() == 1


@pytest.fixture
def emulation(emulate, monkeypatch):
    emulate(alignment=16).install(monkeypatch, read_ceiling)


@pytest.mark.parametrize("vectors", [8, 16])
def test_the_kernel_is_its_reference(emulation, vectors):
    data, previous = buffers(3, vectors)
    assert mx.array_equal(read_ceiling.read(data, previous, vectors),
                          read_ceiling.reference(data, previous, vectors))


def test_the_package_would_trust_it(emulation):
    assert read_ceiling.disagreement() == 0


@pytest.mark.parametrize("correct, wrong", [
    ("held[j].w", "held[j].z"), ("(i + j) * WIDTH", "(i + j) * WIDTH / 2"),
    ("previous[at % 8]", "0")])
def test_a_kernel_that_leaves_something_out_is_not_trusted(emulation, monkeypatch, correct, wrong):
    kernel = read_ceiling._KERNEL
    assert correct in kernel.body
    monkeypatch.setattr(kernel, "body", kernel.body.replace(correct, wrong))
    assert read_ceiling.disagreement() > 0


def test_a_read_past_the_end_is_seen(emulation, monkeypatch):
    monkeypatch.setattr(read_ceiling._KERNEL, "body", read_ceiling._KERNEL.body.replace(
        "(i + j) * WIDTH", "(i + j + 1) * WIDTH"))
    with pytest.raises(OutOfBounds, match="`data`"):
        read_ceiling.read(*buffers(3, 8), 8)
