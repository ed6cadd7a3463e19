"""Keys and values of a network whose blocks run more than once.

Every pass of a block attends to what that same pass saw of earlier tokens, so a
block that runs P times has P caches. mlx-lm's models and its generation loop
want one cache a block: they get a list that answers as the first pass's would,
whose offset and mask are also those of the others.
"""

from typing import Any

import mlx.nn as nn
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.cache import CacheList, KVCache

from mlxquant.base.errors import BadValue
from mlxquant.layers.blocks import find_blocks


class PassesCache(CacheList):
    """The caches of one block, one for each pass; ``caches[0]`` is the first one's.

    What mlx-lm does to a cache (trimming, quantising, batching, saving) is done to
    all; what a model asks one about (``offset`` in tokens, the mask, its parts) the
    first answers.
    """

    def __getitem__(self, index: int) -> Any:
        return self.caches[0][index]

    @property
    def offset(self) -> int:
        return int(self.caches[0].offset)

    @property
    def bits(self) -> int:
        """The width of quantised keys and values; other caches have no such attribute."""
        return int(self.caches[0].bits)

    def make_mask(self, *args: Any, **kwargs: Any) -> Any:
        return self.caches[0].make_mask(*args, **kwargs)

    def to_quantized(self, group_size: int = 64, bits: int = 4) -> "PassesCache":
        """mlx-lm asks again at every token: caches that are quantised stay as they are."""
        return PassesCache(*(cache.to_quantized(group_size=group_size, bits=bits)
                             if hasattr(cache, "to_quantized") else cache for cache in self.caches))

    def extract(self, idx: int) -> "PassesCache":
        return PassesCache(*(cache.extract(idx) for cache in self.caches))


# load_prompt_cache finds the class of a saved cache by its name in that module.
mlx_lm_cache.PassesCache = PassesCache


def caching(network_class: type[nn.Module], passes: dict[int, int]) -> type[nn.Module]:
    """``network_class`` with caches for as many passes of each block, by index, as ``passes``
    says."""
    def make_cache(self: nn.Module) -> list[Any]:
        made = [_caches(network_class, self) for _ in range(max(passes.values()))]
        return [PassesCache(*(caches[index] for caches in made[:passes[index]]))
                if index in passes else first for index, first in enumerate(made[0])]

    return type(network_class.__name__, (network_class,),
                {"make_cache": make_cache, "__module__": network_class.__module__})


def has_cache_for_each_block(network: nn.Module) -> bool:
    """Whether the network's caches go by block: some architectures share them between blocks."""
    return len(_caches(type(network), network)) == len(find_blocks(network))


def of_pass(argument: Any, number: int) -> Any:
    """What pass ``number`` (from 0) is given where the block was given ``argument``.

    Raises ``BadValue`` for a cache that has no entry for it.
    """
    if isinstance(argument, PassesCache):
        return argument.caches[number]
    if number and isinstance(argument, mlx_lm_cache._BaseCache):
        raise BadValue(f"a repeated block was given a {type(argument).__name__} for one pass; "
                       "allowed are caches made for this very network, by "
                       "make_prompt_cache(network)")
    return argument


def _caches(network_class: type[nn.Module], network: nn.Module) -> list[Any]:
    """New caches of one pass, as ``network_class`` or else mlx-lm makes them."""
    if hasattr(network_class, "make_cache"):
        made: list[Any] = network_class.make_cache(network)
        return made
    return [KVCache() for _ in find_blocks(network)]
