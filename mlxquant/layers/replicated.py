"""Linear layers whose codes are read once and used K times under different scales.

    y = Σ_k b_k ∘ (C (a_k ∘ R x)) = W x  with  W = (C ∘ (B Aᵀ)) R

C (m, n) holds symmetric levels, B (m, K) and A (n, K) scales, R an optional rotation
(``codes/hadamard.py``). Storage is ``bits + 16 K (m+n) / (mn)`` per weight; for comparison, a scale
and an offset per 64 weights take half a bit. Grouped, A is constant over G neighbouring inputs but
for one factor per input, so that the replicas can share each group's partial sums.

Siblings (q, k, v; gate, up) read the same input and share what belongs to it,
R and A: the ``ReplicaInput``, a module of its own beside them (``self_attn.qkv``).

The experts of a mixture are a stack: each has C, B and A of its own, with the
number E of experts in front of their shapes, and R is one for all.
"""

from math import prod

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlxquant.base.errors import BadValue
from mlxquant.codes import hadamard
from mlxquant.codes.packing import empty_codes, unpack_codes
from mlxquant.codes.spec import ReplicaShape
from mlxquant.layers.memo import Elsewhere, MadeOnce, Signs


class ReplicaInput(nn.Module):
    """What siblings of n inputs share: how x is rotated, and the scales A of their inputs.

    ``replica_in`` (n, K) is A itself or, grouped, (n / G, K) with ``column_scale`` (n,):
    A[j, k] = column_scale[j] · replica_in[j // G, k]. ``rotation_signs``, ⌈n / 8⌉ bytes,
    are there where the shape has a rotation. ``experts`` is None, or the number E of experts
    of which the siblings are stacks. Raises ``BadValue`` where the shape does not divide
    ``inputs``; ``path`` names the layer in its message.
    """

    def __init__(self, inputs: int, spec: ReplicaShape, path: str = "the layer",
                 experts: int | None = None):
        super().__init__()
        spec.check_inputs(inputs, path)
        self.inputs, self.spec, self.experts = inputs, spec, experts
        stack = () if experts is None else (experts,)
        self.replica_in = mx.zeros((*stack, inputs // (spec.replica_group or 1), spec.replicas))
        if spec.replica_group:
            self.column_scale = mx.zeros((*stack, inputs))
        if spec.rotation_block:
            self.rotation_signs = hadamard.pack_signs(mx.ones(inputs))
            self.freeze(recurse=False, keys="rotation_signs")  # bits have no gradient
        self._signs, self._rotated = Signs(inputs), MadeOnce()

    def operations(self) -> int:
        """Additions per token: those of the rotation, n·log₂(block); for each expert again."""
        return self.spec.rotation_additions(self.inputs) * (self.experts or 1)

    def envelope(self, dtype: mx.Dtype = mx.float32, experts: mx.array | None = None) -> mx.array:
        """A (n, K), computed in ``dtype``; of a stack (E, n, K), or those of ``experts`` alone."""
        def some(array: mx.array) -> mx.array:
            return (array if experts is None else array[experts]).astype(dtype)

        group = self.spec.replica_group or 1
        scales = mx.repeat(some(self.replica_in), group, axis=-2)
        return scales * some(self.column_scale)[..., None] if "column_scale" in self else scales

    def rotate(self, x: mx.array, sibling: int) -> mx.array:
        """R x of ``x`` (…, n), in its dtype; ``x`` itself where there is no rotation.

        ``sibling`` is the number of the layer that asks: it gets the result that was computed for
        another sibling, if that was given the very same array. An array that is changed in place
        between two siblings goes unnoticed.
        """
        if "rotation_signs" not in self:
            return x
        return self._rotated.get((x,), sibling, self._rotate)

    def unrotate_weight(self, weight: mx.array) -> mx.array:
        """W R of ``weight`` W (…, n), in its dtype: it multiplies x where W multiplies R x."""
        if "rotation_signs" not in self:
            return weight
        signs = self._signs.get(self.rotation_signs, weight.dtype)
        return hadamard.unrotate_weight(weight, signs, self.spec.rotation_block)

    def _rotate(self, x: mx.array) -> mx.array:
        signs = self._signs.get(self.rotation_signs, x.dtype)
        return hadamard.rotate(x, signs, self.spec.rotation_block)


class Replicated(nn.Module):
    """A matrix of replicated codes, or a stack of experts', for the input ``shared``.

    ``codes`` (m, ⌈n·bits / 32⌉) uint32 or, ternary, (m, ⌈n / 5⌉) uint8 (see ``codes/packing.py``)
    do not train; ``replica_out`` (m, K) is B; ``bias`` (m,). Of a stack all have the number of
    experts in front. ``sibling`` is its number among those that share the input.
    """

    def __init__(self, outputs: int, shared: ReplicaInput, bias: bool = False, sibling: int = 0):
        super().__init__()
        rows = (outputs,) if shared.experts is None else (shared.experts, outputs)
        self._input, self.sibling = Elsewhere(shared), sibling
        self.codes = empty_codes((*rows, shared.inputs), shared.spec.bits)
        self.replica_out = mx.zeros((*rows, shared.spec.replicas))
        if bias:
            self.bias = mx.zeros(rows)
        self.freeze(recurse=False, keys="codes")

    @property
    def input(self) -> ReplicaInput:
        """What this layer shares with its siblings."""
        return self._input.module

    @property
    def shape(self) -> tuple[int, ...]:
        """(m, n), or (E, m, n)."""
        return *self.replica_out.shape[:-1], self.input.inputs

    def operations(self) -> int:
        """Multiply-adds per token: K per weight, grouped 1 + K / G; of a stack those of all."""
        return self.input.spec.multiply_adds(prod(self.shape))

    def scaled_levels(self, dtype: mx.Dtype, experts: mx.array | None = None) -> mx.array:
        """C ∘ (B Aᵀ), (m, n), computed in ``dtype``: the matrix that multiplies R x. Of a stack
        (E, m, n), or those of ``experts`` alone."""
        out = self.replica_out if experts is None else self.replica_out[experts]
        scales = out.astype(dtype) @ self.input.envelope(dtype, experts).swapaxes(-1, -2)
        return self._doubled_levels(experts).astype(dtype) * 0.5 * scales

    def dense(self, experts: mx.array | None = None) -> mx.array:
        """W (m, n) in float32, rotation included: the matrix that multiplies x. Of a stack
        (E, m, n), or those of ``experts`` alone."""
        return self.input.unrotate_weight(self.scaled_levels(mx.float32, experts))

    def _doubled_levels(self, experts: mx.array | None) -> mx.array:
        """2 C as int8, exact where levels are halves."""
        bits = self.input.spec.bits
        codes = unpack_codes(self.codes if experts is None else self.codes[experts], bits,
                             self.input.inputs).astype(mx.int8)
        # On a CPU this is 60 times as fast as a look-up.
        return codes * round(2 * bits.distance) + round(2 * bits.lowest)


class ReplicatedLinear(Replicated):
    """y = W x + bias with W = (C ∘ (B Aᵀ)) R, in the place of an ``nn.Linear``."""

    def __call__(self, x: mx.array) -> mx.array:
        """y (…, m) of ``x`` (…, n), in its dtype. One product with W: for many tokens that is
        cheaper than K, and for one it is the reference that a kernel must agree with."""
        y = self.input.rotate(x, self.sibling) @ self.scaled_levels(x.dtype).T
        return y + self.bias.astype(x.dtype) if "bias" in self else y


class ReplicatedSwitchLinear(Replicated):
    """y = W_e x + bias_e for the experts e that are chosen, in the place of mlx-lm's
    ``SwitchLinear``, whose call it has."""

    @property
    def num_experts(self) -> int:
        return int(self.codes.shape[0])

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """y (…, l, m) of ``x`` (…, l, n), in its dtype, with the matrices that ``indices`` (…)
        name; what stands before l and n in x's shape broadcasts against them.

        It is computed in float32, since MLX gathers no bfloat16 matrices on a CPU. Few tokens
        expand the chosen matrices, many all of them, once.
        """
        z = self.input.rotate(x, self.sibling).astype(mx.float32)
        if indices.size <= self.num_experts:
            chosen = self.scaled_levels(mx.float32, indices.reshape(-1))
            y = z @ chosen.reshape(*indices.shape, *chosen.shape[1:]).swapaxes(-1, -2)
        else:
            y = mx.gather_mm(z, self.scaled_levels(mx.float32).swapaxes(-1, -2),
                             rhs_indices=indices, sorted_indices=sorted_indices)
        if "bias" in self:
            y = y + mx.expand_dims(self.bias[indices], -2)
        return y.astype(x.dtype)


def stacked(experts: list[dict[str, mx.array]]) -> dict[str, mx.array]:
    """The tensors of replicated experts, given each expert's as those of a layer by itself: stacks
    of them, but for the signs of the rotation, which must be the same for all."""
    return {name: array if name.endswith("rotation_signs") else
            mx.stack([tensors[name] for tensors in experts])
            for name, array in experts[0].items()}


def install_group(parent: nn.Module, name: str, linears: dict[str, nn.Module],
                  spec: ReplicaShape) -> ReplicaInput:
    """Put empty replicated layers in the place of ``linears``, and their input as ``name`` beside
    them.

    ``linears`` are layers by their path below ``parent`` that read the same input, all of them
    ``nn.Linear`` or all ``SwitchLinear``. Raises ``BadValue`` where the name is taken or the
    layers do not fit together or the shape.
    """
    if hasattr(parent, name):
        raise BadValue(f"{name} is taken in {type(parent).__name__}; allowed is a name it does "
                       "not have")
    shapes = {path: linear.weight.shape for path, linear in linears.items()}
    if len({(*shape[:-2], shape[-1]) for shape in shapes.values()}) != 1:
        widths = {path: shape[-1] if len(shape) == 2 else shape for path, shape in shapes.items()}
        raise BadValue(f"the layers of {name} have {widths} inputs; allowed is one width for all")
    *experts, _, inputs = next(iter(shapes.values()))
    shared = ReplicaInput(inputs, spec, ", ".join(linears), *experts)
    kind = ReplicatedSwitchLinear if experts else ReplicatedLinear
    made = [(path, kind(linear.weight.shape[-2], shared, "bias" in linear, number))
            for number, (path, linear) in enumerate(linears.items())]
    parent.update_modules(tree_unflatten(made))
    setattr(parent, name, shared)
    return shared
