"""What kernels read of a replicated layer: the scales of its input, and a matrix of codes or the
matrices of a mixture's experts."""

import functools
import struct
from dataclasses import dataclass, replace

import mlx.core as mx

from mlxquant.codes import hadamard
from mlxquant.codes.spec import ReplicaShape
from mlxquant.kernels import backend, code_order


@dataclass(frozen=True)
class Scales:
    """What siblings of n inputs share: A (n, K), or grouped A (n / G, K) and c (n,), in float32,
    and the signs of a rotation, if there is one, as bits. For a mixture of E experts, A and c have
    a leading axis E; the signs are common to all experts."""

    inputs: int
    spec: ReplicaShape
    replica_in: mx.array
    column_scale: mx.array | None = None
    signs: mx.array | None = None

    @property
    def experts(self) -> int | None:
        return len(self.replica_in) if self.replica_in.ndim == 3 else None

    def for_kernel(self) -> list[mx.array]:
        """A, c and signs; in the place of a missing one, an array that the kernel does not read."""
        a = self.replica_in
        return [a, a if self.column_scale is None else self.column_scale,
                unread(mx.uint8) if self.signs is None else self.signs]

    def envelope(self) -> mx.array:
        """A with c in it, (n, K) or (E, n, K): one row an input, grouped or not."""
        made = mx.repeat(self.replica_in, self.spec.replica_group or 1, axis=-2)
        return made if self.column_scale is None else made * self.column_scale[..., None]

    def rotated(self, x: mx.array) -> mx.array:
        """R x of ``x`` (…, n), in float32."""
        x = x.astype(mx.float32)
        if self.signs is None:
            return x
        return hadamard.rotate(x, hadamard.unpack_signs(self.signs, self.inputs),
                               self.spec.rotation_block)


@dataclass(frozen=True)
class Matrix:
    """``codes`` (m, chunks, b) in the kernels' order and ``replica_out`` B (m, K). The rows of
    siblings are concatenated; for experts both arrays have a leading axis E."""

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
        """C ∘ (B Aᵀ) in float32, the matrix that multiplies R x: (m, n), or (E, m, n), or
        (pairs, m, n) for the given ``experts`` (pairs,)."""
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
        operations: what kernels must agree with. With ``experts`` (pairs,), y is (pairs, m): each
        row of x is used for the next pairs / tokens entries of ``experts``."""
        if experts is None:
            return (x @ self.dense().T).astype(dtype)
        x = mx.repeat(x, len(experts) // len(x), axis=0)
        y = self.dense(experts) @ x[..., None]
        return y[..., 0].astype(dtype)

    def part(self, experts: slice) -> "Matrix":
        """Some of the experts, as a stack of their own."""
        c = self.scales.column_scale
        return replace(self, codes=self.codes[experts], replica_out=self.replica_out[experts],
                       scales=replace(self.scales, replica_in=self.scales.replica_in[experts],
                                      column_scale=None if c is None else c[experts]))


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

    def inputs(self, dtype: mx.Dtype) -> list[mx.array]:
        """Bias and residual for a kernel whose outputs are ``dtype``; in the place of a missing
        one, an array that the kernel does not read."""
        return [unread(dtype) if term is None else term for term in (self.bias, self.residual)]

    @property
    def flags(self) -> int:
        """Which terms there are, as bits that a kernel reads at run time: 1 bias, 2 residual."""
        return (self.bias is not None) + 2 * (self.residual is not None)

    def types(self, dtype: mx.Dtype) -> list[tuple[str, mx.Dtype]]:
        """For a kernel's template the types of these inputs (``backend.Kernel``)."""
        return [(name, given.dtype) for name, given in zip(("BIAS", "RESIDUAL"),
                                                           self.inputs(dtype))]


NOTHING = Added()


@functools.lru_cache(maxsize=4096)
def sizes(*values: int) -> mx.array:
    """Numbers a kernel reads at run time, so that one compiled kernel serves every shape."""
    with mx.stream(mx.cpu):
        made = mx.array([*values, *[0] * (backend.SMALLEST - len(values))], mx.int32)
        mx.eval(made)
    return made


@functools.cache
def unread(dtype: mx.Dtype) -> mx.array:
    """An array that a kernel is given and does not read."""
    made = mx.zeros(backend.SMALLEST, dtype)
    mx.eval(made)
    return made


def float_bits(value: float) -> int:
    """A float32 as the integer of the same bits."""
    return int(struct.unpack("<i", struct.pack("<f", value))[0])
