"""How much the model's predictions suffer from an error in one layer's weight.

For a small weight error E of a layer y = W x, the divergence KL(model ‖ perturbed model) is ½ of
E's square under the Fisher information. K-FAC (Martens & Grosse 2015,
https://arxiv.org/abs/1503.05671) factors that information into F ⊗ H, with H = E[x xᵀ] of the
inputs and F = E[g gᵀ] of the gradients g that reach the outputs; here F is kept by its diagonal,
one number an output. SqueezeLLM (https://arxiv.org/abs/2306.07629) weights quantization errors with
the Fisher information of single weights in the same spirit.

Labels are drawn from the model itself, so this is the true Fisher information, the curvature of
that divergence; the text's own next tokens would give the empirical Fisher, which is not its
curvature.
"""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxquant.base.errors import Unsupported, first_line
from mlxquant.base.trees import floats, with_floats
from mlxquant.layers.blocks import Block, find_blocks
from mlxquant.layers.head import Judge
from mlxquant.layers.hooks import intercepted
from mlxquant.quantise.backward import Backward, BackwardCall
from mlxquant.quantise.observe import linears
from mlxquant.quantise.profile import step


def check_gradients(network: nn.Module, blocks: list[Block], architecture: str) -> None:
    """Raises ``Unsupported`` where gradients cannot go back through the ``blocks`` that are to be
    weighed. Nothing is computed."""
    if not blocks[0].path:
        raise Unsupported(f"{architecture} takes no target: its blocks are not called one by one")

    def total(moved: mx.array) -> mx.array:
        def through(_: nn.Module, own: Callable[..., Any], *given: Any) -> Any:
            args, kwargs = with_floats(given, [x + moved.astype(x.dtype) for x in floats(given)])
            return own(*args, **kwargs)

        with intercepted((block.module for block in blocks), through):
            return network(mx.zeros((1, 4), mx.int32)).sum()

    try:
        mx.grad(total)(mx.array(0.0))
    except (ValueError, RuntimeError) as error:
        raise Unsupported(f"{architecture} takes no target: {first_line(error)}") from error


@step("gradients")
def output_importance(opened: Callable[[], nn.Module], tokens: Sequence[mx.array],
                      seed: int = 0) -> dict[str, mx.array]:
    """F (m,) float32 by the path of each linear layer and stack of experts in a block: the mean
    over tokens of each output's squared gradient of the log-likelihood, in nats² per output².

    Each call of ``opened`` gives a new dense float32 mlx-lm model whose arrays are still on disk
    (``backward.py``); ``tokens`` are batches (batch, length) of ids. Every position gets one label
    drawn from the model's distribution there, the same for the same ``seed``; a batch that is
    listed again draws new labels. For experts F is summed over those that a token chose; a layer
    that is not called gets zeros. Gradients include an output's effect on later positions. Raises
    ``Unsupported`` where one is not finite.
    """
    count = sum(batch.size for batch in tokens)
    sums = {block.full(path): mx.zeros(layer.weight.shape[-2]) for block in find_blocks(opened())
            for path, layer in linears(block.module).items()}
    for batch, key in zip(tokens, mx.random.split(mx.random.key(seed), len(tokens))):
        for call, go_on in Backward(opened, batch).calls(_log_likelihood(key)):
            squares, by_inputs = _squares(call)
            for path, found in squares:
                sums[call.block.full(path)] += found
                if not mx.isfinite(found).all():
                    raise Unsupported(f"the gradient at {call.block.full(path)} is not finite, so "
                                      "layers cannot be weighed for a target; leave it out")
            mx.eval(sums, by_inputs)
            go_on(by_inputs)
    return {path: total / count for path, total in sums.items()}


def _log_likelihood(key: mx.array) -> Judge:
    """A judge: the log-likelihood of labels that are drawn from the logits by ``key``."""
    def judge(logits: mx.array, place: slice) -> mx.array:
        labels = mx.random.categorical(mx.stop_gradient(logits),
                                       key=mx.random.split(key, place.start + 2)[-1])
        return -nn.losses.cross_entropy(logits, labels, reduction="sum")

    return judge


def _squares(call: BackwardCall) -> tuple[list[tuple[str, mx.array]], list[mx.array]]:
    """(path, sums (m,) of its outputs' squared gradients) for each call of a layer in the block;
    and the gradients by the block's float arguments."""
    inputs, shapes = floats(call.given), list[tuple[str, mx.array]]()
    _run(call, inputs, lambda path, y: shapes.append((path, mx.zeros(y.shape))))
    zeros = [zero for _, zero in shapes]

    def moved(arrays: list[mx.array]) -> Any:
        left = iter(arrays)
        return _run(call, arrays[len(zeros):], lambda _, y: y + next(left))

    slopes = call.vjp(moved, [*zeros, *inputs])
    return [(path, mx.square(slope).reshape(-1, slope.shape[-1]).sum(0))
            for (path, _), slope in zip(shapes, slopes)], slopes[len(zeros):]


def _run(call: BackwardCall, inputs: list[mx.array],
         change: Callable[[str, mx.array], mx.array | None]) -> Any:
    """The block's output for other ``inputs`` in place of its float arguments. ``change(path, y)``
    replaces a layer's output y, unless it returns None."""
    layers = linears(call.block.module)
    paths = {id(layer): path for path, layer in layers.items()}

    def through(module: nn.Module, own: Callable[..., Any], args: tuple[Any, ...],
                kwargs: dict[str, Any]) -> mx.array:
        output = own(*args, **kwargs)
        changed = change(paths[id(module)], output)
        return output if changed is None else changed

    args, kwargs = with_floats(call.given, inputs)
    with intercepted(layers.values(), through):
        return call.block.module(*args, **kwargs)


def expected_divergence(error: mx.array, hessian: mx.array, importance: mx.array) -> float:
    """KL(model ‖ perturbed model) in nats per token that a weight error is expected to cost.

    ½ Σᵢ Fᵢ eᵢ H eᵢᵀ over the rows eᵢ of ``error`` (m, n), for ``hessian``
    E[x xᵀ] (n, n) and ``importance`` F (m,). It is second order, and ignores
    interactions between errors of different outputs or positions.
    """
    error = error.astype(mx.float32)
    return 0.5 * (importance @ ((error @ hessian) * error).sum(1)).item()
