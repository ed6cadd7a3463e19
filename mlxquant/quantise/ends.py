"""What storing embedding and head in fewer bits costs a model's predictions.

In a small model with a large vocabulary they are much of the folder, and every token reads the
whole head. The cost of their errors is not estimated but measured: the model runs with both rounded
to each width.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from mlxquant.layers.by_block import judged
from mlxquant.layers.dense import expanded, lazily_dense
from mlxquant.layers.head import logits_bytes
from mlxquant.model.original import open_original
from mlxquant.quantise.assembly import Outside, outside
from mlxquant.quantise.job import Job
from mlxquant.quantise.profile import step

WIDTHS = (3, 4, 5, 6, 8)
_ROWS, _LENGTH = 4, 256  # of the text: the divergence is known to some 3 % then
_LOGITS = 4.5  # arrays of some tokens' predictions


@step("ends")
def divergences(folder: Path, tokens: np.ndarray) -> list[tuple[int, float]]:
    """KL(model ‖ model with embedding and head in so many bits) in nats per token, for each of
    ``WIDTHS``, over parts of ``tokens`` (sequences, length). The model is read once for each, in
    float32, and held block by block."""
    rows = mx.array(tokens[:_ROWS, :_LENGTH])
    wanted = list(_predictions(lazily_dense(open_original(folder)[0]), rows))
    found = []
    for bits in WIDTHS:
        network, config = open_original(folder)
        rounded = _weights(outside(network, config, Job(embedding_bits=bits)))
        network = lazily_dense(network)
        network.update(tree_unflatten(rounded))
        lost = [nn.losses.kl_div_loss(made, right, reduction="sum").item() / rows.size
                for made, right in zip(_predictions(network, rows), wanted)]
        # Rounding can make it negative; a width whose logits are not finite costs infinitely much.
        nats = sum(lost)
        found.append((bits, max(0.0, nats) if math.isfinite(nats) else math.inf))
    return found


def bytes_held(outside: float, block: float, vocabulary: int) -> float:
    """The most bytes that ``divergences`` holds, for a model with so many float32 bytes ``outside``
    its blocks and in its largest ``block``."""
    tokens = _ROWS * _LENGTH
    return (2 * outside + 4 * vocabulary * tokens
            + max(block, _LOGITS * logits_bytes(tokens, vocabulary)))


def _predictions(network: nn.Module, rows: mx.array) -> Iterator[mx.array]:
    """Log-probabilities (tokens, vocabulary) of the next token, float32, chunk by chunk, of a
    network whose arrays are still on disk."""
    def judge(logits: mx.array, _: slice) -> mx.array:
        return nn.log_softmax(logits, axis=-1)

    for made in judged(network, rows, judge, once=True):
        mx.eval(made)
        yield made


def _weights(rounded: Outside) -> list[tuple[str, mx.array]]:
    """Dense weights of what is quantised outside the blocks, by name."""
    parts = rounded.tensors
    return [(f"{path}.weight", expanded(parts[f"{path}.weight"], parts[f"{path}.scales"],
                                        parts.get(f"{path}.biases"), **entry))
            for path, entry in rounded.entries.items()]
