"""What a quantised checkpoint holds beside its blocks: embedding, head, norms, gates, config."""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxquant.base.errors import Unsupported
from mlxquant.codes import rtn
from mlxquant.codes.spec import PLAIN_GROUPS
from mlxquant.layers import formats
from mlxquant.layers.blocks import Block, arrays_outside, find_blocks
from mlxquant.layers.dense import expanded_weight
from mlxquant.layers.formats import Entries, stored_entry
from mlxquant.layers.hooks import call_order
from mlxquant.quantise import rotation
from mlxquant.quantise.job import Job
from mlxquant.quantise.plans import ends_of, plan_ends
from mlxquant.quantise.results import Body


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
    modules, specs = ends_of(network, blocks), plan_ends(network, blocks, job).specs
    dtype, ends = stored_dtype(blocks[0]), dict[str, mx.array]()
    if (turn := turn_of(config, job)) is not None:
        ends, config = rotation.rotate_ends(network, config, turn)
    dense = {path for path in modules if f"{path}.weight" in ends and path not in specs}
    turned = {name: array.astype(dtype) for name, array in ends.items()}
    made = Outside(arrays_outside(network, blocks) | turned, {
        path: stored_entry(module) for path, module in modules.items()
        if hasattr(module, "bits") and path not in dense}, config)
    for name in [f"{path}.{part}" for path in dense for part in ("scales", "biases")]:
        made.tensors.pop(name, None)
    for path, spec in specs.items():
        weight = ends.get(f"{path}.weight")
        if weight is None:
            weight = expanded_weight(modules[path])
        affine = rtn.quantise(weight, spec, dtype)
        made.tensors |= {f"{path}.{name}": part for name, part in affine.tensors(dtype).items()}
        made.entries[path] = {"group_size": affine.group, "bits": spec.bits.code_bits}
    for repeat in job.repeats:  # its gates are zeros until they are tuned
        path = blocks[repeat.last].path
        made.tensors[f"{path}.repeat_gates"] = mx.zeros(repeat.passes - 1, dtype)
    return made


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
