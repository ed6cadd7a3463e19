"""Random cases on which kernels are compared with their references."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlxquant.codes import hadamard
from mlxquant.codes.spec import REPLICA_WIDTHS, ReplicaShape
from mlxquant.codes.width import Width
from mlxquant.kernels import code_order
from mlxquant.kernels.first_step import Norm
from mlxquant.kernels.matrix import Matrix, Scales
from mlxquant.kernels.rotary import Rotary

ALL = (mx.float32, mx.float16, mx.bfloat16)


@dataclass(frozen=True)
class Case:
    """A random replicated matrix, or one for each of ``experts``, and an input for it."""

    bits: Width
    replicas: int
    group: int
    rotation: int
    rows: int
    inputs: int
    tokens: int
    dtype: mx.Dtype
    experts: int = 0

    def __str__(self) -> str:
        shape = f"{self.bits} bit K{self.replicas} " + f"G{self.group} " * bool(self.group)
        size = f"{self.experts}×" * bool(self.experts) + f"{self.rows}×{self.inputs}"
        return f"{shape}{size}, {self.tokens} tokens, {str(self.dtype).split('.')[-1]}"

    @property
    def shape(self) -> ReplicaShape:
        return ReplicaShape(self.bits, self.replicas, self.group, self.rotation)

    @property
    def quick(self) -> bool:
        """Whether it is one of the few that are tried at first use."""
        return self.bits is Width.TWO and self.replicas in (4, 8)

    def draw(self, seed: int = 0) -> tuple[mx.array, Matrix]:
        """x (tokens, n), and a matrix for it."""
        random = np.random.default_rng(seed)

        def normal(*shape: int) -> mx.array:
            return mx.array(random.normal(size=shape).astype(np.float32))

        stack = (self.experts,) * bool(self.experts)
        rows = self.rows * (self.experts or 1)
        codes = mx.array(random.integers(0, self.bits.levels, (rows, self.inputs), np.uint8))
        scales = Scales(
            self.inputs, self.shape,
            normal(*stack, self.inputs // (self.group or 1), self.replicas),
            normal(*stack, self.inputs) if self.group else None,
            hadamard.pack_signs(hadamard.random_signs(self.inputs, seed))
            if self.rotation else None)
        words = code_order.pack(codes, self.bits.code_bits)
        out = normal(*stack, self.rows, self.replicas)
        matrix = Matrix(words.reshape(*stack, self.rows, *words.shape[1:]),
                        out if self.dtype == mx.float32 else out.astype(self.dtype), scales)
        return normal(self.tokens, self.inputs).astype(self.dtype), matrix

    def chosen(self) -> mx.array:
        """The three experts that each token in turn goes to, (3 · tokens,)."""
        random = np.random.default_rng(1)
        return mx.array(random.integers(0, self.experts, 3 * self.tokens).astype(np.uint32))


@dataclass(frozen=True)
class Heads:
    """Random heads of one token: ``queries`` query heads, ``stored`` key heads and as many value
    heads, in one array or with values in another (``apart``); and a KV cache of seven positions."""

    queries: int
    stored: int
    size: int
    dims: int
    dtype: mx.Dtype
    traditional: bool = False
    normed: bool = False
    apart: bool = False
    quick = True

    def __str__(self) -> str:
        kind = ("traditional " * self.traditional + "normed " * self.normed
                + "values apart " * self.apart)
        return (f"{self.queries}+2×{self.stored} heads of {self.size}, {self.dims} turned, {kind}"
                f"{str(self.dtype).split('.')[-1]}")

    def draw(self) -> tuple[Sequence[mx.array], mx.array, mx.array, mx.array, Rotary]:
        """What ``rotary.turn`` takes."""
        random = np.random.default_rng(0)

        def normal(*shape: int) -> mx.array:
            return mx.array(random.normal(size=shape).astype(np.float32)).astype(self.dtype)

        n, more = self.stored * self.size, self.queries * self.size
        norms = (Norm(normal(self.size), 0.1), Norm(normal(self.size), 0.2))
        steps = mx.array((0.9 * random.random(self.dims // 2) + 0.01).astype(np.float32))
        keys, values = (normal(1, self.stored, 7, self.size) for _ in range(2))
        # In the order in which siblings are stacked: k, q, v.
        whole, values_at = normal(1, more + 2 * n), n + more
        qkv = [whole, whole, whole[:, values_at:] if self.apart else whole]
        starts = (n, 0, 0 if self.apart else values_at)
        return qkv, keys, values, mx.array([5] + 7 * [0], mx.int32), Rotary(
            self.queries, self.stored, self.size, starts, steps, self.traditional,
            norms if self.normed else None)


def heads(dtypes: tuple[mx.Dtype, ...] = ALL) -> Iterator[Heads]:
    for dtype in dtypes:
        yield Heads(6, 2, 128, 128, dtype)
        yield Heads(3, 3, 80, 32, dtype, traditional=True, normed=True)
        yield Heads(4, 1, 96, 96, dtype, normed=True, apart=True)


def cases(dtypes: tuple[mx.Dtype, ...] = ALL) -> Iterator[Case]:
    """Every width and dtype, plain and grouped, sizes that fill no block, several tokens."""
    for dtype in dtypes:
        for bits in REPLICA_WIDTHS:
            yield Case(bits, 4, 0, 64, 83, 1344, 1, dtype)
            yield Case(bits, 8, 16, 64, 40, 576, 3, dtype)
        yield Case(Width.TWO, 1, 0, 0, 17, 100, 8, dtype)
        yield Case(Width.TWO, 4, 0, 64, 19, 320, 4, dtype)
        yield Case(Width.TWO, 16, 64, 256, 33, 2304, 4, dtype)


def mixtures(dtypes: tuple[mx.Dtype, ...] = ALL) -> Iterator[Case]:
    """Such cases for a mixture's experts."""
    for dtype in dtypes:
        for bits in REPLICA_WIDTHS:
            yield Case(bits, 4, 0, 64, 19, 320, 1, dtype, experts=5)
            yield Case(bits, 8, 16, 64, 24, 192, 3, dtype, experts=4)
