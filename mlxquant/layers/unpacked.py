"""Quantised layers for training: they are differentiable by their scales, and codes can move.

Moving codes are learned rounding. As in AdaRound (Nagel et al. 2020,
https://arxiv.org/abs/2004.10568) a code may end at another level than the nearest; as in LSQ (Esser
et al. 2019, https://arxiv.org/abs/1902.08153) the gradient passes straight through the rounding.
A code starts where the sweep left it: in the middle of its cell, or as far from there as the float
weight is, but never beyond the cell. Started from the float weights themselves a model ended worse
(``benchmarks/LOG.md``).
"""

from collections.abc import Callable
from functools import partial

import mlx.core as mx
import mlx.nn as nn

from mlxquant.codes import affine
from mlxquant.codes.packing import pack_codes, unpack_codes
from mlxquant.codes.spec import Spec
from mlxquant.codes.width import Width
from mlxquant.layers.grouped import GroupedLinear
from mlxquant.layers.memo import Elsewhere
from mlxquant.layers.replicated import ReplicatedLinear

_EDGE = 0.49  # of a level: as far as a code can go beyond the lowest and the highest


class MovableCodes(nn.Module):
    """Codes (m, n) of levels 0 to ``top``, which ``unpack`` makes of ``packed`` ones as uint8.

    ``moves`` (m, n) are how many levels a code has moved before rounding, at first ``start``;
    where that is None codes stay, and stay packed. Beyond the cells of the lowest and the highest
    level they have no gradient. ``stored_as`` is what a checkpoint calls the codes.
    """

    stored_as = "codes"

    def __init__(self, packed: mx.array, unpack: Callable[[mx.array], mx.array], columns: int,
                 top: int, start: mx.array | None):
        super().__init__()
        self._unpack, self._columns, self._top = unpack, columns, top
        self.codes = packed if start is None else unpack(packed)
        if start is not None:
            self.moves = mx.broadcast_to(start, self.codes.shape)
        self.freeze()  # trained by ``Trainable``, never by itself

    @property
    def shape(self) -> tuple[int, ...]:
        """(m, n), or (E, m, n)."""
        return *self.codes.shape[:-1], self._columns

    def matrix(self, make: Callable[..., mx.array], *scales: mx.array) -> mx.array:
        """``make(levels (m, n), *scales)``. The backward pass computes it again, because the arrays
        between codes and matrix are many times as large as the codes."""
        moves = [self.moves] if "moves" in self else []

        def made(*given: mx.array) -> mx.array:
            return make(self.levels(*given[:len(moves)]), *given[len(moves):])

        return mx.checkpoint(made)(*moves, *scales)

    def levels(self, moves: mx.array | None = None) -> mx.array:
        """Codes (m, n) as they stand: uint8, or float32 with a gradient by ``moves``."""
        if moves is None:
            return self._unpack(self.codes)
        wanted = mx.clip(self.codes + moves.astype(mx.float32), -_EDGE, self._top + _EDGE)
        return wanted + mx.stop_gradient(mx.round(wanted) - wanted)

    def rounded(self, moves: mx.array) -> mx.array:
        """The codes that ``moves`` (m, n) stand for, uint8."""
        return mx.clip(mx.round(self.codes + moves), 0, self._top).astype(mx.uint8)


class MovingReplica(MovableCodes):
    """Takes the place of a ``ReplicatedLinear`` whose codes move; other parameters keep their
    names."""

    def __init__(self, layer: ReplicatedLinear, start: mx.array):
        bits = layer.input.spec.bits
        columns = layer.shape[1]
        super().__init__(layer.codes, partial(unpack_codes, width=bits, columns=columns), columns,
                         bits.levels - 1, start)
        self._input, self._sibling = Elsewhere(layer.input), layer.sibling
        self._bits = bits
        self.replica_out = layer.replica_out
        if "bias" in layer:
            self.bias = layer.bias

    def packed(self, moves: mx.array) -> mx.array:
        return pack_codes(self.rounded(moves), self._bits)

    def __call__(self, x: mx.array) -> mx.array:
        def scaled(levels: mx.array, out: mx.array, inside: mx.array) -> mx.array:
            levels = self._bits.lowest + self._bits.distance * levels
            return levels.astype(x.dtype) * (out.astype(x.dtype) @ inside.T)

        matrix = self.matrix(scaled, self.replica_out, self._input.module.envelope(x.dtype))
        y = self._input.module.rotate(x, self._sibling) @ matrix.T
        return y + self.bias.astype(x.dtype) if "bias" in self else y


class AffineCodes(MovableCodes):
    """W = scale·q + bias by groups of inputs. ``centres``, bias + scale·top/2, the value of the
    middle level, replace ``biases``; other parameters keep their names. It is differentiable by
    scales and centres. With biases, a change of a scale would move all weights of its group by up
    to 255 times as much, and a 16-bit type would round off the levels. Levels stay as ``spec``
    asks, where it is known: no fourth one beside ternary ones, and symmetric ones stay mirrored.
    """

    def __init__(self, layer: nn.Module, start: mx.array | None = None, spec: Spec | None = None):
        grouped = isinstance(layer, GroupedLinear)
        packed = layer.codes if grouped else layer.weight
        columns = layer.shape[1] if grouped else packed.shape[-1] * 32 // layer.bits
        bits = layer.bits

        def unpack(packed: mx.array) -> mx.array:
            codes = affine.unpack(packed.reshape(-1, packed.shape[-1]), bits, columns)
            return codes.reshape(*packed.shape[:-1], columns)

        asked = spec if spec and spec.bits.code_bits == bits else Spec(bits=Width.of(bits))
        super().__init__(packed, unpack, columns, asked.bits.levels - 1, start)
        self._mirrored = asked.symmetric  # ternary groups store a bias, so theirs may shift
        self._bits, self.stored_as = bits, "codes" if grouped else "weight"
        self.scales = layer.scales
        self.centres = self.centres_of(layer.scales, layer.biases)
        if "bias" in layer:
            self.bias = layer.bias

    def packed(self, moves: mx.array) -> mx.array:
        return affine.pack(self.rounded(moves), self._bits)

    @property
    def _middle(self) -> float:
        return self._top / 2

    def centre_steps(self) -> mx.array:
        """How far a step moves the centre of each group, relatively: a quarter of what its levels
        span, float32; 0 where they are mirrored around it."""
        span = mx.abs((self._top + 1) * self.scales.astype(mx.float32))
        return span * (0.0 if self._mirrored else 0.25)

    def centres_of(self, scales: mx.array, biases: mx.array) -> mx.array:
        """What the middle level of each group stands for, float32."""
        return biases.astype(mx.float32) + self._middle * scales.astype(mx.float32)

    def biases_of(self, scales: mx.array, centres: mx.array) -> mx.array:
        """What the lowest level of each group stands for, float32."""
        return centres.astype(mx.float32) - self._middle * scales.astype(mx.float32)

    def dense(self, dtype: mx.Dtype) -> mx.array:
        """W (m, n), or of experts (E, m, n), in ``dtype``."""
        def scaled(levels: mx.array, *given: mx.array) -> mx.array:
            scales, centres = (a.astype(dtype)[..., None] for a in given)
            groups = (levels.astype(dtype) - self._middle).reshape(*self.scales.shape, -1)
            return (scales * groups + centres).reshape(levels.shape)

        return self.matrix(scaled, self.scales, self.centres)


class UnpackedAffine(AffineCodes):
    """y = x Wᵀ + bias, in the place of a ``QuantizedLinear`` or ``GroupedLinear``."""

    def __call__(self, x: mx.array) -> mx.array:
        y = x @ self.dense(x.dtype).T
        return y + self.bias.astype(x.dtype) if "bias" in self else y


class UnpackedExperts(AffineCodes):
    """The same for a stack of experts, in the place of mlx-lm's ``QuantizedSwitchLinear``."""

    @property
    def num_experts(self) -> int:
        return int(self.codes.shape[0])

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        y = mx.gather_mm(x, self.dense(x.dtype).swapaxes(-1, -2), rhs_indices=indices,
                         sorted_indices=sorted_indices)
        return y + mx.expand_dims(self.bias[indices], -2) if "bias" in self else y
