"""Blocks that run more than once on weights stored once: depth that costs no memory.

    h ← pass(h), then for each further pass p:  h ← h + g_p (pass(h) − h)

A range of blocks is passed through as a whole, again and again; a range of one block repeats that
block. The gates g_p start at 0, where the network computes exactly what it does without repeats,
and are trained (``tuning/``). One number a pass is enough: which channels a pass moves is up to the
scales in the block. Depth by repetition follows the Universal Transformer
(https://arxiv.org/abs/1807.03819), a gate that starts at 0 ReZero
(https://arxiv.org/abs/2003.04887).

Nothing is put into the list of blocks, so that the path of every parameter stays: the blocks of a
range get another class, and the last of them the gates.

Every pass of a block attends to what that same pass saw of earlier tokens, so a block that runs P
times has P caches. mlx-lm's models and its generation loop expect one cache a block: they get a
list of caches that answers like the first pass's; offset and mask are the same in all passes.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.cache import CacheList, KVCache

from mlxquant.base.errors import BadValue, Unsupported
from mlxquant.layers.blocks import find_blocks

MOST_PASSES = 8


@dataclass(frozen=True)
class Repeat:
    """Blocks ``first`` to ``last``, counted from 0, run ``passes`` times in all, as one range.

    Raises ``BadValue`` for what is not allowed; ``check_repeats`` knows a network's blocks.
    """

    first: int
    last: int
    passes: int

    def __post_init__(self) -> None:
        for name in ("first", "last", "passes"):
            if type(getattr(self, name)) is not int:
                raise BadValue(f"{name} is {getattr(self, name)!r}, allowed is a whole number")
        if not 0 <= self.first <= self.last:
            raise BadValue(f"blocks {self.span} are none; allowed are FIRST:END with FIRST at "
                           "least 0 and END, which is not among them, above FIRST")
        if not 2 <= self.passes <= MOST_PASSES:
            raise BadValue(f"blocks {self.span} are to run {self.passes} times; "
                           f"allowed are 2 to {MOST_PASSES} passes")

    @property
    def span(self) -> str:
        """FIRST:END, as it is written."""
        return f"{self.first}:{self.last + 1}"

    def one_by_one(self) -> tuple["Repeat", ...]:
        """Each block repeated by itself, in place of the range as a whole."""
        return tuple(Repeat(index, index, self.passes)
                     for index in range(self.first, self.last + 1))


def parse_repeat(text: str) -> Repeat:
    """``'8:16x2'`` as blocks 8 to 15, twice; raises ``BadValue``."""
    parts = re.fullmatch(r"(\d{1,6}):(\d{1,6})x(\d{1,6})", text.strip(), re.ASCII)
    if parts is None:
        raise BadValue(f"{text!r} is no range of blocks; allowed is FIRST:ENDxPASSES, "
                       "such as 8:16x2 for blocks 8 to 15, twice")
    first, end, passes = map(int, parts.groups())
    return Repeat(first, end - 1, passes)


class PassesCache(CacheList):
    """The caches of one block, one for each pass; ``caches[0]`` is the first one's.

    What mlx-lm does to a cache (trimming, quantising, batching, saving) is done to all; what a
    model asks one about (``offset`` in tokens, the mask, its parts) the first answers.
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


def _of_pass(argument: Any, number: int) -> Any:
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


@dataclass
class _Span:
    """What the blocks of one range share: the calls of the pass under way."""

    repeat: Repeat
    calls: list[Callable[[mx.array, int], mx.array]] = field(default_factory=list)


class RepeatedBlock:
    """Put before a block's own class, it runs the block as part of a range.

    In the first pass every block notes how it was called: mlx-lm gives each the mask
    and the cache that fit its kind of attention. The last one, which holds
    ``repeat_gates`` (passes − 1,), then calls all of them again in turn.
    """

    repeat_gates: mx.array
    _span: _Span
    _index: int

    @property
    def passes(self) -> int:
        """How often the block runs for a token."""
        return self._span.repeat.passes

    def __call__(self, hidden: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        """The hidden state after the block; after the last of the range, after all passes.

        Shapes and further arguments are those of the block's own class. Raises
        ``Unsupported`` where that returns more than the state.
        """
        span = self._span
        if self._index == span.repeat.first:
            span.calls = []
        # The own class's call, past hooks: those see a block once, as in any other network.
        own = super().__call__  # type: ignore[misc]

        def run(state: mx.array, number: int) -> mx.array:
            """The block on a state, with the caches of pass ``number``."""
            output = own(state, *(_of_pass(a, number) for a in args),
                         **{name: _of_pass(a, number) for name, a in kwargs.items()})
            if not isinstance(output, mx.array):
                raise Unsupported(f"{type(self).__name__} returns more than a hidden state; "
                                  "repeats cover only blocks that return that alone")
            return output

        span.calls.append(run)
        hidden = run(hidden, 0)
        if self._index < span.repeat.last:
            return hidden
        calls, span.calls = span.calls, []  # so that no cache or tracer outlives the pass
        if len(calls) <= span.repeat.last - span.repeat.first:
            return hidden  # the block runs by itself, as in a calibration block by block
        for number, gate in enumerate(self.repeat_gates.astype(hidden.dtype), 1):
            again = hidden
            for call in calls:
                again = call(again, number)
            hidden = hidden + gate * (again - hidden)
        return hidden


def check_repeats(network: nn.Module, repeats: Sequence[Repeat]) -> None:
    """Raise ``BadValue`` unless the network has the blocks, and no two ranges the same one;
    ``Unsupported`` for an architecture whose caches do not go by block."""
    if not repeats:
        return
    blocks = len(find_blocks(network))
    for repeat in repeats:
        if repeat.last >= blocks:
            raise BadValue(f"blocks {repeat.span} are to be repeated, the model has {blocks}; "
                           f"allowed are ranges within 0:{blocks}")
    for one, other in pairwise(sorted(repeats, key=lambda repeat: repeat.first)):
        if other.first <= one.last:
            raise BadValue(f"the repeated blocks {one.span} and {other.span} overlap; "
                           "allowed are ranges without a block in common")
    if len(_caches(type(network), network)) != blocks:
        raise Unsupported(f"{type(network).__module__} shares caches between blocks; "
                          "repeats do not cover that")


def install(network: nn.Module, repeats: Sequence[Repeat]) -> None:
    """Make blocks of the network repeat, in place, with gates of 0; raises as ``check_repeats``."""
    check_repeats(network, repeats)
    if not repeats:
        return
    blocks, own_class = [block.module for block in find_blocks(network)], type(network)
    passes: dict[int, int] = {}
    for repeat in repeats:
        span = _Span(repeat)
        for index in range(repeat.first, repeat.last + 1):
            block, passes[index] = blocks[index], repeat.passes
            block.__class__ = type(type(block).__name__, (RepeatedBlock, type(block)), {})
            block._span, block._index = span, index
        block.repeat_gates = mx.zeros(repeat.passes - 1)

    def make_cache(self: nn.Module) -> list[Any]:
        made = [_caches(own_class, self) for _ in range(max(passes.values()))]
        return [PassesCache(*(caches[index] for caches in made[:passes[index]]))
                if index in passes else first for index, first in enumerate(made[0])]

    network.__class__ = type(own_class.__name__, (own_class,), {
        "make_cache": make_cache, "__module__": own_class.__module__})


def _caches(network_class: type[nn.Module], network: nn.Module) -> list[Any]:
    """New caches of one pass, as ``network_class`` or else mlx-lm makes them."""
    if hasattr(network_class, "make_cache"):
        return network_class.make_cache(network)
    return [KVCache() for _ in find_blocks(network)]
