"""What a quantised checkpoint holds beside its blocks: embedding, head, norms, gates, config."""

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxquant.codes import rtn
from mlxquant.codes.spec import PLAIN_GROUPS, Spec
from mlxquant.codes.width import Width
from mlxquant.layers import formats
from mlxquant.quantise import rotation
from mlxquant.quantise.calibration import Calibration
from mlxquant.quantise.job import Job, record


def stored_dtype(network: nn.Module) -> mx.Dtype:
    """The floating type that the source's scales or weights have."""
    for _, array in tree_flatten(network.layers[0].parameters()):
        if array.dtype in (mx.float16, mx.bfloat16):
            return array.dtype
    return mx.float16


def turn_of(config: dict, job: Job) -> mx.array | None:
    """The fused rotation of the residual stream, (n, n), where the job has one."""
    return rotation.orthogonal(config["hidden_size"], job.seed) if job.spec.rotation == "fused" else None


def outside(network: nn.Module, config: dict, job: Job) -> tuple[dict[str, mx.array], dict[str, dict], dict]:
    """Tensors outside the blocks, as stored or at the embedding's own width; those widths; and
    ``config``, changed where a rotation unties the head."""
    dtype, ends = stored_dtype(network), {}
    if (turn := turn_of(config, job)) is not None:
        ends, config = rotation.rotate_ends(network, config, turn)
    modules = {path: module for path, module in network.named_modules()
               if isinstance(module, (nn.Embedding, nn.QuantizedEmbedding, nn.Linear, nn.QuantizedLinear))
               and ".layers." not in path}
    tensors = {name: array for name, array in tree_flatten(network.parameters()) if ".layers." not in name}
    tensors |= {name: array.astype(dtype) for name, array in ends.items()}
    stored = next((getattr(m, "bits", None) for m in modules.values()), None)
    bits = job.embedding_bits or (stored if ends else None)
    if not bits:
        return tensors, {path: {"group_size": m.group_size, "bits": m.bits}
                         for path, m in modules.items() if hasattr(m, "bits")}, config
    spec = Spec(bits=Width.of(bits), group_size=32 if bits == stored else 64, method="rtn")
    widths = {}
    for path in dict.fromkeys([*modules, *(n.removesuffix(".weight") for n, a in ends.items() if a.ndim == 2)]):
        weight = ends.get(f"{path}.weight")
        weight = rotation.expanded_weight(modules[path]) if weight is None else weight
        affine = rtn.quantise(weight, None, spec, dtype)
        tensors |= {f"{path}.weight": affine.packed(), f"{path}.scales": affine.scales.astype(dtype),
                    f"{path}.biases": affine.biases.astype(dtype)}
        widths[path] = {"group_size": affine.group, "bits": bits}
    return tensors, widths, config


def gates(job: Job, dtype: mx.Dtype) -> dict[str, mx.array]:
    """The gates of repeated blocks by path, (passes − 1,): zeros, until they are tuned."""
    return {f"model.layers.{repeat.last}.repeat_gates": mx.zeros(repeat.passes - 1, dtype)
            for repeat in job.repeats}


def config_of(config: dict, job: Job, tokens: Calibration, plain: dict[str, dict],
              layers: dict[str, dict], replicas: dict[str, dict], errors: dict[str, float]) -> dict:
    """config.json of the result; ``plain``, ``layers``, ``replicas`` and ``errors`` are those of its blocks."""
    default = {"group_size": job.spec.group_size, "bits": job.spec.bits.code_bits}
    if default["group_size"] not in PLAIN_GROUPS:
        default = {"group_size": 64, "bits": 4}
    quantization = {**default, **{p: e for p, e in plain.items() if e != default}}
    config = {k: v for k, v in config.items() if k not in ("quantization", "quantization_config")}
    config |= {"quantization": quantization, "quantization_config": quantization}
    config = formats.config_with(config, layers, replicas, job.repeats)
    worst = max(errors, key=errors.get)
    measured = {"mean": sum(errors.values()) / len(errors), "largest": errors[worst], "layer": worst}
    return config | {"mlxquant_record": record(job, tokens) | {"output_error": measured}}
