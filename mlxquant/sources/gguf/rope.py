"""Scalings of rotary position embeddings, from GGUF's metadata and tensors to mlx-lm's ``rope_scaling``."""

import math

import numpy as np

from mlxquant.base.errors import BadCheckpoint, Unsupported
from mlxquant.sources.gguf.architectures import Architecture
from mlxquant.sources.gguf.reader import GGUFModel, GGUFTensor

FREQUENCIES, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
TENSORS = (FREQUENCIES, LONG, SHORT)


def scaling(file: GGUFModel, architecture: Architecture, config: dict, field) -> dict:
    """Entries of config.json: none, or ``rope_scaling`` and what belongs to it.

    Raises ``Unsupported`` for a scaling that mlx-lm's model of this architecture does not have.
    """
    kind = file.metadata.get(f"{field.prefix}.rope.scaling.type", "none")
    field.asked.update(f"rope.scaling.{name}" for name in ("type", "finetuned", "original_context_length"))
    if FREQUENCIES in file.tensors:
        kind = "llama3"
    elif LONG in file.tensors:
        kind = "longrope"
    if kind == "none":
        field.asked.add("rope.scaling.factor")
        return {}
    if kind not in architecture.ropes:
        raise Unsupported(f"{file.path}: rope scaling {kind!r}; supported for {field.prefix}: "
                          f"{', '.join(architecture.ropes) or 'none'}")
    made = {"type": kind, "rope_type": kind}
    if kind == "llama3":
        return {"rope_scaling": made | _llama3(file, config, field)}
    if kind == "longrope":
        return _longrope(file, made, config, field)
    made["factor"] = float(field("rope.scaling.factor", (int, float)))
    if kind == "yarn":
        made["original_max_position_embeddings"] = field("rope.scaling.original_context_length")
        for key, name in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
            if (value := field(f"rope.scaling.{name}", (int, float), default=None)) is not None:
                made[key] = value
    return {"rope_scaling": made}


def _longrope(file: GGUFModel, made: dict, config: dict, field) -> dict:
    half = int(config["head_dim"] * config["partial_rotary_factor"]) // 2
    original = field("rope.scaling.original_context_length")
    factor = config["max_position_embeddings"] / original
    expected = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0
    stated = field("rope.scaling.attn_factor", float, default=expected)
    if abs(stated - expected) > 1e-3:
        raise Unsupported(f"{file.path}: longrope with attention factor {stated}; mlx-lm computes {expected:.4f}")
    for key, name in (("long_factor", LONG), ("short_factor", SHORT)):
        if name not in file.tensors:
            raise BadCheckpoint(f"{file.path} lacks {name}")
        made[key] = _values(file, file.tensors[name], half).tolist()
    made["original_max_position_embeddings"] = original
    return {"rope_scaling": made, "original_max_position_embeddings": original}


def _llama3(file: GGUFModel, config: dict, field) -> dict:
    """The numbers that give the factors of ``rope_freqs.weight``: it is all that the file keeps of them.

    Long wavelengths λ have the factor F, short ones 1, and those between them 1 / ((1 − s) / F + s) with
    s = (context / λ − low) / (high − low), so s is a line over 1 / λ. Only context : low : high counts.
    """
    factors = _values(file, file.tensors[FREQUENCIES], config["head_dim"] // 2).astype(np.float64)
    waves = 2 * math.pi * config["rope_theta"] ** (np.arange(len(factors)) * 2 / config["head_dim"])
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


def _values(file: GGUFModel, tensor: GGUFTensor, count: int) -> np.ndarray:
    values = tensor.read().reshape(-1).view(np.float32) if tensor.type.name == "F32" else np.zeros(0)
    if len(values) != count or not np.isfinite(values).all() or (values <= 0).any():
        raise BadCheckpoint(f"{file.path}: {tensor.name} is not {count} positive float32 numbers")
    return values
