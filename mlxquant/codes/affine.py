"""Affine groups: a code q of a group stands for scale·q + bias.

``fit`` finds the scales of a whole matrix at once: a search over clipped ranges, then rounds of
nearest codes and weighted least squares, the better of the two kept per group. At one bit the two
levels are fitted like any others; the minimum and maximum, which the stock quantiser takes, are
never right there.
"""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlxquant.codes.spec import Spec, Whole
from mlxquant.codes.width import Width

_CLIPS = tuple(1 - 0.05 * step for step in range(15))
_ROUNDS = 8
SEARCHED = 1 << 24  # weights at a time: what the search computes in between is ten times as large
_Found = tuple[mx.array, mx.array, mx.array]  # scale, bias and error of each group


@dataclass(frozen=True)
class Affine:
    """Codes of shape (m, n) as uint8; scales and biases of shape (m, n / group) in float32.

    The float32 values are already rounded to the type they are stored in, so
    ``dequantise`` is what the runtime will multiply with, but for rounding to its own type.
    """

    codes: mx.array
    scales: mx.array
    biases: mx.array
    spec: Spec

    @property
    def bits(self) -> Width:
        """The width of a code."""
        return self.spec.bits

    @property
    def group(self) -> int:
        return self.codes.shape[1] // self.scales.shape[1]

    def dequantise(self) -> mx.array:
        """The matrix that the codes stand for, (m, n) float32."""
        scales, biases = self.grid()
        return scales * self.codes.astype(mx.float32) + biases

    def grid(self) -> tuple[mx.array, mx.array]:
        """(scale, bias), each (m, n): code q of an entry stands for scale·q + bias."""
        return expand(self.scales, self.group), expand(self.biases, self.group)

    def rows(self, part: slice) -> "Affine":
        """Some of the rows."""
        return Affine(self.codes[part], self.scales[part], self.biases[part], self.spec)

    def own_bits(self) -> int:
        """Bits of packed codes, scales and biases, the latter in 16."""
        rows, columns = self.codes.shape
        return 32 * (rows * -(-columns * self.bits.code_bits // 32) + self.scales.size)

    def tensors(self, dtype: mx.Dtype) -> dict[str, mx.array]:
        """The parameters of MLX's own layer."""
        return {"weight": self.packed(), "scales": self.scales.astype(dtype),
                "biases": self.biases.astype(dtype)}

    def packed(self) -> mx.array:
        """Codes in MLX's order: a little-endian bit stream in uint32 per row."""
        return pack(self.codes, self.bits.code_bits)


def expand(per_group: mx.array, group: int) -> mx.array:
    """Repeat each group's value over its columns: (m, n / group) → (m, n)."""
    return mx.repeat(per_group, group, axis=1)


def nearest(weight: mx.array, scales: mx.array, biases: mx.array, levels: int) -> mx.array:
    """The nearest code of every weight, as float32; shapes broadcast."""
    safe = mx.where(scales == 0, 1.0, scales)
    return mx.clip(mx.round((weight - biases) / safe), 0, levels - 1)


def fit(weight: mx.array, spec: Spec, importance: mx.array | None = None,
        dtype: mx.Dtype = mx.float16) -> Affine:
    """Codes and scales of ``weight`` (m, n) that minimise the squared error.

    ``importance`` (n,) weights each column's error, for instance by diag(H). Scales and biases are
    rounded to ``dtype``. Raises ``BadValue`` if the groups do not divide n.
    """
    rows, columns = weight.shape
    group, weight = spec.group_for(columns), weight.astype(mx.float32)
    h = mx.ones((columns,)) if importance is None else importance / importance.mean()
    h = mx.maximum(h, 1e-6)
    if spec.group_size is Whole.MATRIX:
        found = _search(weight.reshape(1, 1, -1), mx.tile(h, rows)[None], spec, dtype)
    else:
        step = max(1, SEARCHED // columns)
        parts = [_search(weight[i:i + step].reshape(-1, columns // group, group),
                         h.reshape(-1, group), spec, dtype) for i in range(0, rows, step)]
        found = tuple(mx.concatenate(each) for each in zip(*parts))
    scales, biases = (mx.contiguous(mx.broadcast_to(x, (rows, columns // group))) for x in found)
    codes = nearest(weight, expand(scales, group), expand(biases, group), spec.bits.levels)
    result = Affine(codes.astype(mx.uint8), scales, biases, spec)
    mx.eval(result.codes, result.scales, result.biases)
    return result


def pack(codes: mx.array, bits: int) -> mx.array:
    """Codes (m, n) to a little-endian bit stream (m, ⌈n·bits / 32⌉) of uint32, zeros at the end."""
    return mx.array(pack_words(np.array(codes, np.uint8), bits))


def pack_words(codes: np.ndarray, bits: int) -> np.ndarray:
    """``pack`` for NumPy: so many codes at a time that they fill whole octets."""
    rows, columns = codes.shape
    per = 8 // bits if bits in (1, 2, 4, 8) else 8
    codes = np.pad(codes, [(0, 0), (0, -columns % per)]) if columns % per else codes
    parts = codes.reshape(rows, -1, per)
    word = np.dtype(np.uint8 if per * bits == 8 else "<u8")
    packed: np.ndarray = parts[..., 0].astype(word)
    for place in range(1, per):
        packed |= np.left_shift(parts[..., place], bits * place, dtype=word)
    octets = packed.view(np.uint8).reshape(rows, packed.shape[1], -1)
    stream = octets[..., :per * bits // 8].reshape(rows, -1)
    words = np.zeros((rows, -(-columns * bits // 32)), np.uint32)
    size = min(words.shape[1] * 4, stream.shape[1])
    words.view(np.uint8)[:, :size] = stream[:, :size]
    return words


def unpack(packed: mx.array, bits: int, columns: int) -> mx.array:
    """The inverse of ``pack``: codes (m, columns) as uint8. Lazy, so that it can be traced."""
    octets = packed.view(mx.uint8)  # eight codes fill ``bits`` of them, at any width
    octets = mx.pad(octets, [(0, 0), (0, -octets.shape[1] % bits)]).reshape(len(packed), -1, bits)
    word = mx.uint32 if bits <= 4 else mx.uint64
    eight = octets[..., 0].astype(word)
    for place in range(1, bits):
        eight = eight | octets[..., place].astype(word) << 8 * place
    codes = eight[..., None] >> bits * mx.arange(8, dtype=word) & (1 << bits) - 1
    return codes.astype(mx.uint8).reshape(len(packed), -1)[:, :columns]


def _search(w: mx.array, h: mx.array, spec: Spec, dtype: mx.Dtype) -> tuple[mx.array, ...]:
    """The best (scale, bias) (R, C) for groups of weights w (R, C, group), errors weighted by
    h (C, group)."""
    low, high = w.min(-1, keepdims=True), w.max(-1, keepdims=True)
    if spec.mirrored:
        high = mx.maximum(high, -low)
        low = -high
    scale = (high - low) / (spec.bits.levels - 1)
    best = _tried(w, h, scale, low, spec, dtype)
    for clip in _CLIPS[1:]:
        best = _better(best, _tried(w, h, clip * scale, clip * low, spec, dtype))
    found, moving = [x.reshape(-1, 1) for x in best], mx.arange(low.size)
    for _ in range(_ROUNDS):
        # A group that one round does not improve, no later round does: few groups are left soon.
        some, weights = w.reshape(-1, w.shape[-1])[moving], h[moving % len(h)]
        old = found[0][moving], found[1][moving], found[2][moving]
        codes = nearest(some, old[0], old[1], spec.bits.levels)
        new = _tried(some, weights, *_least_squares(some, weights, codes, spec), spec, dtype)
        for values, value in zip(found, _better(old, new)):
            values[moving] = value
        better = new[2] < old[2]
        mx.eval(found, better)
        moving = mx.array(np.array(moving)[np.array(better)[:, 0]])
        if not moving.size:
            break
    return found[0].reshape(low.shape[:2]), found[1].reshape(low.shape[:2])


def _least_squares(w: mx.array, h: mx.array, codes: mx.array,
                   spec: Spec) -> tuple[mx.array, mx.array]:
    """Scale and bias that minimise Σ h·(w − scale·q − bias)² for fixed codes."""
    if spec.mirrored:
        centred = codes - (spec.bits.levels - 1) / 2
        scale = (h * centred * w).sum(-1, keepdims=True) / mx.maximum(
            (h * centred * centred).sum(-1, keepdims=True), 1e-12)
        return scale, -scale * (spec.bits.levels - 1) / 2
    total = h.sum(-1, keepdims=True)
    mean_q, mean_w = ((h * x).sum(-1, keepdims=True) / total for x in (codes, w))
    centred = codes - mean_q
    variance = (h * mx.square(centred)).sum(-1, keepdims=True)
    products = (h * centred * (w - mean_w)).sum(-1, keepdims=True)
    scale = products / mx.maximum(variance, 1e-12)
    return scale, mean_w - scale * mean_q


def _tried(w: mx.array, h: mx.array, scale: mx.array, bias: mx.array, spec: Spec,
           dtype: mx.Dtype) -> _Found:
    """The scale and bias as ``dtype`` holds them, and the error that the nearest codes leave."""
    scale, bias = (x.astype(dtype).astype(mx.float32) for x in (scale, bias))
    missed = w - scale * nearest(w, scale, bias, spec.bits.levels) - bias
    return scale, bias, (h * mx.square(missed)).sum(-1, keepdims=True)


def _better(one: _Found, other: _Found) -> _Found:
    """For each group, the grid with the smaller error."""
    wins = other[2] < one[2]
    scale, bias, error = (mx.where(wins, b, a) for a, b in zip(one, other))
    return scale, bias, error
