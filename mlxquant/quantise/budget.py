"""Spread a budget of bits over layers so that the summed damage is least.

Lagrangian relaxation, after Shoham & Gersho 1988, "Efficient bit allocation for an arbitrary set of
quantizers" (https://doi.org/10.1109/29.90373): for a price per bit every layer takes the option
with the least damage + price · bits, which lies on the lower convex hull of its options. Lowering
the price walks the hulls step by step, the most damage saved per bit first. The walk ends at a step
that does not fit: there the damage exceeds the least possible by less than that step would save.
The rest of the budget is filled with smaller steps.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

from mlxquant.base.errors import BadValue

_Layer = TypeVar("_Layer", str, int)


@dataclass(frozen=True)
class Option:
    """One way to store a layer, or a set of siblings.

    ``choice`` is the caller's name for it, ``bits`` what it stores in all, codes and scales, and
    ``damage`` what it costs in any unit that adds up over layers, such as nats per token.
    """

    choice: Any
    bits: float
    damage: float


def choose(options: dict[str, list[Option]], budget: float) -> dict[str, Option]:
    """The option of every layer, by its name, with the least summed damage whose summed bits are at
    most ``budget``.

    Exact where the walk along the hulls spends the budget to the bit or reaches every layer's least
    damage; otherwise near it, as the module says. Ties go to the layer listed first. Raises
    ``BadValue`` for a budget below the least bits possible, which it names.
    """
    frontiers = {layer: _frontier(ways) for layer, ways in options.items()}
    chosen = {layer: ways[0] for layer, ways in frontiers.items()}
    least = sum(option.bits for option in chosen.values())
    if not least <= budget:  # also refuses nan
        raise BadValue(f"the budget is {budget:.15g} bits, the smallest options of the "
                       f"{len(options)} layers take {least:.15g}; allowed is that or more")
    left = budget - least
    for layer, old, new in _walk(frontiers):
        if new.bits - old.bits > left:
            break
        left -= new.bits - old.bits
        chosen[layer] = new
    while fitting := [(layer, option) for layer, ways in frontiers.items() for option in ways
                      if 0 < option.bits - chosen[layer].bits <= left]:  # off the hulls too
        layer, option = max(fitting, key=lambda step: _rate(chosen[step[0]], step[1]))
        left -= option.bits - chosen[layer].bits
        chosen[layer] = option
    return chosen


def at_every_price(layers: list[list[Option]]) -> list[tuple[Option, ...]]:
    """One option per layer at each common price per bit, from high to low: the walk along the
    hulls, from the smallest options to those of the least damage."""
    frontiers = dict(enumerate(map(_frontier, layers)))
    chosen = [ways[0] for ways in frontiers.values()]
    found = [tuple(chosen)]
    for index, _, new in _walk(frontiers):
        chosen[index] = new
        found.append(tuple(chosen))
    return found


def _frontier(ways: list[Option]) -> list[Option]:
    """The options that no other beats in both bits and damage, by rising bits."""
    kept: list[Option] = []
    for option in sorted(ways, key=lambda option: (option.bits, option.damage)):
        if not kept or option.damage < kept[-1].damage:
            kept.append(option)
    return kept


def _hull(frontier: list[Option]) -> list[Option]:
    """The lower convex hull of a frontier: each step saves less per bit than the one before."""
    kept: list[Option] = []
    for option in frontier:
        while len(kept) > 1 and _rate(kept[-2], kept[-1]) < _rate(kept[-1], option):
            kept.pop()
        kept.append(option)
    return kept


def _walk(frontiers: dict[_Layer, list[Option]]) -> list[tuple[_Layer, Option, Option]]:
    """The steps along the hulls of all layers, as (layer, old, new), the most damage saved per bit
    first."""
    steps = [(layer, old, new) for layer, ways in frontiers.items()
             for old, new in pairwise(_hull(ways))]
    return sorted(steps, key=lambda step: -_rate(step[1], step[2]))  # stable: ties keep their order


def _rate(old: Option, new: Option) -> float:
    """Damage saved per bit."""
    return (old.damage - new.damage) / (new.bits - old.bits)
