"""What a model folder holds, layer by layer, read from its headers alone."""

from dataclasses import asdict, dataclass
from pathlib import Path

import mlx.nn as nn

from mlxquant import checkpoint
from mlxquant.loading import open_lazily
from mlxquant.models import resolve
from mlxquant.roofline import traffic


@dataclass(frozen=True)
class Layer:
    """A weight matrix or embedding. ``bits`` are those of one code, scales apart."""

    path: str
    format: str
    bits: int
    shape: list[int]
    bytes: int


@dataclass(frozen=True)
class Inspection:
    """``bits_per_weight`` is that of the blocks' matrices, scales included; ``file_bytes``
    of the whole folder; ``bytes_per_token`` of the weights that one token reads as stored,
    ``bytes_per_token_cpu`` as dense float32, which is how a plain CPU runs them."""

    architecture: str
    parameters: int
    bits_per_weight: float
    file_bytes: int
    bytes_per_token: int
    bytes_per_token_cpu: int
    layers: list[Layer]

    def as_dict(self) -> dict:
        return asdict(self)


def inspect(name: str, *, revision: str | None = None) -> Inspection:
    """Describe the model called ``name``; its weights are not read."""
    return inspect_folder(resolve(name, revision=revision))


def inspect_folder(folder: Path) -> Inspection:
    """Describe a validated model folder."""
    network, config = open_lazily(folder)
    modules = traffic.leaf_modules(network)
    matrices = [(path, m) for path, m in modules if "weight" in m and m.weight.ndim >= 2]
    layers = [_layer(path, module) for path, module in matrices]
    body = [(module, layer) for (path, module), layer in zip(matrices, layers)
            if not isinstance(module, (nn.Embedding, nn.QuantizedEmbedding))
            and not path.endswith("lm_head")]
    weights = sum(traffic.weight_count(module) for module, _ in body)
    stored = traffic.weight_bytes(network, config)
    return Inspection(
        architecture=config["model_type"],
        parameters=sum(traffic.weight_count(module) for _, module in modules),
        bits_per_weight=8 * sum(layer.bytes for _, layer in body) / weights,
        file_bytes=checkpoint.folder_bytes(folder),
        bytes_per_token=stored,
        bytes_per_token_cpu=traffic.weight_bytes(network, config, dense=True),
        layers=layers)


def _layer(path: str, module: nn.Module) -> Layer:
    size = traffic.module_bytes(module) - (module.bias.nbytes if "bias" in module else 0)
    shape = list(module.weight.shape)
    bits = getattr(module, "bits", None)
    if bits is None:
        name = str(module.weight.dtype).removeprefix("mlx.core.")
        return Layer(path, name, 8 * module.weight.dtype.size, shape, size)
    shape[-1] = shape[-1] * 32 // bits
    return Layer(path, f"{module.mode} g{module.group_size}", bits, shape, size)
