"""Whether a job fits on the disk and in memory, before it starts."""

from pathlib import Path

import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxquant.base.errors import TooLarge
from mlxquant.base.storage import require_space
from mlxquant.codes.spec import Whole
from mlxquant.layers.traffic import float32_bytes, leaf_modules, module_bytes, weight_count
from mlxquant.machine.memory import memory_limit
from mlxquant.quantise.job import Job


def check(network: nn.Module, job: Job, output: Path) -> None:
    """Raises ``TooLarge`` where the result, or the largest block and its statistics, cannot fit."""
    blocks = network.layers
    stored = sum(_stored_bytes(block, f"model.layers.{index}", job) for index, block in enumerate(blocks))
    ends = sum(array.nbytes for name, array in tree_flatten(network.parameters()) if ".layers." not in name)
    # The finished blocks and the shards made of them lie side by side for a moment.
    require_space(output, int(2 * stored + ends), f"quantising into {output.name}")
    needed = max(working_bytes(block) for block in blocks)
    if needed > memory_limit():
        raise TooLarge(f"the largest block with its statistics needs {needed / 1e9:.2f} GB of memory, "
                       f"{memory_limit() / 1e9:.2f} GB may be used")


def working_bytes(block: nn.Module) -> int:
    """The least that a block takes in memory: its weights in float32, and the moments of its widest input."""
    modules = [module for _, module in leaf_modules(block)]
    widest = max((weight_count(m) // m.weight.shape[0] for m in modules if _is_linear(m)), default=0)
    return sum(map(float32_bytes, modules)) + 4 * widest**2


def _stored_bytes(block: nn.Module, prefix: str, job: Job) -> int:
    total = 0
    for path, module in leaf_modules(block):
        if not _is_linear(module):
            total += module_bytes(module)
            continue
        spec = job.overrides.spec_for(f"{prefix}.{path}")
        group = 128 if isinstance(spec.group_size, Whole) else spec.group_size
        total += weight_count(module) * (spec.bits.code_bits + 32 / group) / 8
    return total


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.QuantizedLinear))
