"""A linear layer whose codes are read once and used K times under different scales.

    y = Σ_k b_k ∘ (C (a_k ∘ R x)) = W x  with  W = (C ∘ (B Aᵀ)) R

C (m, n) holds symmetric levels, B (m, K) and A (n, K) scales, R an optional
rotation (``codes/hadamard.py``). Storage is ``bits + 16 K (m+n) / (mn)`` per
weight, where a scale and an offset per 64 weights take half a bit. Grouped, A is
constant over G neighbouring inputs but for one factor per input, so that the
replicas can share each group's partial sums.

Siblings (q, k, v; gate, up) read the same input and share what belongs to it,
R and A: the ``ReplicaInput``, a module of its own beside them (``self_attn.qkv``).
"""

import weakref
from collections.abc import Callable, Iterable

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlxquant.base.errors import BadValue
from mlxquant.codes import hadamard
from mlxquant.codes.packing import empty_codes, unpack_codes
from mlxquant.codes.spec import ReplicaShape


class ReplicaInput(nn.Module):
    """What siblings of n inputs share: how x is rotated, and the scales A of their inputs.

    ``replica_in`` (n, K) is A itself or, grouped, (n / G, K) with ``column_scale`` (n,):
    A[j, k] = column_scale[j] · replica_in[j // G, k]. ``rotation_signs``, ⌈n / 8⌉ bytes,
    are there where the shape has a rotation. Raises ``BadValue`` where the shape does
    not divide ``inputs``; ``path`` names the layer in its message.
    """

    def __init__(self, inputs: int, spec: ReplicaShape, path: str = "the layer"):
        super().__init__()
        spec.check(inputs, path)
        self.inputs, self.spec = inputs, spec
        self.replica_in = mx.zeros((inputs // (spec.replica_group or 1), spec.replicas))
        if spec.replica_group:
            self.column_scale = mx.zeros(inputs)
        if spec.rotation_block:
            self.rotation_signs = hadamard.pack_signs(mx.ones(inputs))
            self.freeze(recurse=False, keys="rotation_signs")  # bits have no gradient
        self._signs, self._rotated = _Kept(), MadeOnce()

    @property
    def stored_bytes(self) -> int:
        """Bytes of all its tensors, as held."""
        return sum(array.nbytes for array in self.parameters().values())

    def operations(self) -> int:
        """Additions per token: those of the rotation, n·log₂(block)."""
        return self.spec.rotation_additions(self.inputs)

    def envelope(self, dtype: mx.Dtype = mx.float32) -> mx.array:
        """A (n, K), computed in ``dtype``."""
        scales = mx.repeat(self.replica_in.astype(dtype), self.inputs // len(self.replica_in), axis=0)
        return scales * self.column_scale.astype(dtype)[:, None] if "column_scale" in self else scales

    def rotate(self, x: mx.array, reader: nn.Module | None = None) -> mx.array:
        """R x of ``x`` (…, n), in its dtype; ``x`` itself where there is no rotation.

        ``reader`` is the sibling that asks: it gets what was made for another one that
        was handed the very same array. Only an array changed in place between two
        siblings goes unnoticed.
        """
        if "rotation_signs" not in self:
            return x
        if reader is None:
            return self._rotate(x)
        return self._rotated.get(x, reader, self._rotate)

    def unrotate_weight(self, weight: mx.array) -> mx.array:
        """W R of ``weight`` (m, n), in its dtype: what takes x where W takes R x."""
        if "rotation_signs" not in self:
            return weight
        return hadamard.unrotate_weight(weight, self._unpacked(weight.dtype), self.spec.rotation_block)

    def _rotate(self, x: mx.array) -> mx.array:
        return hadamard.rotate(x, self._unpacked(x.dtype), self.spec.rotation_block)

    def _unpacked(self, dtype: mx.Dtype) -> mx.array:
        return self._signs.get(self.rotation_signs, dtype,
                               lambda bits: hadamard.unpack_signs(bits, self.inputs, dtype))


class ReplicatedLinear(nn.Module):
    """y = W x + bias with W = (C ∘ (B Aᵀ)) R, for an input of which ``shared`` holds A and R.

    ``codes`` (m, ⌈n·bits / 32⌉) uint32 or, ternary, (m, ⌈n / 5⌉) uint8 (see
    ``codes/packing.py``) do not train; ``replica_out`` (m, K) is B; ``bias`` (m,).
    """

    def __init__(self, outputs: int, shared: ReplicaInput, bias: bool = False):
        super().__init__()
        # Past Module, which would make it a child: its parameters are those of the group alone.
        object.__setattr__(self, "_input", shared)
        self.codes = empty_codes(outputs, shared.inputs, shared.spec.bits)
        self.replica_out = mx.zeros((outputs, shared.spec.replicas))
        if bias:
            self.bias = mx.zeros(outputs)
        self.freeze(recurse=False, keys="codes")
        self._levels: _Kept | None = None

    @property
    def input(self) -> ReplicaInput:
        """What this layer shares with its siblings."""
        return self._input

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.codes), self._input.inputs

    @property
    def weight_count(self) -> int:
        return len(self.codes) * self._input.inputs

    @property
    def stored_bytes(self) -> int:
        """Bytes of its codes and scales, as held; what it shares and its bias apart."""
        return self.codes.nbytes + self.replica_out.nbytes

    def operations(self) -> int:
        """Multiply-adds per token: K per weight, grouped 1 + K / G."""
        return self._input.spec.multiply_adds(self.weight_count)

    def keep_levels(self) -> int:
        """Unpack the codes once and for all, as training wants; returns the bytes that takes.

        They are held as int8, one byte per weight, until ``codes`` is replaced.
        """
        self._levels = _Kept()
        mx.eval(self._doubled_levels())
        return self.weight_count

    def scaled_levels(self, dtype: mx.Dtype) -> mx.array:
        """C ∘ (B Aᵀ), (m, n), computed in ``dtype``: what takes R x."""
        scales = self.replica_out.astype(dtype) @ self._input.envelope(dtype).T
        return self._doubled_levels().astype(dtype) * 0.5 * scales

    def dense(self) -> mx.array:
        """W (m, n) in float32, rotation included: what takes x."""
        return self._input.unrotate_weight(self.scaled_levels(mx.float32))

    def __call__(self, x: mx.array) -> mx.array:
        """y (…, m) of ``x`` (…, n), in its dtype. One product with W: for many tokens that is
        cheaper than K, and for one it is the reference that a kernel must agree with."""
        y = self._input.rotate(x, self) @ self.scaled_levels(x.dtype).T
        return y + self.bias.astype(x.dtype) if "bias" in self else y

    def _doubled_levels(self) -> mx.array:
        """2 C as int8, exact where levels are halves."""
        if self._levels is None:
            return self._unpack(self.codes)
        return self._levels.get(self.codes, None, self._unpack)

    def _unpack(self, codes: mx.array) -> mx.array:
        bits = self._input.spec.bits
        codes = unpack_codes(codes, bits, self._input.inputs).astype(mx.int8)
        return codes * round(2 * bits.distance) + round(2 * bits.lowest)  # on a CPU 60 times a look-up's speed


def bits_per_weight(linears: Iterable[ReplicatedLinear]) -> float:
    """Stored bits per weight of ``linears``, what they share counted once; biases apart."""
    linears = list(linears)
    inputs = {id(linear.input): linear.input for linear in linears}
    stored = sum(module.stored_bytes for module in [*linears, *inputs.values()])
    return 8 * stored / sum(linear.weight_count for linear in linears)


def install_group(parent: nn.Module, name: str, linears: dict[str, nn.Linear],
                  spec: ReplicaShape) -> ReplicaInput:
    """Put empty replicated layers in the place of ``linears``, and their input as ``name`` beside them.

    ``linears`` are layers by their path below ``parent`` that read the same input. Raises
    ``BadValue`` where the name is taken or the layers do not fit together or the shape.
    """
    if hasattr(parent, name):
        raise BadValue(f"{name} is taken in {type(parent).__name__}; allowed is a name it does not have")
    widths = {path: linear.weight.shape[1] for path, linear in linears.items()}
    if len(set(widths.values())) != 1:
        raise BadValue(f"the layers of {name} have {widths} inputs; allowed is one width for all")
    inputs = next(iter(widths.values()))
    shared = ReplicaInput(inputs, spec, ", ".join(linears))
    made = [(path, ReplicatedLinear(len(linear.weight), shared, "bias" in linear))
            for path, linear in linears.items()]
    parent.update_modules(tree_unflatten(made))
    setattr(parent, name, shared)
    return shared


class _Kept:
    """What was made of one array, until another is asked about.

    A plain object, because MLX counts every array of a module as its state.
    """

    def __init__(self):
        self._entry = (None, None, None)

    def get(self, source: mx.array, variant, make: Callable[[mx.array], mx.array]) -> mx.array:
        kept, as_variant, made = self._entry
        if kept is not source or as_variant != variant:
            made = make(source)
            self._entry = (source, variant, made)
        return made


class MadeOnce:
    """What siblings share of the last x, such as R x, for as long as x lives and for each reader once.

    A weak reference, so that no activation or tracer outlives its call. A reader that
    asks again for the same array gets it made anew: it may have changed in place.
    """

    def __init__(self):
        self._forget()

    def get(self, x: mx.array, reader: nn.Module, make: Callable[[mx.array], mx.array]) -> mx.array:
        if self._x is None or self._x() is not x or id(reader) in self._readers:
            self._x, self._made, self._readers = weakref.ref(x, self._forget), make(x), set()
        self._readers.add(id(reader))
        return self._made

    def _forget(self, _=None) -> None:
        self._x, self._made, self._readers = None, None, set()
