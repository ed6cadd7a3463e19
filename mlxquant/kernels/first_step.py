"""What a block does to an input before a matrix reads it: a norm or a gate.

Calling a step computes it with MLX's operations. ``prepare_input`` computes the same in float32,
in the dispatch that prepares the input. It rounds a norm where MLX's RMSNorm does, to ``dtype``
before and after the weight; it rounds SwiGLU once, at the end, where mlx-lm rounds every step.
"""

from dataclasses import dataclass

import mlx.core as mx
from mlx_lm.models.activations import swiglu


class AsIs:
    """No step: x (tokens, n) itself.

    ``kernel`` is the check that must agree before the fused form is used.
    """

    kernel = "prepare_input"

    def __call__(self, x: mx.array) -> mx.array:
        return x

    def dtype(self, x: mx.array) -> mx.Dtype:
        """The type of what comes out."""
        return x.dtype


@dataclass(frozen=True, eq=False)
class Norm(AsIs):
    """RMSNorm: x · rsqrt(mean(x²) + eps) ∘ weight, of x (tokens, n) and ``weight`` (n,)."""

    weight: mx.array
    eps: float
    kernel = "prepare_input_normed"

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, self.weight, self.eps)

    def dtype(self, x: mx.array) -> mx.Dtype:
        return mx.result_type(x, self.weight)


class Gate(AsIs):
    """SwiGLU: silu(gate) ∘ up, of [gate | up] (tokens, 2 n)."""

    kernel = "prepare_input_gated"

    def __call__(self, x: mx.array) -> mx.array:
        return swiglu(*mx.split(x, 2, axis=-1))


AS_IS = AsIs()
