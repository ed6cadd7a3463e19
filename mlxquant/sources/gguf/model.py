"""A GGUF file as an mlx-lm model: every parameter of the model finds its tensor, and every tensor its parameter."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
from gguf import GGMLQuantizationType as Type
from mlx.utils import tree_flatten

from mlxquant.base.errors import BadCheckpoint, Unsupported
from mlxquant.layers import formats
from mlxquant.sources.gguf import rope, weights
from mlxquant.sources.gguf.config import architecture_of, config_of
from mlxquant.sources.gguf.reader import GGUFModel, GGUFTensor
from mlxquant.sources.gguf.repack import GROUP

_ARCHITECTURES = {name: number for number, name in MODEL_ARCH_NAMES.items()}


@dataclass(frozen=True)
class Rounded:
    """What the import took from one tensor: Σ(ŵ − w)² and Σw². ``repacked`` codes are the file's, 16 ``bits``
    plain numbers."""

    path: str
    type: Type
    bits: int
    repacked: bool
    lost: float
    whole: float

    @property
    def error(self) -> float:
        return self.lost / self.whole if self.whole else 0.0


@dataclass(frozen=True)
class Source:
    """A tensor, how it is stored, how many heads its rows are interleaved in (0: they are not), and what
    is added to its values."""

    tensor: GGUFTensor
    plan: weights.Plan
    heads: int = 0
    offset: float = 0.0

    def blocks(self) -> np.ndarray:
        blocks = self.tensor.read()
        return _deinterleaved(blocks, self.heads) if self.heads else blocks


@dataclass
class Imported:
    """A file whose names, shapes and types are all understood; tensors are converted as they are asked for,
    and what that took gathers in ``rounded``."""

    config: dict
    sources: dict[str, Source]
    rounded: list[Rounded] = field(default_factory=list)

    def tensors(self) -> Iterator[tuple[str, mx.array]]:
        """Every array by its mlx-lm name, one tensor in memory at a time."""
        dtype = getattr(mx, self.config["torch_dtype"])
        for name, source in self.sources.items():
            tensor, shape = source.tensor, source.tensor.shape
            if source.plan.bits is None:
                values, lost, whole = weights.plain(tensor.name, tensor.type, source.blocks(), dtype, source.offset)
                self._note(name, source, 16, lost, whole)
                yield name, values.reshape(shape)
                continue
            path, made = name.removesuffix(".weight"), weights.codes(
                tensor.name, tensor.type, source.blocks(), source.plan)
            self._note(path, source, made.bits, made.lost, made.whole)
            for key, array in ((name, made.weight), (f"{path}.scales", made.scales), (f"{path}.biases", made.biases)):
                yield key, mx.array(array.reshape(*shape[:-1], -1))

    def _note(self, path: str, source: Source, bits: int, lost: float, whole: float) -> None:
        if lost:
            self.rounded.append(Rounded(path, source.tensor.type, bits, source.plan.repacked, lost, whole))

    def stored_bytes(self) -> int:
        """What the arrays will take."""
        return sum(prod(s.tensor.shape) * ((s.plan.bits + 32 / GROUP) / 8 if s.plan.bits else
                                           getattr(mx, self.config["torch_dtype"]).size)
                   for s in self.sources.values())

    def record(self) -> dict:
        """For config.json, once all tensors are written: the file's types, and the error of what was rounded,
        Σ(ŵ − w)² / Σw² against the values that the file stands for."""
        types = Counter(source.tensor.type.name for source in self.sources.values())
        whole = sum(r.whole for r in self.rounded)
        return {"types": dict(types.most_common()), "tensors": len(self.sources),
                "error": sum(r.lost for r in self.rounded) / whole if whole else 0.0,
                "rounded": {r.path: {"type": r.type.name, "bits": r.bits, "repacked": r.repacked, "error": r.error}
                            for r in self.rounded}}


def read(file: GGUFModel, bits: int | None = None) -> Imported:
    """Understand a file before anything is written; ``bits`` is the width of what must be rounded anew.

    Raises ``Unsupported`` or ``BadCheckpoint``.
    """
    architecture, config = architecture_of(file), config_of(file)
    network = _network(file, config)
    modules = dict(network.named_modules())
    names = get_tensor_name_map(_ARCHITECTURES[file.metadata["general.architecture"]], config["num_hidden_layers"])
    sources, used = {}, set(rope.TENSORS)
    for name, array in tree_flatten(network.parameters()):
        # mlx-lm stacks a mixture's experts in one module, which has no name in the table.
        wanted = names.get_name(name.replace(".switch_mlp.", ".experts."), try_suffixes=(".weight", ".bias"))
        if wanted not in file.tensors:
            raise BadCheckpoint(f"{file.path} lacks the tensor for {name}")
        tensor = file.tensors[wanted]
        if tensor.shape != array.shape:
            raise BadCheckpoint(f"{file.path}: {tensor.name} has shape {list(tensor.shape)}, the metadata "
                                f"implies {list(array.shape)}")
        path, _, kind = name.rpartition(".")
        quantisable = kind == "weight" and hasattr(modules[path], "to_quantized") and tensor.shape[-1] % GROUP == 0
        sources[name] = Source(tensor, weights.plan(tensor.name, tensor.type, quantisable, bits),
                               _heads(path, config) if architecture.permuted else 0,
                               -architecture.norm_offset if path.endswith("norm") else 0.0)
        used.add(wanted)
    if strangers := file.tensors.keys() - used:
        raise Unsupported(f"{file.path}: tensor {min(strangers)} has no place in mlx-lm's {config['model_type']}")
    return Imported(config | {"torch_dtype": _dtype(sources)} | _quantization(sources), sources)


def _network(file: GGUFModel, config: dict) -> nn.Module:
    """mlx-lm's model with parameters that are never computed, for their names and shapes."""
    try:
        build, arguments = formats.model_classes(config)
        network = build(arguments.from_dict(config))
        if config["tie_word_embeddings"] and "lm_head" in network:
            network.sanitize({})  # some models drop the head only when they see the weights
        return network
    except Exception as error:  # impossible sizes fail in many ways
        reason = str(error).strip().split("\n")[0]
        raise BadCheckpoint(f"{file.path}: its metadata make no {config['model_type']}: {reason}") from error


def _heads(path: str, config: dict) -> int:
    if path.endswith(".q_proj"):
        return config["num_attention_heads"]
    return config["num_key_value_heads"] if path.endswith(".k_proj") else 0


def _deinterleaved(blocks: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's reordering of query and key rows (pairs for its rotary embedding)."""
    if len(blocks) == 1:  # a bias
        return np.ascontiguousarray(blocks.reshape(heads, -1, 2, 4).swapaxes(1, 2)).reshape(1, -1)
    rows = blocks.reshape(heads, -1, 2, blocks.shape[1])
    return np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(blocks.shape)


def _dtype(sources: dict[str, Source]) -> str:
    types = {source.tensor.type for source in sources.values()}
    if types <= {Type.F32}:
        return "float32"
    return "bfloat16" if types <= {Type.F32, Type.BF16} else "float16"


def _quantization(sources: dict[str, Source]) -> dict:
    """mlx-lm's ``quantization`` entry: the commonest width, and each layer that differs."""
    bits = {name.removesuffix(".weight"): source.plan.bits for name, source in sources.items() if source.plan.bits}
    if not bits:
        return {}
    common = Counter(bits.values()).most_common(1)[0][0]
    entry: dict = {"group_size": GROUP, "bits": common}
    entry |= {path: {"group_size": GROUP, "bits": width} for path, width in bits.items() if width != common}
    return {"quantization": entry, "quantization_config": entry}
