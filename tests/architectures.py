"""A tiny random model of every model type of mlx-lm, and some variants, and what works on it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from conftest import job, write_folder
from mlx_lm.models.cache import KVCache, make_prompt_cache
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.utils import _get_classes

import mlxquant

CONFIGURATIONS = json.loads((Path(__file__).parent / "data/architectures.json").read_text())
TOKENS = mx.array([[3, 17, 29, 101, 64]])
METHODS = {
    "rtn": dict(method="rtn", bits=8, group_size=32),
    "gptq": dict(method="gptq", bits=8, group_size=32, refine=0),
    "awq": dict(method="awq", bits=8, group_size=32),
    "replica": dict(method="replica", bits=4, replicas=2, rotation="online", refine=0),
}
# One of each kind of trouble: sliced lists of blocks, wrappers, tuples, siblings under different
# parents, experts in stacks and in lists, recurrent states, matrices by head, shared caches.
FEW = ("qwen3_moe", "gpt_oss", "gemma3", "gemma4", "cohere", "dbrx", "mamba", "qwen3_next",
       "deepseek_v3", "falcon_h1", "gemma3n", "rwkv7", "phixtral", "iquestloopcoder")
# What cannot be made, and why.
REFUSED = {
    "prism_hadamard_qwen35": "its layers are packed and rotated already: mlx-lm loads 2 bits in "
                             "groups of 128 and nothing else",
}


def network_of(name: str) -> nn.Module:
    """The network of a row: 4 blocks, hidden size 128, vocabulary 288, in float32."""
    model_class, arguments = _get_classes(CONFIGURATIONS[name])
    mx.random.seed(0)
    return model_class(arguments.from_dict(CONFIGURATIONS[name]))


def watch(module: nn.Module, note: Callable[..., None]) -> None:
    """Have ``note`` see the arguments of every call of ``module``, which stays in its place."""
    def call(self, *args, **kwargs):
        note(*args)
        return kind.__call__(self, *args, **kwargs)

    kind = type(module)
    module.__class__ = type(kind.__name__, (kind,), {"__call__": call})


def kind_of(name: str) -> str:
    """What sort of model it is, in a few words."""
    network = network_of(name)
    words = ["wrapper"] if "text_config" in CONFIGURATIONS[name] else []
    words += ["mixture"] if any(isinstance(m, SwitchLinear) for m in network.modules()) else []
    caches = make_prompt_cache(network)
    attending = [hasattr(cache, "offset") or isinstance(cache, KVCache) for cache in caches]
    words += [] if all(attending) else ["hybrid"] if any(attending) else ["recurrent"]
    return ", ".join(words) or "dense"


@dataclass(frozen=True)
class Attempt:
    """What came of quantising a tiny model: how far its logits are from the source's, and from
    those of a dense model rebuilt from the same weights (relative squared errors)."""

    from_source: float
    from_dense: float
    bits_per_weight: float


def write(name: str, folder: Path) -> Path:
    """The row's model as a folder in float16."""
    network = network_of(name)
    network.set_dtype(mx.float16)
    return write_folder(folder, network, CONFIGURATIONS[name], size=288)


def attempt(source: Path, method: str, output: Path, text: Path) -> Attempt:
    """Quantise, load in both ways, generate; raises what any of them raises."""
    asked = job(text, samples=2, length=32, **METHODS[method])
    mlxquant.quantize(str(source), output, asked)
    original = mlxquant.load(str(source), dense=True).network(TOKENS)
    packed = mlxquant.load(str(output), dense=False)
    dense = mlxquant.load(str(output), dense=True)
    logits = packed.network(TOKENS)
    mlxquant.generate(packed, TOKENS[0].tolist(), max_tokens=2)
    return Attempt(distance(logits, original), distance(logits, dense.network(TOKENS)),
                   mlxquant.inspect(str(output)).bits_per_weight)


def distance(a: mx.array, b: mx.array) -> float:
    """‖a − b‖² / ‖b‖²; 0 where both are zero everywhere."""
    error, size = mx.square(a - b).sum().item(), mx.square(b).sum().item()
    return error / size if size else error


def slow_unless(few: bool) -> tuple[pytest.MarkDecorator, ...]:
    """Marks of a row that only ``make test-all`` runs, unless it is one of a few."""
    return () if few else (pytest.mark.slow,)
