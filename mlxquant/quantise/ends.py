"""What storing embedding and head in fewer bits costs a model's predictions.

In a small model with a large vocabulary they are much of the folder, and every token reads the
whole head. What their errors cost is not foretold but measured: the model predicts with both as
each width would store them.
"""

import math
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlxquant.layers.dense import expanded, to_dense
from mlxquant.model.loading import open_lazily
from mlxquant.quantise.assembly import Outside, outside
from mlxquant.quantise.job import Job
from mlxquant.quantise.profile import step

WIDTHS = (3, 4, 5, 6, 8)
_ROWS, _LENGTH = 4, 256  # of the text: the divergence is known to some 3 % then


@step("ends")
def divergences(folder: Path, tokens: np.ndarray) -> list[tuple[int, float]]:
    """KL(model ‖ model with embedding and head in so many bits) in nats per token, for each of
    ``WIDTHS``, over parts of ``tokens`` (sequences, length). The model is held in float32."""
    network = to_dense(open_lazily(folder)[0])
    rows = [mx.array(row[None, :_LENGTH]) for row in tokens[:_ROWS]]
    own, wanted = tree_flatten(network.parameters()), [_predictions(network, row) for row in rows]
    found = []
    for bits in WIDTHS:
        rounded = outside(*open_lazily(folder), Job(embedding_bits=bits))
        network.update(tree_unflatten(_weights(rounded)))
        lost = [nn.losses.kl_div_loss(_predictions(network, row), right, reduction="mean").item()
                for row, right in zip(rows, wanted)]
        # Below 0 by rounding alone; what predicts no numbers is left as it is.
        found.append((bits, sum(max(0.0, nats) if math.isfinite(nats) else math.inf
                                for nats in lost) / len(lost)))
        network.update(tree_unflatten(own))
    return found


def _predictions(network: nn.Module, row: mx.array) -> mx.array:
    """The logarithms of the probabilities behind each token, float32."""
    made = nn.log_softmax(network(row).astype(mx.float32), axis=-1)
    mx.eval(made)
    return made


def _weights(rounded: Outside) -> list[tuple[str, mx.array]]:
    """Dense weights of what is quantised outside the blocks, by name."""
    parts = rounded.tensors
    return [(f"{path}.weight", expanded(parts[f"{path}.weight"], parts[f"{path}.scales"],
                                        parts.get(f"{path}.biases"), **entry))
            for path, entry in rounded.entries.items()]
