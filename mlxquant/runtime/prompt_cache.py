"""Keys and values of conversations, kept between calls and between sessions."""

from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import ref

import mlx.nn as nn
from mlx_lm.models.cache import (
    CacheList,
    KVCache,
    LRUPromptCache,
    QuantizedKVCache,
    can_trim_prompt_cache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)
from mlx_lm.utils import common_prefix_len

from mlxquant.base.errors import BadCheckpoint, first_line
from mlxquant.base.storage import new_file

_TOKENS = "tokens"


@dataclass
class PromptCache:
    """Keys and values of a conversation: where successive calls get the same object, only what
    follows the longest prefix shared with the last call is processed. ``draft_layers`` are those
    of a draft model. ``made_by`` are the networks of both, where they are known."""

    tokens: list[int] = field(default_factory=list)
    layers: list[Any] = field(default_factory=list)
    draft_layers: list[Any] = field(default_factory=list)
    made_by: list[ref[nn.Module]] = field(default_factory=list)

    @property
    def bits(self) -> set[int]:
        """The widths at which keys and values are held; empty where all are as they were."""
        return {layer.bits for layer in self.layers if hasattr(layer, "bits")}

    def reuse(self, network: nn.Module, prompt: list[int], draft: nn.Module | None = None,
              kv_bits: int | None = None) -> int:
        """Trim to the prefix that ``prompt``, without its last token, shares with the held tokens;
        returns its length. A cache that cannot be trimmed (a wrapped window), is held at another
        width than ``kv_bits``, or was made by another network, is replaced."""
        if draft is None:
            self.draft_layers = []
        networks = [network] if draft is None else [network, draft]
        shared = min(common_prefix_len(self.tokens, prompt), len(prompt) - 1)
        known = (len(self.sets()) == len(networks) and self.bits <= {kv_bits}
                 and self.may_be_of(*networks))
        if not known or not all(cut(layers, len(self.tokens) - shared) for layers in self.sets()):
            self.layers, shared = make_prompt_cache(network), 0
            self.draft_layers = make_prompt_cache(draft) if draft is not None else []
        self.tokens, self.made_by = self.tokens[:shared], [ref(each) for each in networks]
        return shared

    def may_be_of(self, *networks: nn.Module) -> bool:
        """Whether no other networks are known to have made the layers."""
        return all(known() is network for known, network in zip(self.made_by, networks))

    def record(self, fed: list[int]) -> None:
        """Record the tokens ``fed`` to the network in the last call, as far as all layers hold
        them."""
        known = self.tokens + fed
        held = min(len(known), *map(offset, self.sets()))
        if held and all(cut(layers, offset(layers) - held) for layers in self.sets()):
            self.tokens = known[:held]
        else:  # unknown contents: start afresh next time
            self.tokens, self.layers, self.draft_layers = [], [], []

    def shared(self, prompt: list[int]) -> "PromptCache":
        """A copy with the tokens that ``prompt`` begins with, and nothing of others: it is empty
        where they cannot be forgotten. It has no layers of a draft model."""
        length, layers = common_prefix_len(self.tokens, prompt), deepcopy(self.layers)
        if not length or not cut(layers, len(self.tokens) - length):
            return PromptCache()
        for layer in layers:
            _drop_room(layer)
        return PromptCache(self.tokens[:length], layers)

    def save(self, path: Path) -> None:
        """Write the tokens with their keys and values as safetensors, in one step."""
        with new_file(path) as scratch:
            named = scratch.with_suffix(".safetensors")  # the only ending that MLX writes
            save_prompt_cache(str(named), self.layers, {_TOKENS: " ".join(map(str, self.tokens))})
            named.replace(scratch)

    @classmethod
    def load(cls, path: Path) -> "PromptCache":
        """Read what ``save`` wrote, which fits the model it was made with and no other; raises
        ``BadCheckpoint`` for anything else."""
        try:
            layers, metadata = load_prompt_cache(str(path), return_metadata=True)
            tokens = [int(token) for token in metadata[_TOKENS].split()]
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadCheckpoint(f"{path} is no prompt cache: {first_line(error)}") from error
        return cls(tokens, layers)

    def sets(self) -> list[list[Any]]:
        """The layers of each model that has some."""
        return [layers for layers in (self.layers, self.draft_layers) if layers]


class PromptCaches:
    """The newest ``most`` conversations, of which any may be continued, held by mlx-lm's class."""

    def __init__(self, most: int):
        self._held = LRUPromptCache(most)

    def nearest(self, prompt: list[int]) -> PromptCache:
        """A copy of the cache that shares the longest prefix with ``prompt`` and can be trimmed to
        it, or an empty one."""
        sets, rest = self._held.fetch_nearest_cache(None, prompt)
        tokens = prompt[:len(prompt) - len(rest)]
        return PromptCache(tokens, *(list(layers.caches) for layers in sets or ()))

    def keep(self, cache: PromptCache) -> None:
        """Hold ``cache``, which must not change any more; it replaces caches of its prefixes."""
        if cache.tokens:
            sets = [CacheList(*layers) for layers in cache.sets()]
            self._held.insert_cache(None, cache.tokens, sets)


def takes_back(layers: list[Any]) -> bool:
    """Whether tokens can be taken back at any length, as guessing ahead needs; a sliding window
    that has wrapped cannot, nor can a recurrent state."""
    return can_trim_prompt_cache(layers) and not any(hasattr(layer, "max_size") for layer in layers)


def offset(layers: list[Any]) -> int:
    """How many tokens the layers have taken in."""
    return max((getattr(layer, "offset", 0) for layer in layers), default=0)


def cut(layers: list[Any], surplus: int) -> bool:
    """Forget the last ``surplus`` tokens; False where that cannot be done."""
    if surplus and not can_trim_prompt_cache(layers):
        return False
    if surplus > 0:
        trim_prompt_cache(layers, surplus)
    return True


def _drop_room(layer: Any) -> None:
    """Drop the room behind a layer's tokens, in which tokens taken back may still be."""
    if isinstance(layer, CacheList):
        for part in layer.caches:
            _drop_room(part)
    elif isinstance(layer, (KVCache, QuantizedKVCache)) and not layer.empty():
        layer.keys, layer.values = layer.keys_and_values()
