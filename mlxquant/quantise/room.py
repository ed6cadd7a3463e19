"""Whether a job fits on the disk and in memory, before it starts."""

from pathlib import Path

import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxquant.base.errors import TooLarge
from mlxquant.base.storage import require_space
from mlxquant.codes.spec import Whole
from mlxquant.layers.blocks import Block
from mlxquant.layers.traffic import float32_bytes, leaf_modules, own_bytes, weight_count
from mlxquant.machine.memory import memory_limit
from mlxquant.quantise.plans import LAYERS, Plan, inputs_of


def check(network: nn.Module, blocks: list[Block], plans: list[Plan], output: Path) -> None:
    """Raises ``TooLarge`` where the result, or the largest block and its statistics, cannot fit."""
    inside = tuple(f"{block.path}." if block.path else "" for block in blocks)
    stored = sum(map(_stored_bytes, blocks, plans))
    ends = sum(a.nbytes for name, a in tree_flatten(network.parameters())
               if not name.startswith(inside))
    # The finished blocks and the shards made of them lie side by side for a moment.
    require_space(output, int(2 * stored + ends), f"quantising into {output.name}")
    needed = max(working_bytes(block.module) for block in blocks)
    if needed > memory_limit():
        raise TooLarge(f"the largest block with its statistics needs {needed / 1e9:.2f} GB of "
                       f"memory, {memory_limit() / 1e9:.2f} GB may be used")


def working_bytes(block: nn.Module) -> int:
    """The least that a block takes in memory: its weights in float32, and the moments of its widest
    input."""
    modules = [module for _, module in leaf_modules(block)]
    widest = max((inputs_of(m) for m in modules if type(m) in LAYERS), default=0)
    return sum(map(float32_bytes, modules)) + 4 * widest**2


def _stored_bytes(block: Block, plan: Plan) -> float:
    total = 0.0
    for path, module in leaf_modules(block.module):
        spec = plan.specs.get(path)
        if spec is None:
            total += own_bytes(module)
        else:
            group = 128 if isinstance(spec.group_size, Whole) else spec.group_size
            total += weight_count(module) * (spec.bits.code_bits + 32 / group) / 8
    return total
