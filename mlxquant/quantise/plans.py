"""The spec of every layer: what the job asks for, changed where the layer needs it.

A rule of the job comes first, then the architecture: mlx-lm's models say which layers, such as
routers and gates, stay as they are or are kept in 8 bits (``quant_predicate``). All other layers
get the job's spec. Where a layer cannot have such a group, the next smaller of 32, 64 and 128 that
divides its inputs, or else the smallest, is used; where none does, the layer stays as it is stored,
or is stored dense where a fused rotation has turned it. Whatever is not as asked is noted.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from mlxquant.codes.spec import PLAIN_GROUPS, REPLICA_GROUPS, Spec, Whole
from mlxquant.codes.width import Width
from mlxquant.layers.blocks import Block, arrays_outside, inside
from mlxquant.layers.formats import stored_entry
from mlxquant.layers.traffic import leaf_modules, weight_count
from mlxquant.quantise.job import Job
from mlxquant.quantise.methods import METHODS

EXPERTS = (SwitchLinear, QuantizedSwitchLinear)
STACKS = (*EXPERTS, MultiLinear, QuantizedMultiLinear)
LAYERS = (nn.Linear, nn.QuantizedLinear, *STACKS)  # these very classes: others do more
ENDS = (nn.Embedding, nn.QuantizedEmbedding, nn.Linear, nn.QuantizedLinear)
_OTHER = "of a kind that is not quantised: kept as stored"
_LEAST_NOTED = 0.01  # of the weights; smaller arrays, such as convolutions, are no layers
Predicate = Callable[[str, nn.Module], bool | dict[str, Any]]


@dataclass
class BlockPlan:
    """The spec of each layer of a block by its path there; in those that are ``fixed`` a rule or
    the architecture set it, and a budget leaves it as it is. ``kept`` are the tensors, and
    ``entries`` the config's, of what stays as stored: layers that are not quantised, and numbers
    that the architecture wants in their own type. ``notes`` say, by a layer's path in the network,
    what it could not take of what was asked."""

    specs: dict[str, Spec] = field(default_factory=dict)
    fixed: set[str] = field(default_factory=set)
    kept: dict[str, mx.array] = field(default_factory=dict)
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


def plan_blocks(network: nn.Module, blocks: list[Block], job: Job) -> list[BlockPlan]:
    """The plans of a network's blocks, whose parameters are still as stored."""
    return [_plan(network, block, job) for block in blocks]


def noted(plans: Iterable[BlockPlan]) -> list[str]:
    """The plans' notes, one for all layers that differ only by the numbers in their paths."""
    alike: dict[tuple[str, str], list[str]] = {}
    for plan in plans:
        for path, note in plan.notes.items():
            alike.setdefault((re.sub(r"\b\d+\b", "*", path), note), []).append(path)
    return [f"{glob}, {len(paths)} layers: {note}" if len(paths) > 1 else f"{paths[0]}: {note}"
            for (glob, note), paths in alike.items()]


def ends_of(network: nn.Module, blocks: list[Block]) -> dict[str, nn.Module]:
    """The embedding, the head and other layers outside a network's blocks, by path."""
    paths = inside(blocks)
    return {path: module for path, module in network.named_modules()
            if isinstance(module, ENDS) and not path.startswith(paths)}


def plan_ends(network: nn.Module, blocks: list[Block], job: Job) -> BlockPlan:
    """The specs of the layers outside a network's blocks that are rounded: to the job's width, or,
    where a fused rotation spoils the codes that they have, to the width of these."""
    plan, ends, fused = BlockPlan(), ends_of(network, blocks), job.spec.rotation == "fused"
    own = next((getattr(module, "bits", None) for module in ends.values()), None)
    bits = job.embedding_bits or (own if fused else None)
    if bits is None:
        return plan
    if fused:  # a tied head is then stored apart
        ends.setdefault("lm_head", ends["model.embed_tokens"])
    # A source's own width comes in groups of 32 or more: none of them is coarser than it was.
    asked = Spec(bits=Width.of(bits), group_size=32 if bits == own else 64, method="rtn")
    for path, module in ends.items():
        spec, note = _fitted(asked, module, job)
        if note:
            plan.notes[path] = note
        if spec is not None:
            plan.specs[path] = spec
    plan.notes |= _others(arrays_outside(network, blocks), ends)
    return plan


def _plan(network: nn.Module, block: Block, job: Job) -> BlockPlan:
    plan, cast = BlockPlan(), getattr(network, "cast_predicate", lambda path: True)
    modules = leaf_modules(block.module)
    layers = tuple(f"{path}." for path, module in modules if type(module) in LAYERS)
    arrays = dict(tree_flatten(block.module.parameters()))
    plan.kept = {path: array for path, array in arrays.items()
                 if not path.startswith(layers) and not cast(block.full(path))}
    known = [path for path, module in modules if type(module) in (*LAYERS, *ENDS)]
    plan.notes = {block.full(path): note for path, note in _others(arrays, known).items()}
    for path, module in modules:
        if isinstance(module, nn.QuantizedEmbedding):
            plan.entries[path] = stored_entry(module)
            plan.kept |= {f"{path}.{k}": a for k, a in tree_flatten(module.parameters())}
        if type(module) not in LAYERS:
            continue
        full = block.full(path)
        asked = _asked(module, full, job, getattr(network, "quant_predicate", None))
        spec, note = (None, "") if asked is None else _fitted(asked, module, job)
        if note:
            plan.notes[full] = note
        if spec is not None:
            plan.specs[path] = spec
            if asked is not job.spec:  # though it may be equal
                plan.fixed.add(path)
        if spec is not None or job.spec.rotation == "fused":  # what is turned is not as stored
            continue
        plan.kept |= {f"{path}.{name}": array for name, array in tree_flatten(module.parameters())}
        if hasattr(module, "bits"):
            plan.entries[path] = stored_entry(module)
    return plan


def _others(arrays: dict[str, mx.array], known: Iterable[str]) -> dict[str, str]:
    """A note for each large matrix among ``arrays``, by path, that is in no ``known`` layer."""
    layers, least = tuple(f"{path}." for path in known), _LEAST_NOTED * sum(
        array.size for array in arrays.values())
    return {path: _OTHER for path, array in arrays.items()
            if array.ndim > 1 and array.size >= least and not path.startswith(layers)}


def inputs_of(module: nn.Module) -> int:
    """How many inputs a linear layer or a stack of matrices has."""
    return weight_count(module) * module.weight.shape[-1] // module.weight.size


def _asked(module: nn.Module, path: str, job: Job, predicate: Predicate | None) -> Spec | None:
    """The spec that the job's rules, or else the architecture, or else the default asks for."""
    if (spec := job.ruled(path)) is not None:
        return spec
    own = True if predicate is None else predicate(path, module)
    if not own:
        return None
    if isinstance(own, dict) and "bits" in own:
        return Spec(bits=Width.of(own["bits"]), group_size=own.get("group_size", 64), method="rtn")
    return job.spec


def _fitted(spec: Spec, module: nn.Module, job: Job) -> tuple[Spec | None, str]:
    """``spec`` changed as little as the layer needs, or None where it must stay; and the note."""
    inputs, stack, lost = inputs_of(module), isinstance(module, STACKS), list[str]()
    if inputs < min(PLAIN_GROUPS):
        return None, f"only {inputs} inputs{_as_it_is(job)}"
    if stack:
        spec, lost = _for_stack(spec, isinstance(module, (MultiLinear, QuantizedMultiLinear)), job)
    if spec.method == "replica":
        group = max((g for g in REPLICA_GROUPS if g <= spec.replica_group and (
            not g or inputs % g == 0)), default=0)
        replicas = min(spec.replicas, inputs // (group or 1))
        changed = replace(spec, replica_group=group, replicas=replicas)
        return changed, "" if changed == spec else (
            f"{inputs} inputs take {replicas} replicas in groups of {group or 1}")
    asked, fitting = spec.group_size, [g for g in PLAIN_GROUPS if inputs % g == 0]
    divides = isinstance(asked, Whole) or inputs % asked == 0
    if not divides or (stack and asked not in PLAIN_GROUPS):
        smaller = [g for g in fitting if isinstance(asked, Whole) or g < asked] or fitting[:1]
        if not smaller:
            return None, f"{inputs} inputs divide into no group{_as_it_is(job)}"
        spec = replace(spec, group_size=smaller[-1])
        lost.append(f"groups of {smaller[-1]}, " + (
            "since a stack of matrices takes 32, 64 or 128" if divides else
            f"since {asked} does not divide its {inputs} inputs"))
    return spec, "; ".join(lost)


def _as_it_is(job: Job) -> str:
    return ": stored dense" if job.spec.rotation == "fused" else ": kept as stored"


def _for_stack(spec: Spec, by_head: bool, job: Job) -> tuple[Spec, list[str]]:
    """``spec`` as a stack of matrices can take it, and what is lost: replicated experts stay so;
    all else is not rotated, and rounded to nearest where heads have a matrix each. The inputs of
    stacks are as they come."""
    if spec.method == "replica" and not by_head:
        return spec, []
    made = replace(spec, method="rtn" if by_head else spec.method, rotation=None)
    lost = {"rounded to nearest": made.method != spec.method,
            "not rotated": spec.rotation is not None,
            "inputs not balanced": METHODS[made.method].balance is not None,
            "inputs not rounded": job.activation is not None and not job.activation.off}
    return made, [what for what, is_lost in lost.items() if is_lost]
