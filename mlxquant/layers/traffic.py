"""What decoding one token moves and computes: weights, once for each time they are used, and the
KV cache."""

from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from mlxquant.base.trees import arrays
from mlxquant.kernels import code_order
from mlxquant.layers.blocks import blocks_or_itself, find_blocks, inside, shape_of
from mlxquant.layers.grouped import GroupedLinear
from mlxquant.layers.packed import FEW_TOKENS, PackedCodes
from mlxquant.layers.packed_experts import EXPANDED, PackedSwitchLinear
from mlxquant.layers.repeated import RepeatedBlock
from mlxquant.layers.replicated import ReplicaInput, Replicated, ReplicatedSwitchLinear
from mlxquant.layers.transformed import TransformedLinear
from mlxquant.layers.unpacked import UnpackedExperts
from mlxquant.machine.memory import DENSE_SHARE

_EMBEDDINGS = (nn.Embedding, nn.QuantizedEmbedding)
_EXPERTS = (SwitchLinear, QuantizedSwitchLinear, ReplicatedSwitchLinear, PackedSwitchLinear,
            UnpackedExperts)
# How configurations and routers call the number of experts that a token is sent to.
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "top_k", "top_k_experts", "moe_topk",
           "moe_top_k", "moe_k")
_LOOPS = ("loop_num", "num_loops")  # how networks call the times that all their blocks run in turn
Measure = Callable[[nn.Module], int]  # bytes of the parameters that a module holds by itself


@dataclass(frozen=True)
class Part:
    """A module that holds parameters by itself, and how a token uses it: ``passes`` times, and of
    its ``pool`` of equal parts (experts, or an embedding's rows) only so many as ``chosen``."""

    path: str
    module: nn.Module
    passes: int = 1
    pool: int = 1
    chosen: int = 1

    def share(self, tokens: int = 1) -> float:
        """The share of it that ``tokens`` tokens read together, each choosing by chance."""
        if isinstance(self.module, _EMBEDDINGS) and self.pool > 1:
            return tokens / self.pool
        return 1 - (1 - self.chosen / self.pool) ** tokens

    def operations(self, batch: int = 1) -> float:
        """Multiply-adds for one of ``batch`` tokens in one pass: with many, the codes of replicas
        are expanded once, and then a weight takes one (but for the rotation, which is little)."""
        replicas = isinstance(self.module, (PackedCodes, Replicated)) and batch <= FEW_TOKENS
        if replicas or isinstance(self.module, ReplicaInput):
            return self.module.operations() * self.share()
        looked_up = isinstance(self.module, _EMBEDDINGS) and self.pool > 1
        return 0 if looked_up else weight_count(self.module) * self.share()


def parts(network: nn.Module) -> Iterator[Part]:
    """All that holds parameters, each module by itself, in the order of the tree."""
    modules = dict(network.named_modules())
    head = head_of(network)
    repeated = {path: module for path, module in modules.items()
                if isinstance(module, RepeatedBlock)}
    loops = max(getattr(module, name, 1) for module in modules.values() for name in _LOOPS)
    looped = inside(find_blocks(network)) if loops > 1 else ()
    for path, module in modules.items():
        if not own_arrays(module):
            continue
        passes = prod(block.passes for above, block in repeated.items()
                      if f"{path}.".startswith(f"{above}."))
        passes *= loops if path.startswith(looped) else 1
        pool = _experts(path, module, modules)
        if isinstance(module, _EMBEDDINGS) and module is not head:
            yield Part(path, module, passes, len(module.weight))
        else:
            yield Part(path, module, passes, pool, _chosen(path, modules, pool) if pool > 1 else 1)


def leaf_modules(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules that hold parameters, by path."""
    leaves = tree_flatten(network.leaf_modules(), is_leaf=nn.Module.is_module)
    return [(path, module) for path, module in leaves if isinstance(module, nn.Module)]


def own_arrays(module: nn.Module) -> dict[str, mx.array]:
    """The parameters that a module holds by itself, beside its child modules, by name."""
    return {key: value for key, value in module.items() if isinstance(value, mx.array)
            and module.valid_parameter_filter(module, key, value)}


def own_bytes(module: nn.Module) -> int:
    """Bytes of the parameters that a module holds by itself, as held."""
    return sum(array.nbytes for array in own_arrays(module).values())


def float32_bytes(module: nn.Module) -> int:
    """Bytes of a module's own parameters as float32, packed codes expanded, signs still as bits."""
    if isinstance(module, ReplicaInput):
        return 0  # dense weights hold it
    if "codes" in module or ("scales" in module and hasattr(module, "bits")):
        return 4 * (weight_count(module) + (module.bias.size if "bias" in module else 0))
    return cpu_bytes(module)


def cpu_bytes(module: nn.Module) -> int:
    """Bytes of a module's own parameters on a plain CPU that does not expand them: floats as
    float32. Codes in groups that MLX has no kernel for are expanded all the same."""
    if isinstance(module, GroupedLinear):
        return float32_bytes(module)
    return sum(4 * array.size if mx.issubdtype(array.dtype, mx.floating) else array.nbytes
               for array in own_arrays(module).values())


def gpu_bytes(module: nn.Module) -> int:
    """Bytes of a module's own parameters on a GPU, where replicated codes lie in the kernels' order
    beside float32 scales of their inputs, and codes in groups that MLX has no kernel for are
    expanded in the type of their scales."""
    if isinstance(module, GroupedLinear):
        bias = module.bias.nbytes if "bias" in module else 0
        return module.scales.itemsize * weight_count(module) + bias
    if isinstance(module, ReplicaInput):
        return cpu_bytes(module)
    if isinstance(module, Replicated):
        *rows, columns = module.shape
        codes = prod(rows) * code_order.row_bytes(module.input.spec.bits, columns)
        return own_bytes(module) - module.codes.nbytes + codes
    return own_bytes(module)


def as_held(network: nn.Module, on_cpu: bool, memory: float) -> Measure:
    """How a machine holds the modules of a network: a GPU, or a plain CPU, which expands all to
    float32 where the ``memory`` in bytes has room for it."""
    if not on_cpu:
        return gpu_bytes
    return float32_bytes if dense_bytes(network) <= DENSE_SHARE * memory else cpu_bytes


def weight_count(module: nn.Module) -> int:
    """Number of weights of a module, counting packed codes one by one."""
    return prod(shape_of(module)) if "codes" in module or "weight" in module else 0


def parameters(network: nn.Module) -> int:
    """Number of weights of a network, packed codes counted one by one."""
    return sum(weight_count(module) for _, module in leaf_modules(network))


def active_parameters(network: nn.Module) -> int:
    """The same without the experts that a token is not sent to."""
    return round(sum(weight_count(part.module) * (1 if isinstance(part.module, _EMBEDDINGS)
                                                  else part.share()) for part in parts(network)))


def body_bits_per_weight(network: nn.Module) -> float:
    """Stored bits per weight of the blocks' matrices, with scales and all that goes with them;
    biases, embedding and head apart."""
    bits, weights = body_bits(network)
    return bits / weights


def body_bits(network: nn.Module, apart: Container[str] = ()) -> tuple[int, int]:
    """The bits that the blocks' matrices store so, but for those at the paths ``apart``; and the
    number of weights of all."""
    body = [(block.full(path), module) for block in blocks_or_itself(network)
            for path, module in block.module.named_modules()]
    matrices = [(path, m) for path, m in body
                if weight_count(m) and ("weight" not in m or m.weight.ndim >= 2)]
    stored = [array.nbytes for path, module in matrices if path not in apart
              for name, array in own_arrays(module).items()
              if name != "bias" and not ("weight" in module and array.ndim == 1)]
    stored += [own_bytes(m) for _, m in body if isinstance(m, (ReplicaInput, TransformedLinear))]
    return 8 * sum(stored), sum(weight_count(m) for _, m in matrices)


def expanded_at_once(network: nn.Module) -> int:
    """The most weights of replicated layers that are expanded together for a prompt: those of a
    group that shares its input, of experts as many as ``packed_experts.py`` takes."""
    groups = defaultdict(list)
    for module in network.modules():
        if isinstance(module, Replicated):
            groups[id(module.input)].append(module)
    sizes = [(sum(map(weight_count, group)), group[0].input.experts) for group in groups.values()]
    return max((min(size, max(EXPANDED, size // experts)) if experts else size
                for size, experts in sizes), default=0)


def weight_bytes(network: nn.Module, measure: Measure = own_bytes, *, batch: int = 1) -> int:
    """Bytes of weights that one pass over ``batch`` tokens, of one sequence or of as many, reads:
    as held, or as another ``measure`` has it.

    An embedding counts as a row for each, unless it is the head too. Of a mixture's experts only
    the chosen ones count, for a batch as many as it chooses on average. A block that runs again
    is read again: no chip's cache is counted on to hold it.
    """
    return round(sum(part.passes * part.share(batch) * measure(part.module)
                     for part in parts(network)))


def network_bytes(network: nn.Module, measure: Measure) -> int:
    """Bytes of all parameters of a network, as ``measure`` has them."""
    return sum(map(measure, network.modules()))


def passes_bytes(network: nn.Module, passes: Mapping[int, int]) -> int:
    """Bytes of weights that ``passes`` read, given how many there are by the tokens in them."""
    return sum(count * weight_bytes(network, batch=tokens) for tokens, count in passes.items())


def dense_bytes(network: nn.Module) -> int:
    """Bytes the network takes as float32 with every quantised matrix expanded."""
    return network_bytes(network, float32_bytes)


def operations_per_token(network: nn.Module, batch: int = 1) -> int:
    """Operations with weights for one token, of ``batch`` in a pass, two for each multiply-add,
    without attention to earlier tokens."""
    return round(2 * sum(part.passes * part.operations(batch) for part in parts(network)))


def head_of(network: nn.Module) -> nn.Module | None:
    """What turns hidden states into logits: the module outside the blocks that holds a matrix of
    as many rows as an embedding has, or, where there is none, the first embedding itself. In a
    prompt only the last token goes through it."""
    inside = tuple(f"{block.path}." for block in blocks_or_itself(network))
    outside = [module for path, module in [*leaf_modules(network), ("", network)]
               if not f"{path}.".startswith(inside)]
    embeddings = [module for module in outside if isinstance(module, _EMBEDDINGS)]
    vocabularies = {len(module.weight) for module in embeddings}
    heads = [module for module in outside if not isinstance(module, _EMBEDDINGS) and any(
        array.ndim == 2 and len(array) in vocabularies for array in own_arrays(module).values())]
    return next(iter([*heads, *embeddings]), None)


def kv_bytes(cache: list[Any]) -> int:
    """Bytes of keys, values and other state that a prompt cache holds: what the next token reads.

    MLX allocates keys and values in steps along their second-last axis; only
    the part up to the layer's offset counts.
    """
    total = 0.0
    for layer in single(cache):
        offset = getattr(layer, "offset", None)
        if offset is not None:  # a layer that attends in chunks has dropped what lies before
            offset -= getattr(layer, "start_position", 0)
        for array in arrays(layer.state):
            grown = offset is not None and array.ndim == 4
            total += array.nbytes * (min(offset / array.shape[-2], 1.0) if grown else 1.0)
    return round(total)


def single(cache: list[Any]) -> Iterator[Any]:
    """The caches of a prompt cache one by one: some blocks have several, as one ``CacheList``."""
    for layer in cache:
        yield from single(layer.caches) if hasattr(layer, "caches") else [layer]


def _experts(path: str, module: nn.Module, modules: dict[str, nn.Module]) -> int:
    """The number of experts of the mixture that ``module`` belongs to; 1 outside mixtures."""
    above, inside, _ = path.rpartition(".experts.")
    if inside and isinstance(experts := modules[above].get("experts"), list):
        return len(experts)
    if isinstance(module, (PackedCodes, ReplicaInput)):
        return module.experts or 1
    if not isinstance(module, _EXPERTS):
        return 1
    # Beside ordinary matrices such a layer is one matrix in groups, all of which a token uses.
    beside = modules[path.rpartition(".")[0]].children().values()
    mixed = any(weight_count(m) for m in beside if isinstance(m, nn.Module)
                and not isinstance(m, (*_EXPERTS, PackedCodes)))
    return 1 if mixed else int(module.num_experts)


def _chosen(path: str, modules: dict[str, nn.Module], experts: int) -> int:
    """How many of the ``experts`` at ``path`` a token is sent to: as the nearest module around
    them, its router or its configuration says; 1 where none of them does."""
    names = path.split(".")
    above = [".".join(names[:depth]) for depth in reversed(range(len(names)))]
    for module in (modules[around] for around in above if around in modules):
        arguments = [getattr(module, name, None) for name in ("args", "config")]
        routers = [child for child in module.children().values() if isinstance(child, nn.Module)]
        for source in [module, *routers, *arguments]:
            for name in _CHOSEN:
                chosen = getattr(source, name, None)
                if type(chosen) is int and 1 <= chosen <= experts:
                    return chosen
    return 1
