"""Before any work: the entries that a job will write, and whether a network can be built of them.

One pass over the network, of which nothing is computed, tells which layers share an input; the
rest is known from the plans. So a path that is described wrongly, or an architecture that refuses
such layers, ends in one line at the start and not after an hour.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxquant.base.errors import BadCheckpoint, BadValue, MlxquantError, Unsupported, first_line
from mlxquant.codes.hadamard import default_block
from mlxquant.codes.spec import Spec
from mlxquant.layers import formats
from mlxquant.layers.blocks import Block
from mlxquant.layers.hooks import listened
from mlxquant.layers.traffic import leaf_modules
from mlxquant.quantise.assembly import Outside, blocks_of, result_config
from mlxquant.quantise.job import Job
from mlxquant.quantise.plans import EXPERTS, BlockPlan, inputs_of, plan_blocks, plan_ends
from mlxquant.quantise.results import BlockResult, Body
from mlxquant.quantise.storing import Around, describe, describe_replicas


def rehearse(network: nn.Module, config: dict[str, Any], blocks: list[Block],
             plans: list[BlockPlan], job: Job) -> nn.Module:
    """The network that a job makes, without weights; embedding and head are dense unless the job
    rounds them. Raises ``Unsupported`` where it would not load."""
    inputs = given_inputs(network, blocks) if job.calibrated else {}
    body = Body()
    for block, plan in zip(blocks, plans):
        body.add(block, _described(block, plan, inputs, job))
    config = result_config(Outside({}, {}, config), body, job, {})
    entries = body.plain | {
        path: {"group_size": spec.group_size, "bits": spec.bits.code_bits}
        for path, spec in plan_ends(network, blocks, job).specs.items()}
    try:
        model_class, arguments = formats.model_classes(config)
        made = model_class(arguments.from_dict(config))
        nn.quantize(made, class_predicate=lambda path, module:
                    hasattr(module, "to_quantized") and entries.get(path, False))
        return made
    except (ValueError, KeyError, TypeError, AttributeError, MlxquantError) as error:
        raise Unsupported(f"{config.get('base_model_type', config['model_type'])} cannot be "
                          f"stored so: {first_line(error)}") from error


def planned(network: nn.Module, config: dict[str, Any], job: Job) -> nn.Module:
    """The network in 16 bits that a job makes of a model known by its configuration alone.

    Raises ``BadValue`` where most layers cannot take what is asked, such as a group that does not
    divide their inputs, and ``Unsupported`` where the result would not load.
    """
    blocks = blocks_of(network)
    plans = plan_blocks(network, blocks, job)
    taken = [spec == job.spec for plan in plans for spec in plan.specs.values()
             if spec.method == job.spec.method]
    if 2 * sum(taken) < len(taken):
        raise BadValue(f"{len(taken) - sum(taken)} of {len(taken)} layers cannot take what is "
                       "asked")
    made = rehearse(network, config, blocks, plans, job)
    made.set_dtype(mx.float16)
    return made


def given_inputs(network: nn.Module, blocks: list[Block]) -> dict[str, mx.array]:
    """The first input array of each layer of the blocks, by path: that object, uncomputed."""
    linears = {block.full(path): module for block in blocks
               for path, module in leaf_modules(block.module)
               if type(module) in (nn.Linear, nn.QuantizedLinear, *EXPERTS)}
    try:
        _, calls = listened(linears, lambda: network(mx.zeros((1, 4), mx.int32)))
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise BadCheckpoint(f"the network does not run: {first_line(error)}") from error
    found: dict[str, mx.array] = {}
    for path, args in calls:
        found.setdefault(path, args[0])
    return found


def _described(block: Block, plan: BlockPlan, inputs: dict[str, mx.array], job: Job) -> BlockResult:
    """The entries of one block."""
    result = BlockResult(plain=dict(plan.entries))
    modules = dict(leaf_modules(block.module))
    siblings: dict[tuple[int, bool, Spec], list[str]] = {}
    for path, spec in plan.specs.items():
        given = inputs.get(block.full(path), path)  # a layer that is not called stands alone
        if spec.method == "replica":
            stack = type(modules[path]) in EXPERTS
            siblings.setdefault((id(given), stack, spec), []).append(path)
        elif spec.rotation != "online" and job.activation is None:
            describe(path, spec, inputs_of(modules[path]), Around(), modules[path], result)
    for (_, _, spec), paths in siblings.items():
        turned = spec.rotation == "online"
        describe_replicas(paths, block.module, spec,
                          default_block(inputs_of(modules[paths[0]])) if turned else None, result)
    return result
