"""Tensors as checkpoints store them, made into what mlx-lm's models take, or refused by name.

DeepSeek, Qwen and others publish weights in 8-bit floats with one scale for each block of 128 × 128
(``weight_scale_inv``), a float or a power of two. Some of mlx-lm's models know that form, others
would compute with the codes.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxquant.base.errors import BadCheckpoint, Unsupported
from mlxquant.layers import formats
from mlxquant.sources import checkpoint

Weights = dict[str, mx.array]
_SCALE = "_scale_inv"
_BLOCK = (128, 128)
_PACKED = (32, 32)  # blocks that mlx-lm keeps in 8 bits, as mxfp8


def model_classes(folder: Path) -> Callable[[dict[str, Any]], tuple[Any, Any]]:
    """mlx-lm's hook (``formats.model_classes``) for a network that first decodes its tensors."""

    def classes(config: dict[str, Any]) -> tuple[Any, Any]:
        make, arguments = formats.model_classes(config)

        def build(given: Any) -> nn.Module:
            network = make(given)
            own = getattr(network, "sanitize", lambda weights: weights)

            def sanitize(weights: Weights) -> Weights:
                del network.sanitize  # which refers to the network, and would keep all its weights
                return own(_decoded(weights, config, folder))

            # mlx-lm hands the stored tensors to this method, and to nothing else before.
            network.sanitize = sanitize
            return network

        return build, arguments

    return classes


def require_numbers(network: nn.Module, folder: Path) -> None:
    """Raise ``Unsupported`` where a matrix or an embedding holds codes in no form that is known."""
    for path, module in network.named_modules():
        weight = module.get("weight") if hasattr(module, "to_quantized") else None
        if weight is not None and not mx.issubdtype(weight.dtype, mx.floating):
            header = checkpoint.validate(folder).get(f"{path}.weight")
            kind = header.dtype if header else str(weight.dtype).removeprefix("mlx.core.")
            raise Unsupported(f"{folder}: {path}.weight holds codes of type {kind} without scales; "
                              "weights must be floats or in a form that MLX packs")


def _decoded(weights: Weights, config: dict[str, Any], folder: Path) -> Weights:
    """``weights`` with 8-bit floats that have scales expanded to bfloat16."""
    scales = {name: array for name, array in weights.items() if name.endswith(_SCALE)}
    form = config.get("quantization_config") or {}
    block = tuple(form.get("weight_block_size") or _BLOCK)
    if not scales or (block == _PACKED and form.get("scale_fmt") == "ue8m0"):
        return weights
    made = {name: array for name, array in weights.items() if name not in scales}
    headers = checkpoint.validate(folder)
    for name, scale in scales.items():
        target = name.removesuffix(_SCALE)
        if target not in made or headers[target].dtype != "F8_E4M3":
            raise BadCheckpoint(f"{folder}: {name} has no 8-bit floats (F8_E4M3) to scale")
        if headers[name].dtype == "F8_E8M0":
            scale = _powers(scale)
        elif not mx.issubdtype(scale.dtype, mx.floating):
            raise Unsupported(f"{folder}: {name} holds scales of type {headers[name].dtype}; "
                              "they must be floats or powers of two (F8_E8M0)")
        try:
            made[target] = _scaled(made[target], scale, block)
        except ValueError as error:
            raise Unsupported(f"{folder}: {name} of shape {list(scale.shape)} does not scale "
                              f"{list(made[target].shape)} in blocks of {block}") from error
    # Weights that are written from here on are not in this form.
    config.pop("quantization_config", None)
    return made


def _powers(exponents: mx.array) -> mx.array:
    """2^(x − 127) float32 of bytes x, which are a float's exponent; infinite for 255."""
    return mx.view(mx.left_shift(exponents.astype(mx.uint32), 23), mx.float32)


def _scaled(codes: mx.array, scale: mx.array, block: tuple[int, ...]) -> mx.array:
    """bfloat16 of 8-bit floats (…, m, n) times scales of blocks (…, ⌈m / rows⌉, ⌈n / columns⌉), of
    experts (e, 1, 1) or of the whole; raises ``ValueError`` for other shapes."""
    wide = scale.astype(mx.float32)
    if scale.ndim >= 2 and scale.shape[-2:] != (1, 1):
        for axis, size in zip((-2, -1), block):
            if scale.shape[axis] != -(-codes.shape[axis] // size):
                raise ValueError
            wide = mx.repeat(wide, size, axis=axis)
        wide = wide[..., :codes.shape[-2], :codes.shape[-1]]
    values = mx.from_fp8(codes, dtype=mx.float32)
    return (values * wide).astype(mx.bfloat16)
