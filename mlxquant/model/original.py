"""Open a model to quantise it: a matrix that its file holds twice is opened once.

The import of a GGUF file keeps both copies, and notes where embedding and head are one matrix
(``sources/gguf/one_matrix.py``). Here the finer copy replaces both.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlxquant.base.storage import state_of
from mlxquant.layers import outline
from mlxquant.layers.formats import stored_entry
from mlxquant.model.loading import open_lazily
from mlxquant.sources import checkpoint
from mlxquant.sources.gguf.one_matrix import digest

NOTE = "one_matrix"  # in what a configuration says of its import


def open_original(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The network and configuration of ``folder``, with its weights still on disk."""
    network, config = open_lazily(folder)
    once = without_second(config)
    if once is config or not _as_imported(folder, config):
        return network, config
    found, modules = config["mlxquant_import"][NOTE], dict(network.named_modules())
    embedding, head, finer = (found[key] for key in ("embedding", "head", "finer"))
    entries = {path: stored_entry(module) if hasattr(module, "bits") else False
               for path, module in modules.items() if hasattr(module, "to_quantized")
               or hasattr(module, "bits")}
    entries[embedding] = entries[finer]
    del entries[head]
    once |= {"quantization": {"group_size": 64, "bits": 4} | entries}
    made = outline.drop_tied_head(outline.network_of(once), once).eval()
    arrays = dict[str, Any]()
    for path, array in tree_flatten(network.parameters()):
        if path.startswith(f"{finer}."):
            arrays[f"{embedding}.{path.removeprefix(f'{finer}.')}"] = array
        elif not path.startswith((f"{embedding}.", f"{head}.")):
            arrays[path] = array
    made.update(tree_unflatten(list(arrays.items())))
    return made, once


def without_second(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of the model with one matrix for embedding and head, where its file holds
    that matrix twice; otherwise ``config`` itself. Its entries on storage formats are unchanged."""
    told = config.get("mlxquant_import", {})
    if NOTE not in told or config["tie_word_embeddings"]:
        return config
    # The note must go: a quantised result may have a head of its own again (a fused rotation).
    told = {key: value for key, value in told.items() if key != NOTE}
    return config | {"tie_word_embeddings": True, "mlxquant_import": told}


def _as_imported(folder: Path, config: dict[str, Any]) -> bool:
    """Whether the head still is what the import wrote: other tools keep what a configuration says
    when they train or convert a model."""
    found = config["mlxquant_import"][NOTE]
    state = state_of(checkpoint.weight_files(folder))
    return _head_digest(folder, found["head"], state) == found.get("digest")


@lru_cache(maxsize=8)
def _head_digest(folder: Path, head: str, _state: tuple[Any, ...]) -> str:
    """Kept for as long as the files do not change: it reads the whole head."""
    network, _ = open_lazily(folder)
    return digest(dict(network.named_modules())[head].weight)
