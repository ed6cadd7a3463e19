"""Bytes that decoding one token moves: weights once for each time they are used, and the KV cache."""

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from mlxquant.layers.grouped import GroupedLinear
from mlxquant.layers.packed import PackedGroup
from mlxquant.layers.repeated import RepeatedBlock
from mlxquant.layers.replicated import ReplicaInput, ReplicatedLinear

_QUANTISED = (nn.QuantizedLinear, nn.QuantizedEmbedding, QuantizedSwitchLinear)


def leaf_modules(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules that hold parameters, by path."""
    leaves = tree_flatten(network.leaf_modules(), is_leaf=nn.Module.is_module)
    return [(path, module) for path, module in leaves if isinstance(module, nn.Module)]


def loose_arrays(network: nn.Module) -> list[mx.array]:
    """Parameters beside child modules, such as a transformed layer's signs: no leaf holds them."""
    holders = [module for module in network.modules() if tree_flatten(module.children())]
    return [value for module in holders for key, value in module.items()
            if isinstance(value, mx.array) and module.valid_parameter_filter(module, key, value)]


def module_bytes(module: nn.Module) -> int:
    """Bytes of all parameters of a module, as held."""
    return sum(array.nbytes for _, array in tree_flatten(module.parameters()))


def float32_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters as float32, packed codes expanded."""
    if isinstance(module, ReplicaInput):
        return 0  # dense weights hold it
    if isinstance(module, (*_QUANTISED, GroupedLinear, ReplicatedLinear)):
        return 4 * (weight_count(module) + (module.bias.size if "bias" in module else 0))
    return 4 * sum(array.size for _, array in tree_flatten(module.parameters()))


def weight_count(module: nn.Module) -> int:
    """Number of weights of a module, counting packed codes one by one."""
    if isinstance(module, _QUANTISED):
        return module.weight.size * 32 // module.bits
    if isinstance(module, (GroupedLinear, PackedGroup, ReplicatedLinear)):
        return module.weight_count
    return module.weight.size if "weight" in module else 0


def parameters(network: nn.Module) -> int:
    """Number of weights of a network, packed codes counted one by one."""
    return sum(weight_count(module) for _, module in leaf_modules(network))


def body_bits_per_weight(network: nn.Module) -> float:
    """Stored bits per weight of the blocks' matrices, with scales and all that goes with them; biases,
    embedding and head apart."""
    body = [module for path, module in leaf_modules(network) if weight_count(module)
            and not isinstance(module, (nn.Embedding, nn.QuantizedEmbedding)) and not path.endswith("lm_head")
            and ("weight" not in module or module.weight.ndim >= 2)]
    inputs = {id(module.input): module.input for module in body if isinstance(module, ReplicatedLinear)}
    stored = sum(module_bytes(m) - (m.bias.nbytes if "bias" in m else 0) for m in body)
    stored += sum(module.stored_bytes for module in inputs.values())
    return 8 * (stored + sum(array.nbytes for array in loose_arrays(network))) / sum(map(weight_count, body))


def weight_bytes(network: nn.Module, config: dict, *, dense: bool = False, batch: int = 1) -> int:
    """Bytes of weights read for one token of each of ``batch`` sequences, as held, or as dense float32.

    An embedding counts as a row for each, unless it is tied and so is the head too.
    Of a mixture's experts only the chosen ones count, for a batch as many as it
    chooses on average. A block that runs again is read again: no chip's cache is
    counted on to hold it.
    """
    tied = _is_tied(network, config)
    chosen = config.get("num_experts_per_tok") or 1
    total = _read_once(network, tied, chosen, dense, batch)
    for block in network.modules():
        if isinstance(block, RepeatedBlock):
            total += (block.passes - 1) * _read_once(block, tied, chosen, dense, batch)
    return round(total)


def _share_of_experts(module: nn.Module, chosen: int, batch: int) -> float:
    """The share of a mixture's experts that ``batch`` tokens read, each choosing at random."""
    return 1 - (1 - chosen / module.weight.shape[0]) ** batch


def head_of(network: nn.Module, config: dict) -> nn.Module | None:
    """What turns hidden states into logits: the head, or the embedding where it is tied. In a prompt only
    the last token goes through it."""
    kinds = (nn.Embedding, nn.QuantizedEmbedding)
    for path, module in leaf_modules(network):
        if isinstance(module, kinds) if _is_tied(network, config) else path.endswith("lm_head"):
            return module
    return None


def operations_per_token(network: nn.Module, config: dict) -> int:
    """Multiply-adds with weights for one token, two operations each; attention to what was before apart."""
    tied, chosen = _is_tied(network, config), config.get("num_experts_per_tok") or 1

    def once(part: nn.Module) -> float:
        return sum(_operations(module, tied, chosen) for _, module in leaf_modules(part))

    again = ((block.passes - 1) * once(block) for block in network.modules() if isinstance(block, RepeatedBlock))
    return round(2 * (once(network) + sum(again)))


def _operations(module: nn.Module, tied: bool, chosen: int) -> float:
    if isinstance(module, (PackedGroup, ReplicatedLinear, ReplicaInput)):
        return module.operations()
    if isinstance(module, (nn.Embedding, nn.QuantizedEmbedding)) and not tied:
        return 0
    if isinstance(module, (SwitchLinear, QuantizedSwitchLinear)):
        return weight_count(module) * _share_of_experts(module, chosen, 1)
    return weight_count(module)


def _read_once(network: nn.Module, tied: bool, chosen: int, dense: bool, batch: int) -> float:
    total = _loose_bytes(network, dense)
    for _, module in leaf_modules(network):
        size = float32_bytes(module) if dense else module_bytes(module)
        if isinstance(module, (nn.Embedding, nn.QuantizedEmbedding)) and not tied:
            size *= batch / module.weight.shape[0]
        elif isinstance(module, (SwitchLinear, QuantizedSwitchLinear)):
            size *= _share_of_experts(module, chosen, batch)
        total += size
    return total


def kv_bytes(cache: list) -> int:
    """Bytes of keys, values and other state that a prompt cache holds: what the next token reads.

    MLX allocates keys and values in steps along their second-last axis; only
    the part up to the layer's offset counts.
    """
    total = 0.0
    for layer in cache:
        arrays = [array for _, array in tree_flatten(layer.state) if isinstance(array, mx.array)]
        offset = getattr(layer, "offset", None)
        for array in arrays:
            held = min(offset / array.shape[-2], 1.0) if offset is not None and array.ndim == 4 else 1.0
            total += array.nbytes * held
    return round(total)


def dense_bytes(network: nn.Module) -> int:
    """Bytes the network takes as float32 with every quantised matrix expanded."""
    return _loose_bytes(network, True) + sum(float32_bytes(m) for _, m in leaf_modules(network))


def _loose_bytes(network: nn.Module, dense: bool) -> int:
    """Bytes of the loose parameters; packed signs stay bits where all else becomes float32."""
    return sum(4 * array.size if dense and mx.issubdtype(array.dtype, mx.floating) else array.nbytes
               for array in loose_arrays(network))


def _is_tied(network: nn.Module, config: dict) -> bool:
    arguments = getattr(network, "args", None)
    tied = getattr(arguments, "tie_word_embeddings", None)
    return "lm_head" not in network if tied is None else bool(tied)
