"""A block under way, and what is the same for every block of a job."""

from dataclasses import dataclass

from mlxquant.layers.blocks import Block
from mlxquant.layers.siblings import Siblings
from mlxquant.quantise.plans import Plan
from mlxquant.quantise.settings import Settings
from mlxquant.quantise.storing import BlockResult


@dataclass(frozen=True)
class Context:
    """What is the same for every block of a job."""

    settings: Settings
    siblings: dict[str, Siblings]  # of the network, by the path of each
    seed: int
    remainders: bool = False


@dataclass
class Work:
    """A block under way: dense float32, changed by folding; what is asked of its layers, and what
    has been made of it."""

    block: Block
    plan: Plan
    context: Context
    result: BlockResult
