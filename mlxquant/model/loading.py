"""Load a model folder into memory through mlx-lm's architectures.

On Metal and CUDA the weights run as stored. On a plain CPU MLX is quick only
in float32, and quickest with dense matrices, so there every parameter becomes
float32 and quantised layers are expanded when memory allows.
"""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import load_model, load_tokenizer

from mlxquant.base.errors import BadCheckpoint, TooLarge, Unsupported
from mlxquant.layers import formats, traffic
from mlxquant.layers.dense import expand_grouped, to_dense, to_float32
from mlxquant.layers.packed import pack
from mlxquant.machine.memory import DENSE_SHARE, memory_limit, parse_size
from mlxquant.model import distributed
from mlxquant.sources import checkpoint
from mlxquant.sources.names import resolve

_CLOSE = 0.9  # of what may be used: mlx-lm warns there too, when it generates


@dataclass
class LanguageModel:
    """A loaded model: the network (an mlx-lm module), its tokenizer and configuration."""

    name: str
    folder: Path
    network: nn.Module
    tokenizer: Any
    config: dict[str, Any]

    @property
    def context_length(self) -> int | None:
        """Longest sequence in tokens, or None where the configuration does not say."""
        text = self.config.get("text_config", {})
        return self.config.get("max_position_embeddings", text.get("max_position_embeddings"))

    @property
    def vocabulary(self) -> int:
        """Token ids that the embedding has rows for; MLX never checks an index itself."""
        config = self.config.get("text_config") or self.config
        size = config.get("vocab_size") or self.config.get("vocab_size")
        return size if isinstance(size, int) else len(self.tokenizer)

    @property
    def weight_bytes_per_token(self) -> int:
        """Bytes of weights that decoding one token reads, as this run holds them."""
        return traffic.weight_bytes(self.network)


def load(name: str, *, revision: str | None = None, memory: str | float | None = None,
         dense: bool | None = None, trust_remote_code: bool = False) -> LanguageModel:
    """Load a model by name: a folder, a GGUF file, a recipe or a hub repository.

    ``memory`` limits what the model may take: bytes, or text such as "8GB"
    (default: what the device recommends, or what is free). ``dense`` expands the
    weights to float32 (default: on a plain CPU, where it fits). Code from a model
    folder runs only with ``trust_remote_code``. Under ``mlx.launch`` each machine keeps
    its part of the weights (``distributed.py``). Raises ``ModelNotFound``,
    ``BadCheckpoint``, ``Unsupported`` or ``TooLarge``.
    """
    folder = resolve(name, revision=revision)
    limit = memory_limit() if memory is None else parse_size(memory)
    group = mx.distributed.init()
    stored = sum(header.bytes for header in checkpoint.validate(folder).values()) // group.size()
    if stored > limit:
        raise TooLarge(f"{name} needs {stored / 1e9:.2f} GB for its weights, "
                       f"{limit / 1e9:.2f} GB may be used")
    if stored > _CLOSE * limit:
        print(f"{name} takes {stored / 1e9:.2f} of the {limit / 1e9:.2f} GB that may be used: replies may be slow, "
              "and long ones may not fit; `mlxquant plan` shows smaller forms", file=sys.stderr)
    network, config = _build(folder, trust_remote_code)
    network = expand_grouped(network)
    on_cpu = mx.default_device() == mx.cpu
    if dense or (on_cpu and dense is None and traffic.dense_bytes(network) <= DENSE_SHARE * limit):
        network = to_dense(network)
    elif on_cpu:
        network = to_float32(network)
    if group.size() > 1:
        network = distributed.shard(network, name, group)
        distributed.agree_on_randomness(group)
    if not on_cpu:
        network = pack(network)
    mx.eval(network.parameters())
    tokenizer = open_tokenizer(folder, config, trust_remote_code)
    return LanguageModel(name, folder, network, tokenizer, config)


def open_lazily(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The network of a folder with its weights still on disk, for looking at shapes and formats."""
    return _build(folder, trust_remote_code=False)


def _build(folder: Path, trust_remote_code: bool) -> tuple[nn.Module, dict[str, Any]]:
    try:
        return load_model(folder, lazy=True, trust_remote_code=trust_remote_code,
                          get_model_classes=formats.model_classes)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).strip().split("\n")[0]
        if "trust_remote_code" in str(error):
            raise Unsupported(f"{folder} brings its own code; run it only if you trust it: "
                              "trust_remote_code=True or --trust-remote-code") from error
        if "not supported" in reason:
            raise Unsupported(f"{folder}: {reason}") from error
        raise BadCheckpoint(f"{folder}: config and weights do not make a model: {reason}") from error


def open_tokenizer(folder: Path, config: dict[str, Any], trust_remote_code: bool = False) -> Any:
    """mlx-lm's wrapper of the folder's tokenizer; raises ``BadCheckpoint``."""
    # transformers remarks that it does not know our own model_type, and some releases suspect the
    # splitting expression of early Mistral tokenizers in every large vocabulary that lies on disk.
    mistral = "stral" in config.get("base_model_type", config.get("model_type", ""))
    for name, quiet in (("configuration_utils", True), ("tokenization_utils_tokenizers", not mistral)):
        logging.getLogger(f"transformers.{name}").setLevel(logging.ERROR if quiet else logging.NOTSET)
    try:
        return load_tokenizer(folder, {"trust_remote_code": trust_remote_code},
                              eos_token_ids=config.get("eos_token_id"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise BadCheckpoint(f"{folder} has no usable tokenizer: {reason}") from error
