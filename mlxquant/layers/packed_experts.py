"""The replicated experts of a mixture as a GPU runs them: only the codes of a token's experts are
read.

As in ``packed.py`` siblings (gate, up) are one stack of matrices, and a token costs a group two
dispatches whatever the number of its experts; SwiGLU between them goes into the second group's
first. A token and one of its experts are a pair, and few pairs are each computed separately. Where
so many pairs would read all experts again and again, all matrices are expanded once, some experts
at a time, and multiplied by their tokens.
"""

from itertools import pairwise

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.switch_layers import SwiGLU, SwitchGLU

from mlxquant.kernels import expand_codes, prepare_input, replicated_matvec
from mlxquant.kernels.check import MIXTURE, trusted
from mlxquant.kernels.first_step import AS_IS, AsIs, Gate
from mlxquant.layers.memo import compiled
from mlxquant.layers.packed import PackedCodes, PackedSibling, are_gated

# Up to so many pairs per expert, each pair is multiplied separately. Expanding a 2-bit matrix
# writes and reads some 30 times its codes, which are in the caches for an expert's next pair.
_PAIRS = 4
_TRACED = 64  # pairs up to which calls are traced: mlx-lm sorts so many and more
EXPANDED = 1 << 28  # weights that are held expanded at once


class PackedExperts(PackedCodes):
    """Siblings of the experts of a mixture, of which each token uses a few."""

    def are_few(self, pairs: int) -> bool:
        """Whether each of so many ``pairs`` is multiplied separately."""
        return pairs <= _PAIRS * (self.experts or 1)

    def outputs(self, x: mx.array, indices: mx.array, sibling: int) -> mx.array:
        """One sibling's output (…, l, rows) of ``x`` (…, l, n), by the experts that ``indices``
        (…) name; made once for the siblings that hand in the same arrays."""
        made: list[mx.array] = self._made.get((x, indices), sibling, self._multiply)
        return made[sibling]

    def stacked(self, x: mx.array, experts: mx.array, first: AsIs = AS_IS) -> mx.array:
        """All siblings' outputs (pairs, m), concatenated, for ``x`` (tokens, n), to which ``first``
        is applied before. Each token has the next pairs / tokens of ``experts`` (pairs,)."""
        if self.are_few(len(experts)):
            return self._by_kernel(x, experts, first)
        return self._by_product(first(x), experts)

    def _multiply(self, x: mx.array, indices: mx.array) -> list[mx.array]:
        each, width = x.shape[-2:]
        experts = indices.reshape(-1)
        if each > 1 or x.shape[:-2] not in (indices.shape, (*indices.shape[:-1], 1)):
            x = mx.broadcast_to(x, (*indices.shape, each, width))
            experts = mx.repeat(experts, each)
        y = self.stacked(x.reshape(-1, width), experts).reshape(*indices.shape, each, -1)
        return mx.split(y, list(self.bounds[1:-1]), axis=-1)

    def _by_kernel(self, x: mx.array, experts: mx.array, first: AsIs) -> mx.array:
        matrix, dtype = self.matrix, first.dtype(x)
        if not self.suits(MIXTURE):
            return matrix.product(matrix.scales.rotated(first(x)), dtype, experts)
        layout = replicated_matvec.layout(self.spec, dtype)
        prepared = prepare_input.prepare(x, matrix.scales, layout, first, experts)
        return replicated_matvec.multiply(prepared, matrix, len(experts), dtype, experts)

    def _by_product(self, x: mx.array, experts: mx.array) -> mx.array:
        matrix, total = self.matrix, self.experts or 1
        at_once = max(1, EXPANDED // (matrix.rows * self.inputs))
        order = mx.argsort(experts)
        experts = experts[order]
        rows = matrix.scales.rotated(x).astype(x.dtype)[order // (len(experts) // len(x)), None]
        ends = [len(experts)]
        if at_once < total:  # where each part's pairs end follows from the values of the indices
            starts = range(at_once, total + at_once, at_once)
            ends = np.searchsorted(np.array(experts), starts).tolist()
        made = []
        for start, (low, high) in zip(range(0, total, at_once), pairwise([0, *ends])):
            part = matrix.part(slice(start, start + at_once))
            weight = (expand_codes.expand(part, x.dtype) if trusted(MIXTURE)
                      else part.dense().astype(x.dtype))
            made.append(mx.gather_mm(rows[low:high], weight.swapaxes(-1, -2),
                                     rhs_indices=experts[low:high] - start, sorted_indices=True))
            if at_once < total:
                mx.eval(made[-1])  # so that one part at a time is expanded
        return mx.concatenate(made)[mx.argsort(order), 0]


class PackedSwitchLinear(PackedSibling[PackedExperts]):
    """In the place of a ``ReplicatedSwitchLinear``; its ``bias`` is (E, rows)."""

    @property
    def num_experts(self) -> int:
        return self.group.experts or 1

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        y = self.group.outputs(x, indices, self.index)
        if "bias" in self:
            y = y + mx.expand_dims(self.bias[indices], -2).astype(y.dtype)
        return y


class PackedSwitchGLU(nn.Module):
    """mlx-lm's ``SwitchGLU`` of packed layers: for few pairs one trace, in which nothing runs
    between the group of gate and up and that of down."""

    def __init__(self, module: SwitchGLU):
        super().__init__()
        self.module, self._few = module, compiled(self._fused)
        self.freeze()

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        pairs = indices.size
        few = pairs < _TRACED and self.module.down_proj.group.are_few(pairs)
        return (self._few if few else self.module)(x, indices)

    def _fused(self, x: mx.array, indices: mx.array) -> mx.array:
        experts, down = indices.reshape(-1), self.module.down_proj
        gate_up = self.module.gate_proj.group.stacked(x.reshape(-1, x.shape[-1]), experts)
        y = down.group.stacked(gate_up, experts, Gate())
        if "bias" in down:
            y = y + down.bias[experts].astype(y.dtype)
        return y.reshape(*indices.shape, -1)


def can_fuse(module: nn.Module) -> bool:
    """Whether ``module`` is a ``SwitchGLU`` whose steps between its layers a kernel can take."""
    if not (type(module) is SwitchGLU and type(module.activation) is SwiGLU):
        return False
    gate, up, down = module.gate_proj, module.up_proj, module.down_proj
    return (all(isinstance(layer, PackedSwitchLinear) for layer in (gate, up, down))
            and are_gated(gate, up, down))
