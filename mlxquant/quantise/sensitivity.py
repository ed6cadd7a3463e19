"""How much the model's predictions suffer from an error in one layer's weight.

For a small weight error E of a layer y = W x, the divergence
KL(model ‖ perturbed model) is ½ of E's square under the Fisher information.
K-FAC (Martens & Grosse 2015, https://arxiv.org/abs/1503.05671) factors that
information into F ⊗ H, with H = E[x xᵀ] of the inputs and F = E[g gᵀ] of the
gradients g that reach the outputs; here F is kept by its diagonal, one number
an output. SqueezeLLM (https://arxiv.org/abs/2306.07629) weights quantization
errors with the Fisher information of single weights in the same spirit.

Labels are drawn from the model itself, so this is the true Fisher information,
the curvature of that divergence; the text's own next tokens would give the
empirical one, which is no curvature of anything.
"""

import mlx.core as mx
import mlx.nn as nn

from mlxquant.base.errors import BadValue
from mlxquant.layers.traffic import leaf_modules
from mlxquant.quantise.capture import linears, replace


class _Shifted(nn.Module):
    """A linear layer with an array added to its outputs: the thing to differentiate by."""

    def __init__(self, linear: nn.Linear, path: str, shifts: dict[str, mx.array]):
        super().__init__()
        self.linear = linear
        # a bound method, as a dict would become part of the module's tree
        self._path, self._shift = path, shifts.__getitem__

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear(x) + self._shift(self._path)


def output_importance(network: nn.Module, tokens: list[mx.array], seed: int = 0) -> dict[str, mx.array]:
    """F by layer: the mean over tokens of the squared gradient of the log-likelihood by each output.

    ``network`` is a dense float32 mlx-lm model, ``tokens`` batches (batch,
    length) of ids. Every position is given one label drawn from the model's
    distribution there, the same for the same ``seed``; a batch that is listed
    again draws anew. Keys are the paths of the linear layers inside
    ``network.layers``, values (m,) float32 in nats² per unit of output². The
    gradient takes in what an output does to later positions. Memory is that of
    one batch's activations. Raises ``BadValue`` where there are no tokens.
    """
    count = sum(batch.size for batch in tokens)
    if not count:
        raise BadValue("tokens is empty, the importance of outputs needs at least one batch with a token")
    originals = _inner_linears(network)
    shifts: dict[str, mx.array] = {}
    sums = {path: mx.zeros(len(linear.weight)) for path, linear in originals.items()}

    def log_likelihood(added: dict[str, mx.array], batch: mx.array, key: mx.array) -> mx.array:
        shifts.update(added)
        logits = network(batch).astype(mx.float32)
        labels = mx.random.categorical(mx.stop_gradient(logits), key=key)
        return -nn.losses.cross_entropy(logits, labels, reduction="sum")

    try:
        replace(network, {path: _Shifted(m, path, shifts) for path, m in originals.items()})
        for batch, key in zip(tokens, mx.random.split(mx.random.key(seed), len(tokens))):
            zeros = {path: mx.zeros((*batch.shape, len(m.weight))) for path, m in originals.items()}
            gradients = mx.grad(log_likelihood)(zeros, batch, key)
            for path, gradient in gradients.items():
                sums[path] += mx.square(gradient).sum((0, 1))
            mx.eval(sums)
    finally:
        replace(network, originals)
    return {path: total / count for path, total in sums.items()}


def expected_divergence(error: mx.array, hessian: mx.array, importance: mx.array) -> float:
    """KL(model ‖ perturbed model) in nats per token that a weight error is expected to cost.

    ½ Σᵢ Fᵢ eᵢ H eᵢᵀ over the rows eᵢ of ``error`` (m, n), for ``hessian``
    E[x xᵀ] (n, n) and ``importance`` F (m,). It is second order, and leaves
    out what errors of different outputs or positions do together.
    """
    error = error.astype(mx.float32)
    return 0.5 * (importance @ ((error @ hessian) * error).sum(1)).item()


def _inner_linears(network: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of the blocks by full path: not those of the head."""
    inside = {id(module) for block in network.layers for _, module in leaf_modules(block)}
    return {path: module for path, module in linears(network).items() if id(module) in inside}
