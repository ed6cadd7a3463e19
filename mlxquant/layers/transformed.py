"""A linear layer whose input is scaled, rotated or rounded first.

The input scale carries what AWQ (https://arxiv.org/abs/2306.00978) and
SmoothQuant (https://arxiv.org/abs/2211.10438) move from weights to inputs; the
rotation is that of ``codes/hadamard.py``.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxquant.base.errors import BadValue, Unsupported
from mlxquant.codes.hadamard import check_block, pack_signs, rotate, unrotate_weight
from mlxquant.layers.blocks import shape_of
from mlxquant.layers.grouped import GroupedLinear
from mlxquant.layers.memo import Signs

GRANULARITIES = ("token", "tensor", "static")
_OFF = 16
_ENTRY = ("input_scale", "rotation_block", "activation")


@dataclass(frozen=True)
class ActivationSpec:
    """How activations are rounded: to the symmetric integers of ``bits``, 2 to 16; 16 is off.

    One step is max |x| / (2^(bits−1) − 1), the maximum taken over each token (the
    last axis) or over the whole tensor at hand; ``"static"`` takes a step that was
    found in calibration. Raises ``BadValue`` for what is not allowed.
    """

    bits: int = 8
    granularity: str = "token"

    def __post_init__(self) -> None:
        if type(self.bits) is not int or not 2 <= self.bits <= _OFF:
            raise BadValue(f"activation bits are {self.bits!r}, allowed are 2 to 16 (16: off)")
        if self.granularity not in GRANULARITIES:
            raise BadValue(f"activation granularity is {self.granularity!r}, "
                           f"allowed are {', '.join(GRANULARITIES)}")

    @property
    def off(self) -> bool:
        return self.bits == _OFF

    @property
    def largest(self) -> int:
        """The largest integer, 2^(bits−1) − 1; the smallest is its negative."""
        return 2 ** (self.bits - 1) - 1


def round_activation(x: mx.array, spec: ActivationSpec,
                     scale: mx.array | None = None) -> tuple[mx.array, mx.array]:
    """Integers of ``x`` (…, n), held in float32, and the step they are to be multiplied by.

    The step has shape (…, 1) per token, (1,) otherwise; ``scale`` (1,) is that of a
    static spec. Values beyond the largest integer are clipped to it.
    """
    x = x.astype(mx.float32)
    if spec.granularity == "static":
        if scale is None:
            raise BadValue("a static activation needs its scale, (1,)")
        step = scale.astype(mx.float32)
    elif spec.granularity == "tensor":
        step = mx.abs(x).max()[None] / spec.largest
    else:
        step = mx.abs(x).max(-1, keepdims=True) / spec.largest
    codes = mx.round(x / mx.where(step == 0, 1.0, step))  # all zeros have no step: codes of zero
    return mx.clip(codes, -spec.largest, spec.largest), step


class TransformedLinear(nn.Module):
    """y = linear(Q(R (x · input_scale))), each of Q, R and the scale left out where not given.

    ``linear`` is a ``Linear``, ``QuantizedLinear`` or ``GroupedLinear`` of n inputs;
    ``input_scale`` (n,) multiplies the input; ``rotation_signs`` (n,) of ±1 and
    ``rotation_block`` make R (see ``codes/hadamard.py``), and are kept as bits;
    ``activation`` makes Q, a static one with ``activation_scale`` as its step.

    Q is a simulation, exact in what it rounds to: integers held in float32 are
    multiplied by their step, and the product, rounded to the input's dtype, enters
    an ordinary linear layer. No integer product runs, so it is never faster.

    Raises ``BadValue`` for shapes and values that do not fit and ``Unsupported``
    for another kind of inner layer.
    """

    def __init__(self, linear: nn.Module, input_scale: mx.array | None = None,
                 rotation_signs: mx.array | None = None, rotation_block: int | None = None,
                 activation: ActivationSpec | None = None, activation_scale: float | None = None):
        super().__init__()
        self.linear = linear
        self.inputs = _inputs(linear)
        self.rotation_block = rotation_block
        self.activation: ActivationSpec | None = None
        self._signs = Signs(self.inputs)
        if input_scale is not None:
            self.input_scale = _checked("input_scale", input_scale, self.inputs)
        if (rotation_signs is None) != (rotation_block is None):
            raise BadValue("a rotation needs both rotation_signs and rotation_block")
        if rotation_block is not None:
            check_block(self.inputs, rotation_block)
            signs = _checked("rotation_signs", rotation_signs, self.inputs)
            self.rotation_signs = pack_signs(signs)
            self.freeze(recurse=False, keys="rotation_signs")  # bits have no gradient
        if activation is None or activation.off:
            return
        self.activation = activation
        if activation.granularity == "static":
            if activation_scale is None or not 0 < activation_scale < math.inf:
                raise BadValue(f"activation scale is {activation_scale!r}; a static activation "
                               "needs its scale, a positive number")
            self.activation_scale = mx.array([float(activation_scale)])

    @classmethod
    def from_config(cls, inner: nn.Module, entry: dict[str, Any]) -> "TransformedLinear":
        """The layer that ``entry``, from ``describe``, stands for, around ``inner``.

        Its parameters are zeros of the right shapes, to be loaded by name. Raises ``BadValue`` or
        ``Unsupported`` for an entry that makes no layer.
        """
        if not isinstance(entry, dict) or entry.keys() - set(_ENTRY):
            raise Unsupported(f"transform {entry!r} is not known; "
                              f"its keys may be {', '.join(_ENTRY)}")
        scaled = entry.get("input_scale", False)
        if not isinstance(scaled, bool):
            raise BadValue(f"input_scale is {scaled!r} in a transform, allowed are true and false")
        inputs = _inputs(inner)
        block = entry.get("rotation_block")
        layer = cls(inner, input_scale=mx.zeros(inputs) if scaled else None,
                    rotation_signs=None if block is None else mx.ones(inputs), rotation_block=block,
                    activation=_activation_from(entry.get("activation")), activation_scale=1.0)
        if "activation_scale" in layer:
            layer.activation_scale = mx.zeros(1)
        return layer

    def describe(self) -> dict[str, Any]:
        """What ``from_config`` needs beside the parameters, for JSON."""
        return {"input_scale": "input_scale" in self, "rotation_block": self.rotation_block,
                "activation": self.activation and asdict(self.activation)}

    def transform(self, x: mx.array) -> mx.array:
        """Q(R (x · input_scale)) of ``x`` (…, n), in its dtype: what the inner layer takes."""
        if "input_scale" in self:
            x = x * self.input_scale.astype(x.dtype)
        if self.rotation_block is not None:
            x = rotate(x, self._signs.get(self.rotation_signs, x.dtype), self.rotation_block)
        if self.activation is not None:
            codes, step = round_activation(x, self.activation, self.get("activation_scale"))
            x = (codes * step).astype(x.dtype)
        return x

    def untransform_weight(self, weight: mx.array) -> mx.array:
        """W R diag(input_scale) of ``weight`` W (m, n), in its dtype: it multiplies x where W
        multiplies the transformed input, without Q."""
        if self.rotation_block is not None:
            signs = self._signs.get(self.rotation_signs, weight.dtype)
            weight = unrotate_weight(weight, signs, self.rotation_block)
        return weight * self.input_scale.astype(weight.dtype) if "input_scale" in self else weight

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear(self.transform(x))


def _inputs(linear: nn.Module) -> int:
    if not isinstance(linear, (nn.Linear, nn.QuantizedLinear, GroupedLinear)):
        raise Unsupported(f"a transform cannot wrap {type(linear).__name__}; "
                          "it wraps Linear, QuantizedLinear and GroupedLinear")
    return shape_of(linear)[-1]


def _checked(name: str, array: mx.array, n: int) -> mx.array:
    if array.shape != (n,):
        raise BadValue(f"{name} has shape {array.shape}, allowed is ({n},), one per input")
    return array


def _activation_from(entry: dict[str, Any] | None) -> ActivationSpec | None:
    if entry is None:
        return None
    if not isinstance(entry, dict) or entry.keys() - {"bits", "granularity"}:
        raise Unsupported(f"activation {entry!r} is not known; its keys may be bits, granularity")
    return ActivationSpec(**entry)
