"""The transformer blocks of a network, found in its tree of modules by what they are.

mlx-lm's property ``layers`` is not used: in many architectures it returns a slice or a copy of the
list, and a block that is put into a copy is never called.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from mlxquant.base.errors import Unsupported

_TOWERS = ("vision", "visual", "image", "audio", "speech")  # in the path of what is no text model
_LEAST_SHARE = 0.02  # of the largest block's bytes: smaller modules only serve the blocks


@dataclass(frozen=True)
class Block:
    """A block and its path in the network, such as ``model.layers.3``."""

    path: str
    module: nn.Module

    def full(self, path: str) -> str:
        """``path``, which begins at the block, as a path that begins at the network."""
        return f"{self.path}.{path}" if self.path else path


def held_bytes(module: nn.Module) -> int:
    """Bytes of all parameters of a module, as held."""
    return sum(array.nbytes for _, array in tree_flatten(module.parameters()))


def release(module: nn.Module) -> None:
    """Free all arrays of a module; it cannot be called afterwards."""
    module.update(tree_map(lambda _: mx.zeros(0), module.parameters()))


def shape_of(module: nn.Module) -> tuple[int, ...]:
    """(m, n) of a module that holds a matrix, packed or not, or (E, m, n) of a stack of experts."""
    if "codes" in module:
        return tuple(module.shape)
    *rows, columns = module.weight.shape
    return *rows, columns * 32 // module.bits if hasattr(module, "bits") else columns


def inside(blocks: Iterable[Block]) -> tuple[str, ...]:
    """What the paths of all that is in blocks begin with."""
    return tuple(block.full("") for block in blocks)


def arrays_outside(network: nn.Module, blocks: list[Block]) -> dict[str, mx.array]:
    """The arrays of a network that none of its blocks holds, by path."""
    paths = inside(blocks)
    return {path: array for path, array in tree_flatten(network.parameters())
            if not path.startswith(paths)}


def find_blocks(network: nn.Module) -> list[Block]:
    """The network's blocks in the order in which they run.

    Blocks hang in lists of modules, most often one list, of which each element holds other
    modules. What is missing in a list (None) is left out. Lists under the encoders of images or
    sound count only where there are no others. Raises ``Unsupported`` for a network without any.
    """
    found = [blocks for blocks in _lists("", network) if any(b.module.children() for b in blocks)]
    texts = [blocks for blocks in found if not any(word in blocks[0].path for word in _TOWERS)]
    sizes = [max(held_bytes(block.module) for block in blocks) for blocks in texts or found]
    if not sizes:
        raise Unsupported(f"{type(network).__module__} has no list of blocks")
    return [block for blocks, size in zip(texts or found, sizes)
            if size >= _LEAST_SHARE * max(sizes) for block in blocks]


def blocks_or_itself(network: nn.Module) -> list[Block]:
    """The network's blocks; where it has none, the network as one."""
    try:
        return find_blocks(network)
    except Unsupported:
        return [Block("", network)]


def _lists(path: str, module: nn.Module) -> Iterator[list[Block]]:
    """The lists of modules below ``module`` that are inside no other such list."""
    for name, child in module.children().items():
        below = f"{path}.{name}" if path else name
        if isinstance(child, list):
            blocks = [Block(f"{below}.{index}", element) for index, element in enumerate(child)
                      if isinstance(element, nn.Module)]
            if blocks:
                yield blocks
        elif isinstance(child, nn.Module):
            yield from _lists(below, child)
