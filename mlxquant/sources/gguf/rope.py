"""Scalings of rotary position embeddings, from GGUF's metadata and tensors to mlx-lm's form."""

import math
from typing import Any

import numpy as np

from mlxquant.base.errors import BadCheckpoint, Unsupported
from mlxquant.sources.gguf.architectures import Architecture
from mlxquant.sources.gguf.reader import Fields, GGUFModel

FREQUENCIES = "rope_freqs.weight"
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
TENSORS = (FREQUENCIES, LONG, SHORT)
_Config = dict[str, Any]


def scaling(file: GGUFModel, architecture: Architecture, config: _Config, field: Fields) -> _Config:
    """Entries of config.json: none, or ``rope_scaling`` and what belongs to it. Raises
    ``Unsupported`` for a scaling that mlx-lm's model of this architecture does not have."""
    kind = file.metadata.get(f"{field.prefix}rope.scaling.type", "none")
    field.asked |= {f"rope.scaling.{n}" for n in ("type", "finetuned", "original_context_length")}
    if FREQUENCIES in file.tensors:
        kind = "llama3"
    elif LONG in file.tensors:
        kind = "longrope"
    if kind == "none":
        field.asked.add("rope.scaling.factor")
        return {}
    if kind not in architecture.ropes:
        raise Unsupported(f"{file.path}: rope scaling {kind!r}; supported for "
                          f"{field.prefix[:-1]}: {', '.join(architecture.ropes) or 'none'}")
    made = {"type": kind, "rope_type": kind}
    if kind == "llama3":
        return {"rope_scaling": made | _llama3(file, config, field)}
    if kind == "longrope":
        return _longrope(file, made, config, field)
    made["factor"] = float(field("rope.scaling.factor", (int, float)))
    if kind == "yarn":
        made["original_max_position_embeddings"] = field("rope.scaling.original_context_length")
        for key in ("beta_fast", "beta_slow"):
            value = field(f"rope.scaling.yarn_{key}", (int, float), default=None)
            made |= {} if value is None else {key: value}
    return {"rope_scaling": made}


def _longrope(file: GGUFModel, made: _Config, config: _Config, field: Fields) -> _Config:
    half = int(config["head_dim"] * config["partial_rotary_factor"]) // 2
    original = field("rope.scaling.original_context_length")
    expected, factor = 1.0, config["max_position_embeddings"] / original
    if factor > 1 and original > 1:
        expected = math.sqrt(1 + math.log(factor) / math.log(original))
    stated = field("rope.scaling.attn_factor", float, default=expected)
    if abs(stated - expected) > 1e-3:
        raise Unsupported(f"{file.path}: longrope with attention factor {stated}; "
                          f"mlx-lm computes {expected:.4f}")
    made |= {"long_factor": _values(file, LONG, half).tolist(),
             "short_factor": _values(file, SHORT, half).tolist(),
             "original_max_position_embeddings": original}
    return {"rope_scaling": made, "original_max_position_embeddings": original}


def _llama3(file: GGUFModel, config: _Config, field: Fields) -> _Config:
    """The parameters of Llama 3's scaling, recovered from the factors in ``rope_freqs.weight``,
    which are all that the file stores.

    Long wavelengths λ have the factor F, short ones 1, and those between them 1 / ((1 − s) / F + s)
    with s = (context / λ − low) / (high − low), so s is a line over 1 / λ. Only the ratios of
    context, low and high count.
    """
    factors = _values(file, FREQUENCIES, config["head_dim"] // 2).astype(np.float64)
    exponents = np.arange(len(factors)) * 2 / config["head_dim"]
    waves = 2 * math.pi * config["rope_theta"] ** exponents
    largest = float(factors.max())
    candidates = [(1.0, 4.0, 8192.0)]
    between = (factors > 1.0001) & (factors < largest * 0.9999)
    if between.sum() >= 2:
        smooth = (1 / factors[between] - 1 / largest) / (1 - 1 / largest)
        slope, offset = np.polyfit(1 / waves[between], smooth, 1)
        if offset < 0:
            high = 1 - 1 / offset
            candidates.append((1.0, high, slope * (high - 1)))
    for low, high, context in candidates:
        smooth = np.clip((context / waves - low) / (high - low), 0, 1)
        if np.allclose(1 / ((1 - smooth) / largest + smooth), factors, rtol=1e-4):
            field.asked.add("rope.scaling.factor")
            return {"factor": largest, "low_freq_factor": low, "high_freq_factor": high,
                    "original_max_position_embeddings": context}
    raise Unsupported(f"{file.path}: {FREQUENCIES} is no scaling of Llama 3's form")


def _values(file: GGUFModel, name: str, count: int) -> np.ndarray:
    if name not in file.tensors:
        raise BadCheckpoint(f"{file.path} lacks {name}")
    tensor, values = file.tensors[name], np.zeros(0)
    if tensor.type.name == "F32":
        values = tensor.read().reshape(-1).view(np.float32)
    if len(values) != count or not np.isfinite(values).all() or (values <= 0).any():
        raise BadCheckpoint(f"{file.path}: {name} is not {count} positive float32 numbers")
    return values
