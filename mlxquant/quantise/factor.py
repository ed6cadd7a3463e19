"""Triangular factors of second moments, and division by H with them.

H = V Vᵀ with V upper triangular, by blocks: a block on the diagonal is factored and inverted on the
host in float64; everything else is products on the device in float32. H is damped, so float32 is
exact enough. Where a device rounds its products so coarsely that a block is no longer definite, the
host factors all of H in float64.
"""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

BLOCK = 256


@dataclass(frozen=True)
class Factor:
    """V (n, n) float32 as ``upper``, and the inverses of its diagonal blocks."""

    upper: mx.array
    inverses: tuple[mx.array, ...]

    @classmethod
    def of(cls, hessian: mx.array) -> "Factor":
        """Of a definite H (n, n) float32."""
        try:
            return _by_blocks(hessian)
        except np.linalg.LinAlgError:
            exact = np.linalg.cholesky(np.array(hessian, np.float64)[::-1, ::-1])[::-1, ::-1]
            return cls(mx.array(exact.astype(np.float32)),
                       tuple(_inverse(exact[part, part]) for part in _parts(len(exact))))

    def divide(self, rows: mx.array) -> mx.array:
        """``rows`` · H⁻¹ of rows (m, n): two substitutions by blocks."""
        parts = _parts(len(self.upper))
        first: dict[int, mx.array] = {}
        for i in reversed(range(len(parts))):  # Y Vᵀ = rows
            left = rows[:, parts[i]]
            if i + 1 < len(parts):
                left = left - _joined(first, i + 1, len(parts)) @ self.upper[
                    parts[i], parts[i].stop:].T
            first[i] = left @ self.inverses[i].T
        second: dict[int, mx.array] = {}
        for i, part in enumerate(parts):  # Z V = Y
            left = first[i]
            if i:
                left = left - _joined(second, 0, i) @ self.upper[:part.start, part]
            second[i] = left @ self.inverses[i]
        return _joined(second, 0, len(parts))


def _joined(blocks: dict[int, mx.array], start: int, stop: int) -> mx.array:
    return mx.concatenate([blocks[i] for i in range(start, stop)], axis=1)


def _parts(n: int) -> list[slice]:
    """Blocks of indices; the last, where factoring begins, is whole."""
    ends = list(range(n, 0, -BLOCK))[::-1]
    return [slice(max(0, end - BLOCK), end) for end in ends]


def _inverse(block: np.ndarray) -> mx.array:
    return mx.array(np.linalg.inv(block).astype(np.float32))


def _by_blocks(hessian: mx.array) -> Factor:
    """From the last block up: its columns of V, and H without their share for the blocks before."""
    rest, columns, inverses = hessian, [], []
    for part in reversed(_parts(len(hessian))):
        above, size = part.start, part.stop - part.start
        corner = np.array(rest[above:, above:], np.float64)
        exact = np.linalg.cholesky(corner[::-1, ::-1])[::-1, ::-1]
        inverses.append(_inverse(exact))
        column = mx.zeros((above, size))
        if above:  # MLX 0.32.4 writes freed memory at an empty product
            column = rest[:above, above:] @ inverses[-1].T
            rest = rest[:above, :above] - column @ column.T
        below = mx.zeros((len(hessian) - part.stop, size))
        columns.append(mx.concatenate([column, mx.array(exact.astype(np.float32)), below]))
        mx.eval(rest, columns[-1])
    return Factor(mx.concatenate(columns[::-1], axis=1), tuple(inverses[::-1]))
