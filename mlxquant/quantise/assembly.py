"""What a quantised checkpoint holds beside its blocks: embedding, head, norms, gates, config."""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxquant.base.errors import Unsupported
from mlxquant.codes import rtn
from mlxquant.codes.spec import PLAIN_GROUPS, Spec
from mlxquant.codes.width import Width
from mlxquant.layers import formats
from mlxquant.layers.blocks import Block, arrays_outside, find_blocks
from mlxquant.layers.dense import expanded_weight
from mlxquant.layers.formats import Entries, stored_entry
from mlxquant.layers.hooks import call_order
from mlxquant.quantise import rotation
from mlxquant.quantise.job import Job
from mlxquant.quantise.results import Body

ENDS = (nn.Embedding, nn.QuantizedEmbedding, nn.Linear, nn.QuantizedLinear)


def blocks_of(network: nn.Module) -> list[Block]:
    """The blocks to quantise one by one; all of a network that calls none is one block."""
    try:
        blocks = find_blocks(network)
    except Unsupported:
        blocks = []
    return blocks if blocks and call_order(network, blocks) else [Block("", network)]


def stored_dtype(block: Block) -> mx.Dtype:
    """The floating type that the source's scales or weights have."""
    for _, array in tree_flatten(block.module.parameters()):
        if array.dtype in (mx.float16, mx.bfloat16):
            return array.dtype
    return mx.float16


def turn_of(config: dict[str, Any], job: Job) -> mx.array | None:
    """The fused rotation of the residual stream, (n, n), where the job has one."""
    fused = job.spec.rotation == "fused"
    return rotation.orthogonal(config["hidden_size"], job.seed) if fused else None


@dataclass
class Outside:
    """``tensors`` outside the blocks, as stored or rounded to ``embedding_bits``, and the gates of
    repeated blocks, (passes − 1,) each; config ``entries`` of the quantised ones among them; and
    the configuration, changed where a rotation unties the head."""

    tensors: dict[str, mx.array]
    entries: Entries
    config: dict[str, Any]


def outside(network: nn.Module, config: dict[str, Any], job: Job) -> Outside:
    """The part of the result outside the blocks, of a network whose weights are as stored."""
    blocks = blocks_of(network)
    dtype, ends = stored_dtype(blocks[0]), dict[str, mx.array]()
    if (turn := turn_of(config, job)) is not None:
        ends, config = rotation.rotate_ends(network, config, turn)
    inside = tuple(block.full("") for block in blocks)
    modules = {path: module for path, module in network.named_modules()
               if isinstance(module, ENDS) and not path.startswith(inside)}
    turned = {name: array.astype(dtype) for name, array in ends.items()}
    made = Outside(arrays_outside(network, blocks) | turned, {
        path: stored_entry(m) for path, m in modules.items() if hasattr(m, "bits")}, config)
    stored = next((getattr(m, "bits", None) for m in modules.values()), None)
    if bits := job.embedding_bits or (stored if ends else None):
        spec = Spec(bits=Width.of(bits), group_size=32 if bits == stored else 64, method="rtn")
        paths = [*modules, *(n.removesuffix(".weight") for n, a in ends.items() if a.ndim == 2)]
        for path in dict.fromkeys(paths):
            weight = ends.get(f"{path}.weight")
            if weight is None:
                weight = expanded_weight(modules[path])
            _round(made, path, weight, spec, dtype)
    for repeat in job.repeats:  # its gates are zeros until they are tuned
        path = blocks[repeat.last].path
        made.tensors[f"{path}.repeat_gates"] = mx.zeros(repeat.passes - 1, dtype)
    return made


def _round(made: Outside, path: str, weight: mx.array, spec: Spec, dtype: mx.Dtype) -> None:
    """Store ``weight`` (m, n) as ``spec`` says, unless its groups do not divide n."""
    if weight.shape[1] % spec.group_for(weight.shape[1] * 64):
        return
    affine = rtn.quantise(weight, spec, dtype)
    made.tensors |= {f"{path}.{name}": part for name, part in affine.tensors(dtype).items()}
    made.entries[path] = {"group_size": affine.group, "bits": spec.bits.code_bits}


def result_config(made: Outside, body: Body, job: Job, record: dict[str, Any]) -> dict[str, Any]:
    """config.json of the result."""
    default = {"group_size": job.spec.group_size, "bits": job.spec.bits.code_bits}
    if default["group_size"] not in PLAIN_GROUPS:
        default = {"group_size": 64, "bits": 4}
    entries = {**body.plain, **made.entries}
    quantization = {**default, **{p: e for p, e in entries.items() if e != default}}
    config = {k: v for k, v in made.config.items() if k != "quantization_config"}
    if "quantization_config" in config.get("text_config", {}):
        config["text_config"] = {k: v for k, v in config["text_config"].items()
                                 if k != "quantization_config"}
    config |= {"quantization": quantization, "quantization_config": quantization}
    config = formats.config_with(config, body.layers, body.replicas, job.repeats)
    return config | {"mlxquant_record": record | {"output_error": body.output_error()}}
