"""A model known by its configuration alone: its network is built, none of its weights is ever computed."""

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from mlxquant.base.errors import BadCheckpoint, Unsupported
from mlxquant.codes import hadamard
from mlxquant.codes.spec import ReplicaShape
from mlxquant.layers import formats, traffic

_QUANTISED = ("quantization", "quantization_config")
_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # read one input
KV_GROUP = 32  # of quantised keys and values, as ``generation.py`` makes them
EMBEDDING = {"group_size": 64, "bits": 8}


def network_of(config: dict) -> nn.Module:
    """The network that ``config`` describes, as stored there, in 16 bits where nothing says otherwise.

    Nothing is read or computed: arrays have shapes and types only. Raises ``Unsupported`` or ``BadCheckpoint``.
    """
    try:
        model_class, arguments = formats.model_classes(config)
        network = model_class(arguments.from_dict(config))
        network.set_dtype(mx.float16)
        if quantization := config.get("quantization"):
            nn.quantize(network, quantization["group_size"], quantization["bits"],
                        mode=quantization.get("mode", "affine"),
                        class_predicate=lambda path, m: hasattr(m, "to_quantized") and quantization.get(path, True))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).strip().split("\n")[0]
        if "not supported" in reason:
            raise Unsupported(reason) from error
        raise BadCheckpoint(f"the configuration does not make a model: {reason}") from error
    return network


def unquantised(config: dict) -> dict:
    """``config`` of the 16-bit original."""
    plain = {key: value for key, value in config.items() if key not in (*_QUANTISED, "mlxquant")}
    return plain | {"model_type": plain.pop("base_model_type", plain["model_type"])}


def affine(config: dict, bits: int, group: int) -> nn.Module:
    """The 16-bit original with its blocks in affine groups and its embedding and head in 8 bits."""
    network = network_of(unquantised(config))

    def width(path: str, module: nn.Module):
        if isinstance(module, nn.Embedding) or ".layers." not in path:
            return hasattr(module, "to_quantized") and module.weight.shape[-1] % EMBEDDING["group_size"] == 0 \
                and EMBEDDING
        return isinstance(module, nn.Linear) and {"group_size": group, "bits": bits}

    nn.quantize(network, class_predicate=width)
    return network


def replicated(config: dict, shape: ReplicaShape) -> nn.Module:
    """The 16-bit original with replicated blocks, rotated, and its embedding and head in 8 bits. Raises
    ``BadValue`` where the shape does not fit."""
    network = network_of(unquantised(config))
    replicas = {}
    for index, block in enumerate(network.layers):
        for paths in _readers(block):
            above = paths[0].rpartition(".")[0]
            columns = _linears(block)[paths[0]].weight.shape[1]
            entry = ReplicaShape(shape.bits, shape.replicas, shape.replica_group, hadamard.default_block(columns))
            entry.check(columns, f"model.layers.{index}.{paths[0]}")
            names = [path.removeprefix(f"{above}.") for path in paths]
            replicas[f"layers.{index}.{above}.{'_'.join(names)}_input"] = entry.as_dict() | {"linears": names}
    body = network.model if hasattr(network, "model") else network
    formats.install(body, {}, replicas)
    nn.quantize(network, class_predicate=lambda path, m: isinstance(m, (nn.Linear, nn.Embedding)) and EMBEDDING)
    network.set_dtype(mx.float16)
    return network


def check(network: nn.Module) -> str | None:
    """Why ``quantize`` cannot take this model, or None."""
    for path, module in traffic.leaf_modules(network):
        if isinstance(module, (SwitchLinear, QuantizedSwitchLinear)):
            return f"{path} holds a mixture's experts, which quantize does not cover yet"
    return None


def kv_bytes(network: nn.Module, context: int, bits: int = 16) -> int:
    """Bytes of keys, values and other state after ``context`` tokens; with fewer than 16 ``bits`` each group
    of 32 has a scale and an offset of 16 bits as well.

    One token goes through the network as a graph that is never computed, so each architecture says itself.
    """
    cache = make_prompt_cache(network)
    network(mx.zeros((1, 1), mx.int32), cache=cache)
    share = 1.0 if bits == 16 else (bits + 32 / KV_GROUP) / 16
    total = 0.0
    for layer in cache:
        length = min(context, getattr(layer, "max_size", None) or context) if hasattr(layer, "offset") else 1
        total += traffic.kv_bytes([layer]) * length * (share if hasattr(layer, "to_quantized") else 1)
    return round(total)


def _linears(block: nn.Module) -> dict[str, nn.Linear]:
    return {path: module for path, module in traffic.leaf_modules(block) if isinstance(module, nn.Linear)}


def _readers(block: nn.Module) -> list[list[str]]:
    """Linear layers by the input they read, as far as their names tell."""
    found: dict[tuple, list[str]] = {}
    for path in _linears(block):
        above, _, name = path.rpartition(".")
        group = next((names for names in _SIBLINGS if name in names), (name,))
        found.setdefault((above, group), []).append(path)
    return list(found.values())
