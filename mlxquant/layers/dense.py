"""Expand a network's quantised matrices to dense ones, which are fastest on a plain CPU, in
calibration, and on a GPU for many tokens."""

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.utils import dequantize_model

from mlxquant.kernels.backend import is_cuda
from mlxquant.layers.grouped import GroupedLinear
from mlxquant.layers.replicated import ReplicaInput, Replicated, ReplicatedSwitchLinear
from mlxquant.layers.transformed import TransformedLinear


def to_dense(network: nn.Module, dtype: mx.Dtype = mx.float32) -> nn.Module:
    """Expand every quantised matrix of ``network`` in place: exactly, as float32, and then rounded
    to ``dtype``. Arrays are computed one after the other."""
    network = lazily_dense(network, dtype)
    for _, array in tree_flatten(network.parameters()):
        mx.eval(array)
    return network


def lazily_dense(network: nn.Module, dtype: mx.Dtype = mx.float32) -> nn.Module:
    """``to_dense`` as a lazy graph: an array is expanded when it is read. Only replicated experts
    are computed at once."""
    # MLX's CUDA back end has no 1-bit kernels.
    one_bit = any(getattr(module, "bits", None) == 1 for module in network.modules())
    with mx.stream(mx.cpu if one_bit and is_cuda() else mx.default_device()):
        network.set_dtype(mx.float32)
        network = dequantize_model(network)
        expand(network, GroupedLinear, Replicated)
        _fold_transforms(network)
        network.set_dtype(dtype)
    return network


def expanded_weight(module: nn.Module) -> mx.array:
    """The weight of a linear layer or an embedding of MLX, quantised in any mode or not: dense
    float32."""
    if not hasattr(module, "bits"):
        return module.weight.astype(mx.float32)
    return expanded(module.weight, module.scales, module.biases, module.group_size, module.bits,
                    module.mode)


def expanded(weight: mx.array, scales: mx.array, biases: mx.array | None, group_size: int,
             bits: int, mode: str = "affine") -> mx.array:
    """The matrix that these quantised arrays of MLX stand for, dense float32."""
    if biases is not None:  # affine: expanded as float32, not as what the scales are stored in
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    return mx.dequantize(weight, scales, biases, group_size, bits, mode, dtype=mx.float32)


def dense_layer(module: nn.QuantizedEmbedding | nn.QuantizedLinear) -> nn.Module:
    """``module`` with a dense float32 weight. Its scales are not cast before: rounding a scale to
    bfloat16 would shift a whole group."""
    with mx.stream(mx.cpu):  # the CUDA back end has no 1-bit kernels
        weight = expanded_weight(module)
    rows, columns = weight.shape
    dense = (nn.Embedding(rows, columns) if isinstance(module, nn.QuantizedEmbedding)
             else nn.Linear(columns, rows, bias="bias" in module))
    dense.weight = weight
    if "bias" in module:
        dense.bias = module.bias
    return dense


def _fold_transforms(network: nn.Module) -> None:
    """Multiply the transform of a dense layer's input into its weight, where it is linear."""
    made = []
    for path, module in network.named_modules():
        if (isinstance(module, TransformedLinear) and module.activation is None
                and isinstance(module.linear, nn.Linear)):
            module.linear.weight = module.untransform_weight(module.linear.weight)
            made.append((path, module.linear))
    network.update_modules(tree_unflatten(made))


def expand(network: nn.Module, *kinds: type[nn.Module]) -> None:
    """Replace layers of ``kinds`` by dense ones, in place: grouped layers in the type of their
    scales, replicated ones in float32. With ``Replicated``, modules ``ReplicaInput`` are removed,
    so that the parameters are those of a plain model."""
    made, modules = [], dict(network.named_modules())
    for path, module in modules.items():
        if isinstance(module, kinds):
            linear = _dense_linear(module)
            if "bias" in module:
                linear.bias = module.bias
            made.append((path, linear))
        elif isinstance(module, ReplicaInput) and Replicated in kinds:
            above, _, name = path.rpartition(".")
            del modules[above][name]
    network.update_modules(tree_unflatten(made))


def _dense_linear(module: nn.Module) -> nn.Module:
    """The layer of MLX or mlx-lm that computes the same from a dense weight, without the bias."""
    *experts, rows, columns = module.shape
    if not isinstance(module, ReplicatedSwitchLinear):
        linear = nn.Linear(columns, rows, bias=False)
        linear.weight = module.dense()
        return linear
    linear = SwitchLinear(1, 1, 1, bias=False)
    weights = []
    for expert in range(*experts):  # one at a time, so that temporaries do not add up
        weights.append(module.dense(mx.array([expert])))
        mx.eval(weights[-1])
    linear.weight = mx.concatenate(weights)
    return linear
