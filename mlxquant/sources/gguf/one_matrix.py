"""Whether a file's embedding and head are one matrix, stored twice in different types.

llama.cpp may write both for a model whose head is its embedding.
"""

import hashlib
from typing import Any

import gguf
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from gguf import GGML_QUANT_SIZES
from mlx.utils import tree_flatten

from mlxquant.base.errors import MlxquantError
from mlxquant.layers import outline
from mlxquant.sources.gguf.reader import GGUFTensor

_ROWS = 256  # about so many are compared


def one_matrix(config: dict[str, Any], tensors: dict[str, GGUFTensor]) -> dict[str, str] | None:
    """The paths of ``embedding`` and ``head``, and that of the ``finer`` of the two, where they
    differ only by rounding and the architecture can run with one matrix; else None. ``tensors`` are
    by mlx-lm's name."""
    names = {tensor.name: name for name, tensor in tensors.items()}
    if "output.weight" not in names:
        return None
    head, embedding = names["output.weight"], names["token_embd.weight"]
    if not (_alike(tensors[embedding], tensors[head])
            and _runs_with_one(config, tensors.keys() - {head})):
        return None
    finer = max((head, embedding), key=lambda name: _bits(tensors[name]))
    return {kind: name.removesuffix(".weight") for kind, name in (
        ("embedding", embedding), ("head", head), ("finer", finer))}


def digest(weight: mx.array) -> str:
    """A hash of a matrix's first rows as stored, by which to recognise it later."""
    return hashlib.sha256(np.array(weight[:_ROWS].view(mx.uint8)).tobytes()).hexdigest()[:16]


def _alike(one: GGUFTensor, other: GGUFTensor) -> bool:
    """Whether two matrices differ by no more than twice what rounding to the coarser type usually
    changes, which is some 2 · 2⁻ᵇ of their norm for b bits a weight. Some rows are compared."""
    if one.shape != other.shape:
        return False
    coarse, fine = sorted((one, other), key=_bits)
    allowed = min(0.6, max(0.01, 4 * 2**-_bits(coarse)))  # 0.01: bfloat16
    with np.errstate(all="ignore"):  # what is not finite is refused where it is stored
        a, b = _some(coarse), _some(fine)
        return bool(np.linalg.norm(a - b) <= allowed * np.linalg.norm(b))


def _bits(tensor: GGUFTensor) -> float:
    """Bits per weight in the file."""
    block, block_bytes = GGML_QUANT_SIZES[tensor.type]
    return 8 * block_bytes / block


def _some(tensor: GGUFTensor) -> np.ndarray:
    """Values of some rows, float32."""
    rows = tensor.shape[0]
    blocks = np.memmap(tensor.path, np.uint8, "r", tensor.begin, (rows, tensor.row_bytes))
    some = np.ascontiguousarray(blocks[::max(1, rows // _ROWS)])
    return np.asarray(gguf.dequantize(some, tensor.type), np.float32)


def _runs_with_one(config: dict[str, Any], names: set[str]) -> bool:
    """Whether mlx-lm's model without a head of its own has these parameters, and gives logits when
    they are quantised. Nothing is computed."""
    tied = config | {"tie_word_embeddings": True}
    try:
        network = outline.drop_tied_head(outline.network_of(tied), tied)
        if {name for name, _ in tree_flatten(network.parameters())} != names:
            return False
        nn.quantize(network, 32, 8, class_predicate=lambda _, module: (
            hasattr(module, "to_quantized") and module.weight.shape[-1] % 32 == 0))
        return network(mx.zeros((1, 1), mx.int32)).shape[-1] == config["vocab_size"]
    except (MlxquantError, ValueError, TypeError, KeyError, AttributeError):
        return False
