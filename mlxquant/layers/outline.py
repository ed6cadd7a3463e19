"""A model known by its configuration alone: its network is built, no weight is ever computed."""

from fnmatch import fnmatchcase
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import maybe_quantize_kv_cache
from mlx_lm.models.cache import make_prompt_cache

from mlxquant.base.errors import BadCheckpoint, Unsupported, first_line
from mlxquant.layers import formats, traffic

_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_QUANTISED = ("quantization", "quantization_config")
KV_GROUP = 32  # of quantised keys and values, as ``generation.py`` makes them


def network_of(config: dict[str, Any]) -> nn.Module:
    """The network that ``config`` describes, as stored there, or else in 16 bits.

    Nothing is read or computed: arrays have shapes and types only. Raises ``Unsupported`` or
    ``BadCheckpoint``.
    """
    try:
        model_class, arguments = formats.model_classes(config)
        network = model_class(arguments.from_dict(config))
        network.set_dtype(mx.float16)
        if stored := quantization_of(config):
            nn.quantize(network, stored["group_size"], stored["bits"],
                        mode=stored.get("mode", "affine"), class_predicate=lambda path, module: (
                            hasattr(module, "to_quantized") and not any(
                                fnmatchcase(path, f"{glob}*") for glob in stored.get("kept", ()))
                            and stored.get(path, True)))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = first_line(error)
        if "not supported" in reason:
            raise Unsupported(reason) from error
        raise BadCheckpoint(f"the configuration does not make a model: {reason}") from error
    return network


def drop_tied_head(network: nn.Module, config: dict[str, Any]) -> nn.Module:
    """The network of a ``config`` whose head is its embedding: some models drop a head of their own
    only when they see the weights. Raises ``AttributeError`` where one keeps it."""
    if config["tie_word_embeddings"] and "lm_head" in network:
        network.sanitize({})
    return network


def quantization_of(config: dict[str, Any]) -> dict[str, Any] | None:
    """How the weights are stored according to ``config``, in MLX's terms; None: in 16 bits.

    OpenAI's entry for mxfp4 is understood too; ``kept`` are globs of the modules it leaves in 16
    bits.
    """
    if config.get("quantization"):
        return config["quantization"]
    published = config.get("quantization_config") or {}
    if published.get("quant_method") != "mxfp4":
        return None
    return {"group_size": 32, "bits": 4, "mode": "mxfp4",
            "kept": published.get("modules_to_not_convert") or []}


def attention_heads(config: dict[str, Any]) -> int:
    """How many heads of queries a block has; 0 where the configuration does not say."""
    config = config.get("text_config", config)
    return next((config[name] for name in _HEADS if name in config), 0)


def unquantised(config: dict[str, Any]) -> dict[str, Any]:
    """``config`` of the 16-bit original."""
    plain = {key: value for key, value in config.items() if key not in (*_QUANTISED, "mlxquant")}
    return plain | {"model_type": plain.pop("base_model_type", plain["model_type"])}


def kv_bytes(network: nn.Module, context: int, bits: int = 16) -> int:
    """Bytes of keys, values and other state after ``context`` tokens, the keys and values at
    ``bits``. Raises ``Unsupported`` as ``token_cache``, from whose shapes it is counted."""
    total = 0.0
    for layer in traffic.single(token_cache(network, bits)):
        size = traffic.kv_bytes([layer])
        if hasattr(layer, "offset"):
            most = getattr(layer, "max_size", None) or getattr(layer, "chunk_size", None)
            size = size * min(context, most or context) / max(layer.offset, 1)
        total += size
    return round(total)


def token_cache(network: nn.Module, bits: int = 16, name: str = "the model",
                computed: bool = False) -> list[Any]:
    """The cache of a token that goes through ``network``, as a graph unless it is to be
    ``computed``; below 16 ``bits`` it is quantised, and a second token reads it.

    Raises ``Unsupported``, which calls the model ``name``, for sliding windows, head sizes that
    groups do not divide, or an attention that takes no such cache.
    """
    layers, token = make_prompt_cache(network), mx.zeros((1, 1), mx.int32)
    logits = network(token, cache=layers)
    if bits == 16:
        return layers
    try:
        maybe_quantize_kv_cache(layers, 0, KV_GROUP, bits)
        logits = network(token, cache=layers)
        if computed:
            mx.eval(logits)
        if not any(hasattr(layer, "bits") for layer in layers):
            raise NotImplementedError("it keeps no keys and values of this kind")
    except (NotImplementedError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise Unsupported(f"{name} cannot keep its keys and values at {bits} bits in groups "
                          f"of {KV_GROUP}: {first_line(error)}; leave kv_bits out") from error
    return layers
