"""A GGUF file as an mlx-lm model: a tensor for each parameter, a parameter for each tensor."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from gguf import GGML_QUANT_SIZES, MODEL_ARCH_NAMES, get_tensor_name_map
from gguf import GGMLQuantizationType as Type
from mlx.utils import tree_flatten

from mlxquant.base.errors import BadCheckpoint, Unsupported, first_line
from mlxquant.layers import formats, outline
from mlxquant.sources.gguf import rope, weights
from mlxquant.sources.gguf.config import architecture_of, config_of
from mlxquant.sources.gguf.one_matrix import digest, one_matrix
from mlxquant.sources.gguf.reader import GGUFModel, GGUFTensor
from mlxquant.sources.gguf.repack import GROUP

_ARCHITECTURES = {name: number for number, name in MODEL_ARCH_NAMES.items()}


@dataclass(frozen=True)
class Source:
    """A tensor, how it is stored, how many heads its rows are interleaved in (0: they are not),
    and what is added to its values."""

    tensor: GGUFTensor
    plan: weights.TensorPlan
    heads: int = 0
    offset: float = 0.0

    def blocks(self) -> np.ndarray:
        """The raw blocks, rows in the original's order."""
        blocks = self.tensor.read()
        if not self.heads:
            return blocks
        # llama.cpp pairs rows of queries and keys for its rotary embedding; a bias is one row.
        bias = len(self.tensor.shape) == 1
        value = GGML_QUANT_SIZES[self.tensor.type][1] if bias else self.tensor.row_bytes
        rows = blocks.reshape(self.heads, -1, 2, value)
        return np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(blocks.shape)


@dataclass
class Imported:
    """A file whose names, shapes and types are all understood. ``rounded`` collects the errors of
    tensors as they are converted: by path (Σ(ŵ − w)², Σw²)."""

    config: dict[str, Any]
    sources: dict[str, Source]
    rounded: dict[str, tuple[float, float]] = field(default_factory=dict)
    one_matrix: dict[str, str] | None = None  # see ``one_matrix.py``

    @property
    def dtype(self) -> mx.Dtype:
        """The type of numbers that are not codes."""
        return getattr(mx, self.config["torch_dtype"])

    def tensors(self) -> Iterator[tuple[str, mx.array]]:
        """Every array by its mlx-lm name, one tensor in memory at a time."""
        for name, source in self.sources.items():
            tensor, shape = source.tensor, source.tensor.shape
            if source.plan.plain:
                values, lost, whole = weights.plain(tensor.type, source.blocks(), self.dtype,
                                                    source.offset)
                arrays = {name: values.reshape(shape)}
            else:
                made = weights.codes(tensor.name, tensor.type, source.blocks(), source.plan)
                lost, whole, path = made.lost, made.whole, name.removesuffix(".weight")
                arrays = {key: mx.array(part.reshape(*shape[:-1], -1)) for key, part in (
                    (name, made.weight), (f"{path}.scales", made.scales),
                    (f"{path}.biases", made.biases))}
            if lost:
                self.rounded[name] = lost, whole
            if self.one_matrix is not None and name == f"{self.one_matrix['head']}.weight":
                self.one_matrix["digest"] = digest(arrays[name])
            yield from arrays.items()

    def stored_bytes(self) -> int:
        """Bytes that the arrays will take."""
        return sum(prod(s.tensor.shape) * self.dtype.size if s.plan.plain else
                   int(prod(s.tensor.shape) * (s.plan.bits + 32 / GROUP) / 8)
                   for s in self.sources.values())

    def record(self) -> dict[str, Any]:
        """For config.json, once all tensors are written: the file's types, and the error of what
        was rounded, Σ(ŵ − w)² / Σw² against the values that the file stands for."""
        types = Counter(source.tensor.type.name for source in self.sources.values())
        rounded = {}
        for name, (lost, whole) in self.rounded.items():
            source = self.sources[name]
            rounded[name if source.plan.plain else name.removesuffix(".weight")] = {
                "type": source.tensor.type.name, "bits": source.plan.bits,
                "repacked": source.plan.repacked, "error": lost / whole if whole else 0.0}
        lost, whole = (sum(part) for part in zip((0, 0), *self.rounded.values()))
        found = {"types": dict(types.most_common()), "tensors": len(self.sources),
                 "error": lost / whole if whole else 0.0, "rounded": rounded}
        return found if self.one_matrix is None else found | {"one_matrix": self.one_matrix}


def read(file: GGUFModel, bits: int | None = None) -> Imported:
    """Assign a file's tensors to mlx-lm's parameters, before anything is written; ``bits`` is the
    width of tensors that must be rounded anew. Raises ``Unsupported`` or ``BadCheckpoint``."""
    architecture, config = architecture_of(file), config_of(file)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    network = _network(file, config)
    modules = dict(network.named_modules())
    names = get_tensor_name_map(_ARCHITECTURES[file.metadata["general.architecture"]],
                                config["num_hidden_layers"])
    sources, used = {}, set(rope.TENSORS)
    for name, array in tree_flatten(network.parameters()):
        # mlx-lm stacks a mixture's experts in one module, which has no name in the table.
        wanted = names.get_name(name.replace(".switch_mlp.", ".experts."),
                                try_suffixes=(".weight", ".bias"))
        if wanted not in file.tensors:
            raise BadCheckpoint(f"{file.path} lacks the tensor for {name}")
        tensor = file.tensors[wanted]
        if tensor.shape != array.shape:
            raise BadCheckpoint(f"{file.path}: {tensor.name} has shape {list(tensor.shape)}, the "
                                f"metadata implies {list(array.shape)}")
        path, _, kind = name.rpartition(".")
        quantisable = (kind == "weight" and hasattr(modules[path], "to_quantized")
                       and tensor.shape[-1] % GROUP == 0)
        sources[name] = Source(
            tensor, weights.plan(tensor.name, tensor.type, quantisable, bits),
            heads.get(path.rpartition(".")[2], 0) if architecture.permuted else 0,
            -architecture.norm_offset if path.endswith("norm") else 0.0)
        used.add(wanted)
    if strangers := file.tensors.keys() - used:
        raise Unsupported(f"{file.path}: tensor {min(strangers)} has no place in mlx-lm's "
                          f"{config['model_type']}")
    twice = one_matrix(config, {name: source.tensor for name, source in sources.items()})
    return Imported(config | {"torch_dtype": _dtype(sources)} | _quantization(sources), sources,
                    one_matrix=twice)


def _network(file: GGUFModel, config: dict[str, Any]) -> nn.Module:
    """mlx-lm's model with parameters that are never computed, for their names and shapes."""
    try:
        build, arguments = formats.model_classes(config)
        return outline.drop_tied_head(build(arguments.from_dict(config)), config)
    except Exception as error:  # impossible sizes fail in many ways
        raise BadCheckpoint(f"{file.path}: its metadata make no {config['model_type']}: "
                            f"{first_line(error)}") from error


def _dtype(sources: dict[str, Source]) -> str:
    types = {source.tensor.type for source in sources.values()}
    if types <= {Type.F32}:
        return "float32"
    return "bfloat16" if types <= {Type.F32, Type.BF16} else "float16"


def _quantization(sources: dict[str, Source]) -> dict[str, Any]:
    """mlx-lm's ``quantization`` entry: the commonest width, and each layer that differs."""
    bits = {name.removesuffix(".weight"): source.plan.bits
            for name, source in sources.items() if not source.plan.plain}
    if not bits:
        return {}
    common = Counter(bits.values()).most_common(1)[0][0]
    entry = {"group_size": GROUP, "bits": common,
             **{path: {"group_size": GROUP, "bits": width}
                for path, width in bits.items() if width != common}}
    return {"quantization": entry, "quantization_config": entry}
