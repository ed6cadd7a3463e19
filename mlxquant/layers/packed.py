"""Replicated layers as a GPU runs them: siblings stacked into one matrix, codes in the kernels'
order.

``pack`` replaces the stored layers by these when a model is loaded. One token then takes two
dispatches per group (q, k, v; o; gate, up; down): one prepares the input, one reads the codes. An
RMSNorm or SwiGLU before the group is fused into the first dispatch (``kernels/first_step.py``). A
few tokens use the same kernels; a longer prompt expands the codes once and multiplies. Where a
kernel disagrees with its reference on this machine (``kernels/check.py``), ``mx`` operations are
used, which are right everywhere.

Calling a kernel takes Python some ten microseconds, and a token makes hundreds of calls: so for a
few tokens each group, and each whole MLP, is traced once by ``mx.compile`` and replayed. The
experts of a mixture are in ``packed_experts.py``.
"""

import itertools
from math import prod
from typing import Generic, TypeVar

import mlx.core as mx
import mlx.nn as nn

from mlxquant.kernels import (
    backend,
    code_order,
    expand_codes,
    prepare_input,
    replicated_matvec,
    replicated_tensor_cores,
)
from mlxquant.kernels.check import trusted
from mlxquant.kernels.first_step import AS_IS, AsIs, Gate
from mlxquant.kernels.matrix import NOTHING, Added, Matrix, Scales
from mlxquant.layers.memo import Elsewhere, MadeOnce, compiled
from mlxquant.layers.replicated import ReplicaInput, Replicated

FEW_TOKENS = 8  # more are a prompt: expanding the codes once is cheaper (benchmarks/LOG.md)


def is_few(x: mx.array) -> bool:
    """Whether x (…, n) holds so few tokens that kernels take them."""
    return bool(x.size <= FEW_TOKENS * x.shape[-1])


class PackedCodes(nn.Module):
    """Siblings of n inputs and, stacked, m outputs: ``codes`` (m, chunks, b) in the kernels' order,
    ``replica_out`` (m, K), and the arrays of ``ReplicaInput``, in float32. For experts codes and
    scales have a leading axis E."""

    def __init__(self, shared: ReplicaInput, linears: list[Replicated]):
        super().__init__()
        spec = shared.spec
        self.inputs, self.spec, self.experts = shared.inputs, spec, shared.experts
        parts = [_reordered(linear) for linear in linears]
        self.codes = mx.concatenate(parts, axis=-3) if len(parts) > 1 else parts[0]
        # Where siblings' rows begin and end; no list: that would be a child.
        self.bounds = (0, *itertools.accumulate(part.shape[-3] for part in parts))
        self.replica_out = mx.concatenate([linear.replica_out for linear in linears], axis=-2)
        self.replica_in = shared.replica_in.astype(mx.float32)
        if "column_scale" in shared:
            self.column_scale = shared.column_scale.astype(mx.float32)
        if "rotation_signs" in shared:
            self.rotation_signs = shared.rotation_signs
        self._made = MadeOnce()
        self.freeze()

    @property
    def shape(self) -> tuple[int, ...]:
        """(m, n), or (E, m, n)."""
        return *self.replica_out.shape[:-1], self.inputs

    @property
    def siblings(self) -> int:
        return len(self.bounds) - 1

    @property
    def matrix(self) -> Matrix:
        """What the kernels read."""
        return Matrix(self.codes, self.replica_out, Scales(
            self.inputs, self.spec, self.replica_in, self.get("column_scale"),
            self.get("rotation_signs")))

    def operations(self) -> int:
        """Multiply-adds per token that the definition takes: K per weight, grouped 1 + K / G, and
        the rotation's; of experts those of all."""
        rotation = self.spec.rotation_additions(self.inputs) * (self.experts or 1)
        return self.spec.multiply_adds(prod(self.shape)) + rotation

    def suits(self, kernel: str) -> bool:
        """Whether ``kernel`` is to be trusted, and takes these codes and their rotation."""
        return (trusted(kernel) and self.spec.rotation_block <= prepare_input.LARGEST_BLOCK
                and self.codes.size >= backend.SMALLEST)


Group = TypeVar("Group", bound=PackedCodes)


class PackedGroup(PackedCodes):
    """Siblings that every token uses. The step ``first`` is applied to their input before anything
    else."""

    def __init__(self, shared: ReplicaInput, linears: list[Replicated]):
        super().__init__(shared, linears)
        self.first: AsIs = AS_IS
        self._few = compiled(self._multiply)

    def outputs(self, x: mx.array, sibling: int) -> mx.array:
        """One sibling's output (…, rows) for ``x``, in x's dtype or, where ``first`` is a norm, the
        norm's; computed once for all siblings that are called with the same array."""
        made: list[mx.array] = self._made.get((x,), sibling,
                                              self._few if is_few(x) else self._multiply)
        return made[sibling]

    def stacked(self, x: mx.array, first: AsIs | None = None, added: Added = NOTHING) -> mx.array:
        """All siblings' outputs (…, m), concatenated, plus the terms ``added``, for ``x`` (…, n).
        ``first`` replaces the group's own step; where it is a gate, x is (…, 2 n)."""
        # Reshaping to the same shape would be a node of the graph all the same.
        flat, first = x if x.ndim == 2 else x.reshape(-1, x.shape[-1]), first or self.first
        few = is_few(flat)
        y = self._by_kernel(flat, first, added) if few else self._by_product(first(flat))
        y = y if x.ndim == 2 else y.reshape(*x.shape[:-1], -1)
        return y if few else added(y)

    def _multiply(self, x: mx.array) -> list[mx.array]:
        return mx.split(self.stacked(x), list(self.bounds[1:-1]), axis=-1)

    def _by_kernel(self, x: mx.array, first: AsIs, added: Added) -> mx.array:
        matrix, tokens, dtype = self.matrix, len(x), first.dtype(x)
        if not trusted(first.kernel):
            x, first = first(x), AS_IS
        prepared = self.suits("prepare_input")
        on_tensor_cores = (prepared and replicated_tensor_cores.fits(matrix, tokens, dtype)
                           and trusted("replicated_tensor_cores"))
        if not prepared or not (on_tensor_cores or trusted("replicated_matvec")):
            return added(matrix.product(matrix.scales.rotated(first(x)), dtype))
        kernel = replicated_tensor_cores if on_tensor_cores else replicated_matvec
        x = prepare_input.prepare(x, matrix.scales, kernel.layout(self.spec, dtype, tokens), first)
        return kernel.multiply(x, matrix, tokens, dtype, added=added)

    def _by_product(self, x: mx.array) -> mx.array:
        matrix = self.matrix
        rotated = matrix.scales.rotated(x)
        if not trusted("expand_codes"):
            return matrix.product(rotated, x.dtype)
        return rotated.astype(x.dtype) @ expand_codes.expand(matrix, x.dtype).T


class PackedSibling(nn.Module, Generic[Group]):
    """The sibling of number ``index`` in what its ``group`` computes, plus its ``bias``."""

    def __init__(self, group: Group, index: int, bias: mx.array | None):
        super().__init__()
        self._group, self.index = Elsewhere(group), index
        if bias is not None:
            self.bias = bias
        self.freeze()

    @property
    def group(self) -> Group:
        return self._group.module


class PackedLinear(PackedSibling[PackedGroup]):
    """Takes the place of a ``ReplicatedLinear``."""

    def __call__(self, x: mx.array) -> mx.array:
        y = self.group.outputs(x, self.index)
        return y + self.bias.astype(y.dtype) if "bias" in self else y


def are_gated(gate: PackedSibling[Group], up: PackedSibling[Group],
              down: PackedSibling[Group]) -> bool:
    """Whether SwiGLU can go into down's group: one group computes gate and up, in this order and
    nothing else, without biases, and down is alone in its group."""
    return ("bias" not in gate and "bias" not in up and gate.group is up.group
            and (gate.index, up.index) == (0, 1) and gate.group.siblings == 2
            and down.group.siblings == 1)


class NormInReader(nn.Module):
    """Takes the place of an RMSNorm that its only readers, packed groups, now compute: it returns
    x, and keeps the weight at its path and in all counts."""

    def __init__(self, norm: nn.RMSNorm):
        super().__init__()
        self.weight = norm.weight
        self.freeze()

    def __call__(self, x: mx.array) -> mx.array:
        return x


class PackedMLP(nn.Module):
    """``module``, which computes down(silu(gate x) ∘ up x), where gate and up are one group: no
    dispatch runs between that group and down's."""

    def __init__(self, module: nn.Module, gate_up: PackedGroup, down: PackedLinear):
        super().__init__()
        self.module = module
        self._gate_up, self._down = Elsewhere(gate_up), Elsewhere(down)
        self.freeze()

    def __call__(self, x: mx.array) -> mx.array:
        down = self._down.module
        return down.group.stacked(self._gate_up.module.stacked(x), Gate(), Added(down.get("bias")))


class TracedForFew(nn.Module):
    """``module``, a function of x (…, n) alone, traced once for each number of tokens up to
    ``FEW_TOKENS``, or run as it is where it cannot be traced."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module
        self._few = mx.compile(module.__call__)  # given the module, it would count as a child twice
        self.freeze()

    def __call__(self, x: mx.array) -> mx.array:
        if not is_few(x):
            return self.module(x)
        try:
            return self._few(x)
        except ValueError:  # it looks at values, which a trace does not have
            self._few = self.module.__call__
            return self.module(x)


def _reordered(linear: Replicated) -> mx.array:
    """A layer's codes in the kernels' order, (…, m, chunks, b)."""
    *stack, _ = linear.codes.shape
    codes = linear.codes.reshape(-1, linear.codes.shape[-1])
    words = code_order.reorder(codes, linear.input.spec.bits, linear.input.inputs)
    return words.reshape(*stack, *words.shape[1:])
