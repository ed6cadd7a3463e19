"""What a model takes on a machine, in bytes: its weights, keys and values, and what a prompt takes
besides."""

from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.nn as nn

from mlxquant.base.errors import Unsupported
from mlxquant.layers import outline, traffic
from mlxquant.layers.blocks import inside
from mlxquant.layers.prompt_step import PROMPT_STEP, prompt_step, scores_bytes
from mlxquant.model.original import without_second
from mlxquant.quantise.assembly import blocks_of
from mlxquant.report.host import Host

KV_BITS = (16, 8, 4)


@dataclass(frozen=True)
class Model:
    """The 16-bit original of a configuration. ``kv`` are bytes of keys and values by their bits,
    ``weights`` the multiply-adds of a token, ``widest`` the outputs of the widest layer."""

    name: str
    config: dict[str, Any]
    context: int
    original: nn.Module
    kv: dict[int, int]
    weights: float
    layers: int
    heads: int
    widest: int


class Need(NamedTuple):
    """Bytes: of keys and values, of attention's scores, of all that is held while a prompt is
    read, and of what a token reads."""

    kv: int
    scores: int
    total: int
    moved: int


def model_of(name: str, config: dict[str, Any], context: int) -> Model:
    """The original of ``config`` with ``context`` tokens; raises what ``network_of`` raises."""
    plain = outline.unquantised(without_second(config))
    original = outline.network_of(plain)
    kv = {}
    for bits in KV_BITS:
        with suppress(Unsupported):  # what the model refuses when it runs is not offered
            kv[bits] = outline.kv_bytes(original, context, bits)
    blocks = blocks_of(original)
    paths = inside(blocks)
    widest = max(part.chosen * part.module.weight.shape[-2] for part in traffic.parts(original)
                 if part.path.startswith(paths) and traffic.weight_count(part.module)
                 and part.module.weight.ndim > 1)
    return Model(name, plain, context, original, kv, traffic.operations_per_token(original) / 2,
                  len(blocks), outline.attention_heads(plain), widest)


def needs_of(network: nn.Module, model: Model, machine: Host) -> dict[int, Need]:
    """What a network takes on a machine, by the bits of its keys and values.

    While a prompt is read these are about three of the widest layer's outputs for a step besides;
    replicated layers that share an input, expanded; and attention's scores, where no fused kernel
    spares them (``layers/prompt_step.py``).
    """
    measure = traffic.as_held(network, machine.dense, machine.memory)
    held, read = traffic.network_bytes(network, measure), traffic.weight_bytes(network, measure)
    number, needs = 4 if machine.dense else 2, {}
    if measure is not traffic.float32_bytes:
        held += number * traffic.expanded_at_once(network)
    for bits, kv in model.kv.items():
        kv *= 2 if machine.dense and bits == 16 else 1
        unfused = machine.dense or bits < 16
        step = prompt_step(model.heads, model.context, number) if unfused else PROMPT_STEP
        tokens = min(step, model.context)
        scores = unfused * scores_bytes(model.heads, tokens, model.context, number)
        working = number * 3 * tokens * model.widest
        needs[bits] = Need(kv, scores, held + working + kv + scores, read + kv)
    return needs
