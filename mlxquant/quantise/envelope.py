"""Scalings of one set of codes: W ≈ C ∘ (B Aᵀ), found by alternating least squares.

For fixed codes the error is linear in each of B and A, so a row of B, and a row of A, is the
solution of K equations. Errors are weighted by diag(H) over inputs. It starts from the rank-K
approximation of |W|, by subspace iteration (Halko et al. 2011, https://arxiv.org/abs/0909.4061),
times what fits the levels: without that factor four bits end at twice the error.
"""

from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from mlxquant.codes.affine import nearest
from mlxquant.codes.packing import empty_codes
from mlxquant.codes.spec import ReplicaShape
from mlxquant.codes.width import Width
from mlxquant.quantise.profile import step

ROUNDS = 8
_START = {Width.ONE: 1.0, Width.TERNARY: 1.3, Width.TWO: 1.2, Width.THREE: 0.6, Width.FOUR: 0.33}
_RIDGE = 1e-5


@dataclass(frozen=True)
class Replicas:
    """Codes (m, n) uint8 as indices of levels, ``replica_out`` B (m, K), and A as ``replica_in``
    (n, K) or, with a factor for each input as ``column_scale`` (n,), (n / G, K); scales in float32,
    as they will be stored once ``rounded``."""

    codes: mx.array
    replica_out: mx.array
    replica_in: mx.array
    column_scale: mx.array | None
    bits: Width

    @property
    def group(self) -> int:
        """Inputs that share a row of A: G, or 1."""
        return self.codes.shape[1] // len(self.replica_in)

    def per_group(self, by_input: mx.array) -> mx.array:
        """Sums over the inputs that share a row of A: (n, k) → (n / G, k)."""
        return by_input.reshape(-1, self.group, by_input.shape[1]).sum(1)

    def inputs(self) -> mx.array:
        """A (n, K)."""
        a = mx.repeat(self.replica_in, self.group, axis=0)
        return a if self.column_scale is None else a * self.column_scale[:, None]

    def scales(self) -> mx.array:
        """B Aᵀ, (m, n)."""
        return self.replica_out @ self.inputs().T

    def levels(self) -> mx.array:
        """C, (m, n) float32."""
        return self.bits.lowest + self.bits.distance * self.codes.astype(mx.float32)

    def dequantise(self) -> mx.array:
        """C ∘ (B Aᵀ), (m, n) float32: the matrix that multiplies the rotated input."""
        return self.levels() * self.scales()

    def grid(self) -> tuple[mx.array, mx.array]:
        """(scale, bias), each (m, n): code q of an entry stands for scale·q + bias."""
        scales = self.scales()
        return self.bits.distance * scales, self.bits.lowest * scales

    def own_bits(self) -> int:
        """Bits of packed codes, and of the outputs' scales in 16."""
        return 8 * empty_codes(self.codes.shape, self.bits).nbytes + 16 * self.replica_out.size

    def shared_bits(self) -> int:
        """Bits of the inputs' scales in 16, which siblings share."""
        factors = 0 if self.column_scale is None else self.column_scale.size
        return 16 * (self.replica_in.size + factors)

    def rounded(self, dtype: mx.Dtype) -> "Replicas":
        """The scales as ``dtype`` holds them."""
        names = ("replica_out", "replica_in", "column_scale")
        return replace(self, **{name: value.astype(dtype).astype(mx.float32) for name in names
                                if (value := getattr(self, name)) is not None})

    def rows(self, part: slice) -> "Replicas":
        """Some of the rows."""
        return replace(self, codes=self.codes[part], replica_out=self.replica_out[part])


@step("fit")
def leading(weight: mx.array, replicas: int, importance: mx.array) -> tuple[mx.array, mx.array]:
    """B (m, K), A (n, K) of the weighted rank-K approximation of |W|. The first columns are near
    those of fewer replicas, so one start serves several fits."""
    root = mx.sqrt(_scaled(importance))
    size = mx.abs(weight) * root
    basis = mx.random.normal((weight.shape[1], replicas), key=mx.random.key(0))
    basis[:, 0] = 1.0
    for _ in range(6):
        basis = _orthonormal(size.T @ (size @ basis))
    return size @ basis, basis / root[:, None]


@step("fit")
def fit(weight: mx.array, shape: ReplicaShape, importance: mx.array, rounds: int = ROUNDS,
        start: tuple[mx.array, mx.array] | None = None) -> Replicas:
    """Codes and scales of ``weight`` (m, n) that lower Σ importance_j · error_ij², importance (n,).

    A group of inputs that share a row of A have a factor each. Without groups no round raises the
    error. ``start`` are ``leading`` directions, of at least as many replicas, if they are known.
    """
    bits, replicas, group = shape.bits, shape.replicas, shape.replica_group
    first = start or leading(weight, replicas, importance)
    out, inside = (part[:, :replicas] for part in first)
    importance = _scaled(importance)
    if group:
        inside = inside.reshape(-1, group, replicas).mean(1)
    found = Replicas(mx.zeros(weight.shape, mx.uint8), _START[bits] * out, inside,
                     mx.ones(weight.shape[1]) if group else None, bits)
    for _ in range(rounds):
        found = _nearest_codes(weight, found)
        # The fit of B depends only on the span of A's columns, and the other way round: with
        # orthonormal columns float32 solves the small systems well.
        found = replace(found, replica_in=_orthonormal(found.replica_in))
        found = replace(found, replica_out=_fit_outputs(weight, found, importance))
        found = replace(found, replica_out=_orthonormal(found.replica_out))
        found = _fit_inputs(weight, found)
        mx.eval(found.replica_out, found.replica_in)
    return _nearest_codes(weight, found)


def _scaled(importance: mx.array) -> mx.array:
    return mx.maximum(importance / importance.mean(), 1e-6)


def _nearest_codes(weight: mx.array, found: Replicas) -> Replicas:
    codes = nearest(weight, *found.grid(), found.bits.levels)
    return replace(found, codes=codes.astype(mx.uint8))


def solve(matrix: mx.array, target: mx.array) -> mx.array:
    """x with matrix · x = target for many small systems, (r, K, K) and (r, K), K ≤ 16.

    Gauss–Jordan without pivots, which positive definite matrices do not need, in ``mx`` operations:
    MLX's own solvers run on the CPU only. A ridge keeps systems of lower rank solvable.
    """
    size = target.shape[1]
    diagonal = mx.diagonal(matrix, axis1=1, axis2=2).mean(1)
    ridge = mx.maximum(_RIDGE * diagonal, 1e-30)[:, None, None] * mx.eye(size)
    system = mx.concatenate([matrix + ridge, target[..., None]], axis=2)
    for k in range(size):
        pivot = system[:, k:k + 1] / system[:, k:k + 1, k:k + 1]
        others = (mx.arange(size) != k)[None, :, None]
        system = mx.where(others, system - system[:, :, k:k + 1] * pivot, pivot)
    return system[..., -1]


def _orthonormal(columns: mx.array) -> mx.array:
    """Orthonormal columns of the same span: Cholesky QR, twice for accuracy (Fukaya et al. 2014,
    https://doi.org/10.1109/ScalA.2014.11). The K × K factors are computed on the host in float64,
    and products as elementwise sums, because devices may round matrix products more coarsely."""
    for _ in range(2):
        columns = columns / mx.maximum(mx.linalg.norm(columns, axis=0), 1e-20)
        inner = np.array(_outer(columns).sum(0), np.float64).reshape(columns.shape[1], -1)
        # With fewer rows than columns an eigenvalue is zero, and rounding takes it below.
        ridge = max(1e-6, -10 * np.linalg.eigvalsh(inner)[0])
        lower = np.linalg.cholesky(inner + ridge * np.eye(len(inner)))
        upper = np.linalg.inv(lower).T.astype(np.float32)
        columns = (columns[:, :, None] * mx.array(upper)).sum(1)
    return columns


def _outer(a: mx.array) -> mx.array:
    """a_k a_l of every row: (r, K) → (r, K²)."""
    return (a[:, :, None] * a[:, None, :]).reshape(len(a), -1)


def _fit_outputs(weight: mx.array, found: Replicas, importance: mx.array) -> mx.array:
    """B for fixed codes and A."""
    levels, inside = found.levels(), found.inputs()
    count = inside.shape[1]
    matrix = ((levels * levels) * importance) @ _outer(inside)
    target = (levels * weight * importance) @ inside
    return solve(matrix.reshape(-1, count, count), target)


def _fit_inputs(weight: mx.array, found: Replicas) -> Replicas:
    """A, or the groups' rows of A and then the factor of each input, for fixed codes and B.

    Importance is left out: without groups it only scales an input's equation, and changes nothing;
    within a group all inputs count alike.
    """
    levels, out = found.levels(), found.replica_out
    count = out.shape[1]
    matrix = (levels * levels).T @ _outer(out)
    target = (levels * weight).T @ out
    if found.column_scale is not None:
        factor = found.column_scale[:, None]
        matrix = found.per_group(matrix * factor * factor)
        target = found.per_group(target * factor)
    found = replace(found, replica_in=solve(matrix.reshape(-1, count, count), target))
    if found.column_scale is None:
        return found
    plain = replace(found, column_scale=None).dequantise()
    factor = (plain * weight).sum(0) / mx.maximum((plain * plain).sum(0), 1e-20)
    return replace(found, column_scale=factor)
