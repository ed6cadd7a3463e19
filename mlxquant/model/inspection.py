"""What a model folder holds, layer by layer, read from its headers alone."""

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import mlx.nn as nn

from mlxquant.base.errors import BadCheckpoint
from mlxquant.codes.spec import Whole
from mlxquant.layers import traffic
from mlxquant.layers.blocks import shape_of
from mlxquant.layers.grouped import GroupedLinear
from mlxquant.layers.replicated import Replicated
from mlxquant.layers.siblings import untraceable
from mlxquant.layers.transformed import TransformedLinear
from mlxquant.model.loading import open_lazily
from mlxquant.sources import checkpoint
from mlxquant.sources.names import resolve


@dataclass(frozen=True)
class Layer:
    """A weight matrix or embedding. ``bits`` are those of one code, without scales."""

    path: str
    format: str
    bits: int | str
    shape: list[int]
    bytes: int


@dataclass(frozen=True)
class Inspection:
    """``active_parameters`` leave out a mixture's experts that a token is not sent to.
    ``bits_per_weight`` is that of the blocks' matrices, scales included; ``file_bytes``
    of the whole folder; ``bytes_per_token`` of the weights that one token reads on a GPU,
    ``bytes_per_token_cpu`` as dense float32, which is how a plain CPU runs them. ``making`` is
    what ``quantize`` wrote of its seconds and peaks by step, None where it made no such folder.
    ``tuned_blocks`` are the blocks that were trained, with their errors before and after: shares of
    the output's energy or, for a last block with ``nats``, divergences of the predictions in nats.
    ``untraceable`` says why the network cannot be traced, None where it can."""

    architecture: str
    parameters: int
    active_parameters: int
    bits_per_weight: float
    file_bytes: int
    bytes_per_token: int
    bytes_per_token_cpu: int
    layers: list[Layer]
    making: dict[str, Any] | None
    tuned_blocks: dict[str, dict[str, float]]
    untraceable: str | None


def inspect(name: str | PathLike[str], *, revision: str | None = None) -> Inspection:
    """Describe the model called ``name``; its weights are not read."""
    return inspect_folder(resolve(name, revision=revision))


def inspect_folder(folder: Path) -> Inspection:
    """Describe a validated model folder."""
    network, config = open_lazily(folder)
    transformed = {path for path, m in network.named_modules() if isinstance(m, TransformedLinear)}
    return Inspection(
        architecture=config.get("base_model_type", config["model_type"]),
        parameters=traffic.parameters(network),
        active_parameters=traffic.active_parameters(network),
        bits_per_weight=traffic.body_bits_per_weight(network),
        file_bytes=checkpoint.folder_bytes(folder),
        bytes_per_token=traffic.weight_bytes(network, traffic.gpu_bytes),
        bytes_per_token_cpu=traffic.weight_bytes(network, traffic.float32_bytes),
        layers=[_layer(path, m, transformed) for path, m in traffic.leaf_modules(network)
                if isinstance(m, (GroupedLinear, Replicated))
                or ("weight" in m and m.weight.ndim >= 2)],
        making=_making(folder / checkpoint.MAKING),
        tuned_blocks=config.get("mlxquant_record", {}).get("tuned_blocks", {}),
        untraceable=untraceable(network))


def _making(file: Path) -> dict[str, Any] | None:
    """The record of a folder's making; None where there is none, or another file of its name."""
    try:
        record = checkpoint.read_object(file, "seconds", "peak_memory_gb", "host_peak_gb", "runs")
    except BadCheckpoint:
        return None
    parts = record["seconds"], record["peak_memory_gb"]
    sound = all(isinstance(part, dict) and "total" in part and len(part) > 1 for part in parts)
    numbers = [*(value for part in parts for value in part.values()), record["host_peak_gb"],
               record["runs"]] if sound else [None]
    return record if all(isinstance(value, (int, float)) for value in numbers) else None


def gain_line(tuned: dict[str, dict[str, float]]) -> str:
    """What tuning blocks gained, in a few words."""
    parts, others = [], [block for block in tuned.values() if "nats" not in block]
    if others:
        before, after = (100 * _mean(others, what) for what in ("before", "after"))
        parts.append(f"the outputs of {len(others)} blocks are off the original's by {after:.2f} % "
                     f"of their energy in the mean, {before:.2f} % before")
    parts += [f"the last block's predictions by {block['after']:.3g} nats, {block['before']:.3g} "
              "before" for block in tuned.values() if "nats" in block]
    if any("moved" in block for block in tuned.values()):
        parts.append(f"{100 * _mean(list(tuned.values()), 'moved'):.1f} % of the codes moved")
    return "; ".join(parts)


def _mean(blocks: list[dict[str, float]], what: str) -> float:
    return sum(block.get(what, 0) for block in blocks) / len(blocks)


def _layer(path: str, module: nn.Module, transformed: set[str]) -> Layer:
    outer = path.removesuffix(".linear")
    prefix = "transformed " if outer in transformed else ""
    path = outer if prefix else path
    size = traffic.own_bytes(module) - (module.bias.nbytes if "bias" in module else 0)
    shape = list(shape_of(module))
    if isinstance(module, GroupedLinear):
        group = module.group_size
        width = group.name.lower() if isinstance(group, Whole) else f"g{group}"
        return Layer(path, f"{prefix}affine {width}", module.bits, shape, size)
    if isinstance(module, Replicated):
        spec = module.input.spec
        parts = [f"replicas K{spec.replicas}", f"G{spec.replica_group}" * bool(spec.replica_group),
                 "rotated" * bool(spec.rotation_block)]
        return Layer(path, " ".join(filter(None, parts)), spec.bits.value, shape, size)
    if hasattr(module, "bits"):
        name = f"{module.mode} g{module.group_size}"
        return Layer(path, prefix + name, module.bits, shape, size)
    name = str(module.weight.dtype).removeprefix("mlx.core.")
    return Layer(path, prefix + name, 8 * module.weight.dtype.size, shape, size)
