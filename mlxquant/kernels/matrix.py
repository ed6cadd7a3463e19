"""What kernels read of a replicated layer: the scales of its input, and a matrix of codes or the
matrices of a mixture's experts."""

import functools
import struct
from dataclasses import dataclass, replace

import mlx.core as mx

from mlxquant.codes import hadamard
from mlxquant.codes.spec import ReplicaShape
from mlxquant.kernels import backend, code_order
from mlxquant.kernels.backend import at_least


@dataclass(frozen=True)
class Scales:
    """What siblings of n inputs share: A and c (or none), flat in float32, and signs as bits (or
    none). ``experts`` is None, or the number E of experts of which A and c are, one behind the
    other; the signs are one for all of them."""

    inputs: int
    spec: ReplicaShape
    replica_in: mx.array
    column_scale: mx.array
    signs: mx.array
    experts: int | None = None

    @classmethod
    def of(cls, inputs: int, spec: ReplicaShape, replica_in: mx.array,
           column_scale: mx.array | None = None, signs: mx.array | None = None) -> "Scales":
        """Of A (n, K), grouped (n / G, K) with c (n,), or of experts' with E in front."""
        a = replica_in.astype(mx.float32).reshape(-1)
        c = mx.zeros(1) if column_scale is None else column_scale.astype(mx.float32).reshape(-1)
        bits = mx.zeros(1, mx.uint8) if signs is None else signs
        return cls(inputs, spec, at_least(a), at_least(c), at_least(bits),
                   len(replica_in) if replica_in.ndim == 3 else None)

    @property
    def groups(self) -> int:
        """Rows of one A."""
        return self.inputs // (self.spec.replica_group or 1)

    def envelope(self) -> mx.array:
        """A with c in it, (n, K) or (E, n, K): one row an input, grouped or not."""
        spec, stack = self.spec, self.experts or 1
        made = self.replica_in[:stack * self.groups * spec.replicas]
        made = made.reshape(stack, self.groups, spec.replicas)
        if spec.replica_group:
            c = self.column_scale[:stack * self.inputs].reshape(stack, -1, 1)
            made = mx.repeat(made, spec.replica_group, axis=1) * c
        return made if self.experts else made[0]

    def rotated(self, x: mx.array) -> mx.array:
        """R x of ``x`` (…, n), in float32."""
        x = x.astype(mx.float32)
        if not self.spec.rotation_block:
            return x
        return hadamard.rotate(x, hadamard.unpack_signs(self.signs, self.inputs),
                               self.spec.rotation_block)


@dataclass(frozen=True)
class Matrix:
    """``codes`` (m, chunks, b) in the kernels' order and ``replica_out`` B (m, K), of siblings the
    rows one behind the other; of experts both with E in front."""

    codes: mx.array
    replica_out: mx.array
    scales: Scales

    @property
    def rows(self) -> int:
        return int(self.codes.shape[-3])

    @property
    def chunks(self) -> int:
        return int(self.codes.shape[-2])

    @property
    def code_bits(self) -> int:
        return int(self.codes.shape[-1])

    def dense(self, experts: mx.array | None = None) -> mx.array:
        """C ∘ (B Aᵀ) in float32, which takes R x: (m, n), or (E, m, n), or (pairs, m, n) of the
        ``experts`` (pairs,) alone."""
        codes, out, inside = self.codes, self.replica_out, self.scales.envelope()
        if experts is not None:
            codes, out, inside = codes[experts], out[experts], inside[experts]
        bits, inputs = self.scales.spec.bits, self.scales.inputs
        levels = code_order.unpack(codes.reshape(-1, *codes.shape[-2:]), inputs)
        levels = bits.lowest + bits.distance * levels.astype(mx.float32)
        return levels.reshape(*out.shape[:-1], inputs) * (
            out.astype(mx.float32) @ inside.swapaxes(-1, -2))

    def product(self, x: mx.array, dtype: mx.Dtype, experts: mx.array | None = None) -> mx.array:
        """y (tokens, m) in ``dtype`` of a rotated ``x`` (tokens, n) in float32, in ``mx``
        operations: what kernels must agree with. With ``experts`` (pairs,), y (pairs, m): each
        row of x goes to as many experts in turn as there are pairs to a row."""
        if experts is None:
            return (x @ self.dense().T).astype(dtype)
        x = mx.repeat(x, len(experts) // len(x), axis=0)
        y = self.dense(experts) @ x[..., None]
        return y[..., 0].astype(dtype)

    def part(self, experts: slice) -> "Matrix":
        """Some of the experts, as a stack of their own."""
        spec, stack = self.scales.spec, self.scales.experts or 1
        a = self.scales.replica_in.reshape(stack, self.scales.groups, spec.replicas)[experts]
        c = self.scales.column_scale.reshape(stack, -1)[experts] if spec.replica_group else None
        return replace(self, codes=self.codes[experts], replica_out=self.replica_out[experts],
                       scales=Scales.of(self.scales.inputs, spec, a, c, self.scales.signs))


@dataclass(frozen=True, eq=False)
class Added:
    """What is added to a product y (tokens, m): ``bias`` (m,) and ``residual`` (tokens, m), which
    has y's dtype. A kernel adds them in float32 and rounds once."""

    bias: mx.array | None = None
    residual: mx.array | None = None

    def __call__(self, y: mx.array) -> mx.array:
        for term in (self.bias, self.residual):
            y = y if term is None else y + term.astype(y.dtype)
        return y

    def inputs(self, unread: mx.array) -> list[mx.array]:
        """Both for a kernel, with an ``unread`` array in the place of what is not there."""
        return [unread if term is None else term if term.size >= backend.SMALLEST
                else at_least(term.reshape(-1)) for term in (self.bias, self.residual)]

    def template(self) -> list[tuple[str, bool]]:
        return [("BIAS", self.bias is not None), ("RESIDUAL", self.residual is not None)]


NOTHING = Added()


@functools.lru_cache(maxsize=4096)
def sizes(*values: int) -> mx.array:
    """Numbers a kernel reads at run time, so that one compiled kernel serves every shape."""
    with mx.stream(mx.cpu):
        made = mx.array([*values, *[0] * (backend.SMALLEST - len(values))], mx.int32)
        mx.eval(made)
    return made


def float_bits(value: float) -> int:
    """A float32 as the integer of the same bits."""
    return int(struct.unpack("<i", struct.pack("<f", value))[0])
