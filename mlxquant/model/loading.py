"""Load a model folder into memory through mlx-lm's architectures.

On Metal and CUDA the weights run as stored. On a plain CPU MLX is quick only in float32, and
quickest with dense matrices: there parameters become float32, and dense where memory allows.
"""

import logging
import re
import sys
import warnings
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model, load_tokenizer

from mlxquant.base import checks
from mlxquant.base.errors import BadCheckpoint, MlxquantError, TooLarge, Unsupported
from mlxquant.base.tensor_file import require_finite
from mlxquant.layers import traffic
from mlxquant.layers.dense import expand, to_dense
from mlxquant.layers.grouped import GroupedLinear
from mlxquant.layers.pack import pack
from mlxquant.machine.memory import memory_limit, parse_size
from mlxquant.model import distributed, stored
from mlxquant.sources.names import resolve

_CLOSE = 0.9  # of what may be used: mlx-lm warns there too, when it generates
# What configurations call the context: most of them, then GPT-2 and its kin, DBRX, OLMo, OpenELM,
# Kimi Linear, Lille.
_CONTEXT = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length",
            "max_context_length", "model_max_length", "block_size")


@dataclass
class LanguageModel:
    """A loaded model: the network (an mlx-lm module), its tokenizer and configuration."""

    name: str
    folder: Path
    network: nn.Module
    tokenizer: Any
    config: dict[str, Any]
    vocabulary: int = field(init=False)  # token ids that the network knows: MLX checks no index

    def __post_init__(self) -> None:
        self.vocabulary = vocabulary_of(self.network)

    @property
    def context_length(self) -> int | None:
        """Longest sequence in tokens, or None where the configuration does not say."""
        places = self.config, self.config.get("text_config") or {}
        return next((place[name] for place in places for name in _CONTEXT if place.get(name)), None)

    @cached_property
    def tokens(self) -> dict[str, int]:
        """The tokenizer's ids; the network may have more of them, as padding."""
        return self.tokenizer.get_vocab()

    @property
    def weight_bytes_per_token(self) -> int:
        """Bytes of weights that decoding one token reads, as this run holds them."""
        return traffic.weight_bytes(self.network)


def vocabulary_of(network: nn.Module) -> int:
    """How many token ids ``network`` tells apart. Its graph is laid out, never computed."""
    return network(mx.zeros((1, 1), mx.int32)).shape[-1]


def load(name: str | PathLike[str], *, revision: str | None = None,
         memory: str | float | None = None, dense: bool | None = None,
         trust_remote_code: bool = False) -> LanguageModel:
    """Load a model by name: a folder, a GGUF file, a recipe or a hub repository.

    ``memory`` limits what the model may take: bytes, or text such as "8GB" (default: what the
    device recommends, or what is free). ``dense`` expands the weights to float32 (default: on a
    plain CPU, where it fits). Code from a model folder runs only with ``trust_remote_code``. Under
    ``mlx.launch`` each machine keeps its part of the weights (``distributed.py``). Raises
    ``ModelNotFound``, ``BadCheckpoint``, ``Unsupported`` or ``TooLarge``.
    """
    name = checks.path("model", name)
    return load_folder(resolve(name, revision=revision), name, memory=memory, dense=dense,
                       trust_remote_code=trust_remote_code)


def load_folder(folder: Path, name: str, *, memory: str | float | None = None,
                dense: bool | None = None, trust_remote_code: bool = False) -> LanguageModel:
    """Load model ``name`` from the folder that ``resolve`` gave; all else is as for ``load``."""
    limit = memory_limit() if memory is None else parse_size(memory)
    group = mx.distributed.init()
    network, config = open_lazily(folder, trust_remote_code)
    on_cpu = mx.default_device() == mx.cpu
    # dense=False: no memory is room for dense weights
    measure = traffic.float32_bytes if dense else traffic.as_held(
        network, on_cpu, limit if dense is None else 0)
    needed = traffic.network_bytes(network, measure) // group.size()
    if needed > limit:
        raise TooLarge(f"{name} needs {needed / 1e9:.2f} GB for its weights, "
                       f"{limit / 1e9:.2f} GB may be used")
    if needed > _CLOSE * limit:
        print(f"{name} takes {needed / 1e9:.2f} of the {limit / 1e9:.2f} GB that may be used: "
              "replies may be slow, and long ones may not fit; `mlxquant plan` shows smaller forms",
              file=sys.stderr)
    expand(network, GroupedLinear)
    if measure is traffic.float32_bytes:
        network = to_dense(network)
    elif on_cpu:
        network.set_dtype(mx.float32)
    if group.size() > 1:
        network = distributed.shard(network, name, group)
        distributed.agree_on_randomness(group)
    if not on_cpu:
        network = pack(network)
    mx.eval(network.parameters())
    for path, array in tree_flatten(network.parameters()):
        require_finite(f"{path} of {folder}", array)
    tokenizer = open_tokenizer(folder, config, trust_remote_code)
    model = LanguageModel(name, folder, network, tokenizer, config)
    mx.eval(network)  # any thread may use it: what is no parameter, or was laid out just now, too
    return model


def open_lazily(folder: Path, trust_remote_code: bool = False) -> tuple[nn.Module, dict[str, Any]]:
    """The network of a folder with its weights still on disk, for looking at shapes and formats."""
    try:
        network, config = load_model(folder, lazy=True, trust_remote_code=trust_remote_code,
                                     get_model_classes=stored.model_classes(folder))
    except MlxquantError:
        raise
    except Exception as error:  # a configuration may be anything, and so may what it causes
        reason = _in_one_line(error)
        if "trust_remote_code" in reason:
            raise Unsupported(f"{folder} brings its own code; run it only if you trust it: "
                              "trust_remote_code=True or --trust-remote-code") from error
        if isinstance(error, ValueError) and "upported" in reason:
            raise Unsupported(f"{folder}: mlx-lm says: {reason}") from error
        raise BadCheckpoint(f"{folder}: config and weights do not make a model: "
                            f"{reason}") from error
    stored.require_numbers(network, folder)
    return network, config


def open_tokenizer(folder: Path, config: dict[str, Any], trust_remote_code: bool = False) -> Any:
    """mlx-lm's wrapper of the folder's tokenizer; raises ``BadCheckpoint``."""
    # transformers remarks that it does not know our own model_type, and some releases suspect the
    # splitting expression of early Mistral tokenizers in every large vocabulary that lies on disk.
    mistral = "stral" in config.get("base_model_type", config.get("model_type", ""))
    for name, level in (("configuration_utils", logging.ERROR),
                        ("tokenization_utils_tokenizers", not mistral and logging.ERROR)):
        logging.getLogger(f"transformers.{name}").setLevel(level)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of keys of config.json, to its authors
            return load_tokenizer(folder, {"trust_remote_code": trust_remote_code},
                                  eos_token_ids=config.get("eos_token_id"))
    except Exception as error:  # of tokenizers, transformers, or a template
        raise BadCheckpoint(f"{folder} has no usable tokenizer: {_in_one_line(error)}") from error


def _in_one_line(error: Exception) -> str:
    """An error's message in one line; names of tensors that differ only by numbers are counted."""
    lines = [line.strip(" ,.") for line in str(error).strip().splitlines()]
    if not lines or isinstance(error, KeyError):
        return repr(error)
    if "parameters" not in lines[0]:
        return " ".join(filter(None, lines))
    alike = Counter(re.sub(r"\d+", "*", name) for name in lines[1:])
    single = {re.sub(r"\d+", "*", name): name for name in lines[1:]}
    names = (single[shape] if count == 1 else f"{shape} ({count})"
             for shape, count in alike.items())
    return f"{lines[0]} {', '.join(names)}"
