"""How much the model's predictions suffer from an error in one layer's weight.

For a small weight error E of a layer y = W x, the divergence KL(model ‖ perturbed model) is ½ of
E's square under the Fisher information. K-FAC (Martens & Grosse 2015,
https://arxiv.org/abs/1503.05671) factors that information into F ⊗ H, with H = E[x xᵀ] of the
inputs and F = E[g gᵀ] of the gradients g that reach the outputs; here F is kept by its diagonal,
one number an output. SqueezeLLM (https://arxiv.org/abs/2306.07629) weights quantization errors with
the Fisher information of single weights in the same spirit.

Labels are drawn from the model itself, so this is the true Fisher information, the curvature of
that divergence; the text's own next tokens would give the empirical one, which is no curvature of
anything.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxquant.layers.hooks import intercepted
from mlxquant.quantise.profile import step

Shifts = dict[str, list[mx.array]]  # by layer, what is added to the outputs of each of its calls


@step("gradients")
def output_importance(network: nn.Module, layers: dict[str, nn.Module], tokens: list[mx.array],
                      seed: int = 0) -> dict[str, mx.array]:
    """F by layer: the mean over tokens of each output's squared gradient of the log-likelihood.

    ``network`` is a dense float32 mlx-lm model, ``layers`` are those of its linear layers and
    stacks of experts that are asked about, by path, and ``tokens`` batches (batch, length) of
    ids. Every position is given one label drawn from the model's distribution there, the same
    for the same ``seed``; a batch that is listed again draws anew. Values are (m,) float32 in
    nats² per unit of output², of experts summed over those that a token chose; a layer that is
    not called gets zeros. The gradient takes in what an output does to later positions. Memory
    is that of one batch's activations.
    """
    count = sum(batch.size for batch in tokens)
    sums = {path: mx.zeros(layer.weight.shape[-2]) for path, layer in layers.items()}
    for batch, key in zip(tokens, mx.random.split(mx.random.key(seed), len(tokens))):
        zeros: Shifts = {}
        _run(network, layers, batch, partial(_note_shape, zeros))
        gradients = mx.grad(_log_likelihood)(zeros, network, layers, batch, key)
        for path, calls in gradients.items():
            sums[path] += sum(mx.square(g).reshape(-1, g.shape[-1]).sum(0) for g in calls)
        mx.eval(sums)
    return {path: total / count for path, total in sums.items()}


def _note_shape(zeros: Shifts, path: str, output: mx.array) -> None:
    zeros.setdefault(path, []).append(mx.zeros(output.shape))


def _log_likelihood(shifts: Shifts, network: nn.Module, layers: dict[str, nn.Module],
                    batch: mx.array, key: mx.array) -> mx.array:
    """Of labels drawn by ``key``, with ``shifts`` added to the layers' outputs."""
    left = {path: iter(calls) for path, calls in shifts.items()}
    logits = _run(network, layers, batch, lambda path, y: y + next(left[path])).astype(mx.float32)
    labels = mx.random.categorical(mx.stop_gradient(logits), key=key)
    return -nn.losses.cross_entropy(logits, labels, reduction="sum")


def _run(network: nn.Module, layers: dict[str, nn.Module], batch: mx.array,
         change: Callable[[str, mx.array], mx.array | None]) -> mx.array:
    """The network's logits where ``change(path, y)`` takes the place of a layer's output y, unless
    it is None."""
    paths = {id(layer): path for path, layer in layers.items()}

    def through(module: nn.Module, own: Callable[..., Any], args: tuple[Any, ...],
                kwargs: dict[str, Any]) -> mx.array:
        output = own(*args, **kwargs)
        changed = change(paths[id(module)], output)
        return output if changed is None else changed

    with intercepted(layers.values(), through):
        return network(batch)


def expected_divergence(error: mx.array, hessian: mx.array, importance: mx.array) -> float:
    """KL(model ‖ perturbed model) in nats per token that a weight error is expected to cost.

    ½ Σᵢ Fᵢ eᵢ H eᵢᵀ over the rows eᵢ of ``error`` (m, n), for ``hessian``
    E[x xᵀ] (n, n) and ``importance`` F (m,). It is second order, and leaves
    out what errors of different outputs or positions do together.
    """
    error = error.astype(mx.float32)
    return 0.5 * (importance @ ((error @ hessian) * error).sum(1)).item()
