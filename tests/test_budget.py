"""The allocation of bits against every allocation there is."""

from itertools import product

import numpy as np
import pytest

from mlxquant.base.errors import BadValue
from mlxquant.codes.spec import Spec
from mlxquant.quantise.budget import Option, at_every_price, choose


def random_options(seed, layers=4, ways=5):
    """Any bits and damages, some dominated; the first listed is not the smallest."""
    random = np.random.default_rng(seed)
    return {f"layer{i}": [Option(k, float(random.integers(1, 40)), float(random.exponential()))
                          for k in range(ways)] for i in range(layers)}


def convex_options(seed, layers=4, size=8):
    """Equal sizes, and damage that falls by less with every bit."""
    random = np.random.default_rng(seed)
    options = {}
    for i in range(layers):
        saved = -np.sort(-random.exponential(size=4))
        damages = saved.sum() - np.concatenate([[0], np.cumsum(saved)])
        options[f"layer{i}"] = [Option(bits, float(bits * size), float(damage))
                                for bits, damage in enumerate(damages, 1)]
    return options


def totals(choice):
    return sum(o.bits for o in choice.values()), sum(o.damage for o in choice.values())


def least_damage(options, budget):
    every = (dict(zip(options, ways)) for ways in product(*options.values()))
    return min(damage for bits, damage in map(totals, every) if bits <= budget)


def budgets(options, count):
    low, high = (sum(pick(o.bits for o in ways) for ways in options.values())
                 for pick in (min, max))
    return np.linspace(low, high, count)


def test_near_the_best_of_all_allocations_and_never_over_budget():
    """Above the optimum by less than one layer can save at most; on average by under 1 % of all
    savings."""
    gaps = []
    for seed in range(40):
        options = random_options(seed)
        floors = [min(ways, key=lambda o: (o.bits, o.damage)).damage for ways in options.values()]
        saved = [floor - min(o.damage for o in ways)
                 for floor, ways in zip(floors, options.values())]
        for budget in budgets(options, 7):
            bits, damage = totals(choose(options, budget))
            gap = damage - least_damage(options, budget)
            assert bits <= budget and -1e-9 < gap <= max(saved) + 1e-9
            gaps.append(gap / max(sum(saved), 1e-9))
    assert np.mean(gaps) < 0.01 and np.mean(np.array(gaps) < 1e-9) > 0.85


@pytest.mark.parametrize("seed", range(5))
def test_convex_damage_and_equal_steps_are_solved_exactly(seed):
    options = convex_options(seed)
    for budget in budgets(options, 30):  # also between the steps
        bits, damage = totals(choose(options, budget))
        assert bits <= budget and damage == pytest.approx(least_damage(options, budget), abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_layers_taken_together_stand_for_all_that_they_take_apart(seed):
    options = random_options(seed)
    together = at_every_price(list(options.values()))
    bits, damages = zip(*(totals(dict(zip(options, ways))) for ways in together))
    assert list(bits) == sorted(bits) and list(damages) == sorted(damages, reverse=True)
    for ways in together:
        budget = sum(option.bits for option in ways)
        assert tuple(choose(options, budget).values()) == ways
    first, *rest = options.values()
    joined = {"first": first, "rest": [Option(ways, *totals(dict(enumerate(ways))))
                                       for ways in at_every_price(rest)]}
    for budget in map(float, bits):
        assert totals(choose(joined, budget)) == pytest.approx(totals(choose(options, budget)))


def test_the_remainder_takes_an_option_off_the_hull():
    options = {"a": [Option("small", 10, 10.0), Option("middle", 15, 9.0),
                     Option("large", 20, 0.0)]}
    assert choose(options, 19)["a"].choice == "middle"
    assert choose(options, 20)["a"].choice == "large"


def test_a_step_too_large_does_not_hold_up_the_smaller_ones():
    options = {"big": [Option(2, 100, 50.0), Option(4, 200, 0.0)],
               "little": [Option(2, 10, 1.0), Option(4, 20, 0.9)]}
    assert {layer: o.choice for layer, o in choose(options, 150).items()} == {"big": 2, "little": 4}


def test_a_large_budget_takes_the_least_damage_and_no_bit_more():
    options = random_options(1)
    options["layer0"] += [Option("best", 50, -1.0), Option("as good", 60, -1.0),
                          Option("worse", 70, 5.0)]
    chosen = choose(options, 1e12)
    assert chosen["layer0"].choice == "best"
    assert all(chosen[layer].damage == min(o.damage for o in ways)
               for layer, ways in options.items())


def test_too_small_a_budget_names_the_least_possible():
    options = {"a": [Option(3, 30, 0.1), Option(2, 20, 0.2)], "b": [Option(2, 22.5, 1.0)]}
    assert totals(choose(options, 42.5))[0] == 42.5
    for budget in (42, 0, float("nan")):
        with pytest.raises(BadValue, match=f"budget is {budget} bits.* 2 layers take 42.5"):
            choose(options, budget)


def test_ties_go_to_the_layer_listed_first_whatever_the_order_of_its_options():
    ways = [Option(Spec(bits=b), 10 * b, 8.0 - b) for b in (2, 3, 4)]
    options = {"x": ways, "b": ways[::-1], "a": ways}
    assert [o.choice.bits.value for o in choose(options, 80).values()] == [4, 2, 2]
    assert [o.choice.bits.value for o in choose(options, 90).values()] == [4, 3, 2]
    assert choose(options, 90) == choose(options, 90)


def test_no_layers_take_no_bits():
    assert choose({}, 0) == {}
