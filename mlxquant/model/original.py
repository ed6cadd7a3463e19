"""A model as it is quantised: a matrix that its file holds twice is there once.

Of a model whose head is its embedding llama.cpp may write both, in types of their own, and the
import keeps what a file says. Here the one in more bits serves in the place of both.
"""

from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlxquant.layers import outline
from mlxquant.model.loading import open_lazily


def open_original(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The network and configuration of ``folder``, with its weights still on disk."""
    network, config = open_lazily(folder)
    once = without_second(config)
    if once is config:
        return network, config
    found = config["mlxquant_import"]["one_matrix"]
    both, finer = (f"{found['embedding']}.", f"{found['head']}."), f"{found['finer']}."
    arrays = dict[str, Any]()
    for path, array in tree_flatten(network.parameters()):
        if path.startswith(finer):
            arrays[both[0] + path.removeprefix(finer)] = array
        elif not path.startswith(both):
            arrays[path] = array
    made = outline.network_of(once).eval()
    if found["head"] in dict(made.named_modules()):  # some drop it when they see the weights
        made.sanitize({})
    made.update(tree_unflatten(list(arrays.items())))
    return made, once


def without_second(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of the model with one matrix for embedding and head, where its file holds
    that twice (``Imported.one_matrix``); ``config`` itself where not."""
    found = config.get("mlxquant_import", {}).get("one_matrix")
    if not found or config["tie_word_embeddings"]:
        return config
    changed = config | {"tie_word_embeddings": True}
    if stored := outline.quantization_of(config):
        entry = found["bits"] < 16 and {"group_size": stored["group_size"], "bits": found["bits"]}
        rest = {path: value for path, value in stored.items() if path != found["head"]}
        changed |= dict.fromkeys(("quantization", "quantization_config"),
                                 rest | {found["embedding"]: entry})
    return changed
