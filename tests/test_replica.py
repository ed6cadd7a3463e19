"""Fitting replicated layers: every step against float64, and no round that makes things worse."""

from dataclasses import replace
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest

from mlxquant.base.errors import BadValue
from mlxquant.codes.spec import REPLICA_WIDTHS, ReplicaShape, Spec
from mlxquant.codes.statistics import Statistics
from mlxquant.codes.width import Width
from mlxquant.quantise import envelope, replica
from mlxquant.quantise.matrices import split
from mlxquant.quantise.methods import METHODS
from mlxquant.quantise.refine import move_codes
from mlxquant.quantise.settings import Settings
from mlxquant.quantise.sweep import damped

REPLICA = METHODS["replica"]

SHAPES = [(1, 0), (4, 0), (3, 8), (4, 16)]


def problem(rows=24, columns=64, seed=0):
    random = np.random.default_rng(seed)
    x = random.normal(size=(400, columns)) @ (random.normal(size=(columns, columns))
                                              + 2 * np.eye(columns))
    statistics = Statistics.empty(columns)
    statistics.add(mx.array(x.astype(np.float32)))
    weight = random.normal(size=(rows, columns)) * np.exp(0.5 * random.normal(size=(rows, 1)))
    return mx.array(weight.astype(np.float32)), statistics


def spec(bits=2, replicas=4, group=0, **options):
    return Spec(method="replica", bits=bits, replicas=replicas, replica_group=group, **options)


def loss(weight, found, hessian):
    error = np.array(found.dequantise(), np.float64) - np.array(weight, np.float64)
    return ((error @ np.array(hessian, np.float64)) * error).sum()


def diagonal_loss(weight, found, importance):
    error = np.array(found.dequantise(), np.float64) - np.array(weight, np.float64)
    return (np.square(error) * np.array(importance)).sum()


@pytest.mark.parametrize("size", [1, 2, 7, 16])
def test_small_systems_are_solved(size):
    random = np.random.default_rng(size)
    root = random.normal(size=(50, size, size + 3))
    matrix, target = root @ root.transpose(0, 2, 1), random.normal(size=(50, size))
    found = np.array(envelope.solve(mx.array(matrix.astype(np.float32)),
                                    mx.array(target.astype(np.float32))))
    ridge = 1e-5 * np.einsum("rkk->r", matrix)[:, None, None] / size * np.eye(size)
    exact = np.linalg.solve(matrix + ridge, target[..., None])[..., 0]
    assert np.linalg.norm(found - exact) < 2e-3 * np.linalg.norm(exact)


@pytest.mark.parametrize("bits", REPLICA_WIDTHS)
@pytest.mark.parametrize("replicas,group", SHAPES)
def test_no_round_of_the_fit_raises_the_error(bits, replicas, group):
    weight, statistics = problem()
    importance = statistics.hessian.diagonal()
    fits = [envelope.fit(weight, ReplicaShape(bits, replicas, group), importance, rounds=rounds)
            for rounds in range(6)]
    losses = [diagonal_loss(weight, fit, importance) for fit in fits]
    assert all(after <= before * (1 + 1e-4) for before, after in pairwise(losses))
    assert losses[-1] <= losses[0] * (1 + 1e-6)


@pytest.mark.parametrize("replicas,group", SHAPES)
def test_scalings_of_the_fit_are_the_least_squares_solution(replicas, group):
    weight, statistics = problem()
    importance = statistics.hessian.diagonal()
    found = envelope.fit(weight, ReplicaShape(Width.TWO, replicas, group), importance, rounds=3)
    levels, inside = np.array(found.levels(), np.float64), np.array(found.inputs(), np.float64)
    root = np.sqrt(np.array(importance, np.float64))
    out = np.array(envelope._fit_outputs(weight, found, importance), np.float64)
    for row in range(len(levels)):
        basis = (levels[row][:, None] * inside) * root[:, None]
        wanted = np.array(weight, np.float64)[row] * root
        best, *_ = np.linalg.lstsq(basis, wanted, rcond=None)
        least, ours = (np.square(basis @ b - wanted).sum() for b in (best, out[row]))
        assert ours <= least * (1 + 1e-3) + 1e-9


@pytest.mark.parametrize("bits", REPLICA_WIDTHS)
@pytest.mark.parametrize("replicas,group", SHAPES)
def test_the_sweep_and_each_round_after_it_lower_the_error_on_the_data(bits, replicas, group):
    weight, statistics = problem()
    hessian = np.array(damped(statistics.hessian), np.float64)
    rounded = envelope.fit(weight, ReplicaShape(bits, replicas, group),
                           statistics.hessian.diagonal()).rounded(mx.float16)
    losses = [loss(weight, rounded, hessian)]
    losses += [loss(weight, REPLICA.quantise(weight, statistics,
                                             spec(bits, replicas, group, refine=n), Settings()),
                    hessian)
               for n in range(4)]
    assert losses[1] < losses[0]
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(losses[1:]))


@pytest.mark.parametrize("replicas,group", SHAPES)
def test_each_step_of_a_round_lowers_the_error(replicas, group):
    weight, statistics = problem()
    hessian = damped(statistics.hessian)
    found = envelope.fit(weight, ReplicaShape(Width.TWO, replicas, group),
                         statistics.hessian.diagonal()).rounded(mx.float16)
    for step in (move_codes, lambda *a: replica.fit_outputs(*a, mx.float16),
                 lambda *a: replica.fit_inputs(*a, mx.float16)):
        before = loss(weight, found, hessian)
        found = step(weight, found, hessian)
        assert loss(weight, found, hessian) < before


@pytest.mark.parametrize("replicas,group", SHAPES)
def test_gradient_steps_reach_the_least_squares_solution(replicas, group, monkeypatch):
    monkeypatch.setattr(replica, "_GRADIENT_STEPS", 300)
    weight, statistics = problem(rows=12, columns=32)
    hessian = np.array(damped(statistics.hessian), np.float64)
    found = envelope.fit(weight, ReplicaShape(Width.TWO, replicas, group),
                         statistics.hessian.diagonal())
    ours = replica._descend(weight, found, mx.array(hessian.astype(np.float32)), "replica_in")
    root = np.linalg.cholesky(hessian)

    def seen(unit):
        """What a step of one scale changes in the outputs."""
        scales = mx.array(unit.reshape(ours.shape).astype(np.float32))
        made = replace(found, replica_in=scales).dequantise()
        return (np.array(made, np.float64) @ root).ravel()

    basis = np.stack([seen(unit) for unit in np.eye(ours.size)], axis=1)
    wanted = (np.array(weight, np.float64) @ root).ravel()
    best, *_ = np.linalg.lstsq(basis, wanted, rcond=None)
    least = np.square(basis @ best - wanted).sum()
    start = loss(weight, found, hessian)
    ended = loss(weight, replace(found, replica_in=ours), hessian)
    assert ended - least < 0.02 * (start - least) + 1e-3 * least


def test_more_replicas_and_more_bits_fit_better():
    weight, statistics = problem(rows=48)
    hessian = statistics.hessian
    by_replicas = [loss(weight, REPLICA.quantise(weight, statistics, spec(2, k), Settings()),
                        hessian) for k in (1, 4, 16)]
    by_bits = [loss(weight, REPLICA.quantise(weight, statistics, spec(b, 2), Settings()), hessian)
               for b in REPLICA_WIDTHS]
    assert by_replicas == sorted(by_replicas, reverse=True)
    assert by_bits == sorted(by_bits, reverse=True)


def test_dead_rows_and_inputs_give_finite_scales():
    weight, statistics = problem()
    alive = mx.array(np.arange(64) >= 16, mx.float32)
    statistics.hessian = statistics.hessian * alive * alive[:, None]
    weight = weight * (mx.arange(24) != 3)[:, None]
    for replicas, group in SHAPES:
        found = REPLICA.quantise(weight, statistics, spec(2, replicas, group), Settings())
        assert np.isfinite(np.array(found.dequantise())).all()


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_fewer_rows_than_replicas_are_met(rows):
    """A router has a row for each expert."""
    for key in map(mx.random.key, range(4)):
        weight = mx.random.normal((rows, 128), key=key)
        found = envelope.fit(weight, ReplicaShape(2, 16), mx.ones(128), rounds=2)
        assert mx.allclose(found.dequantise(), weight, atol=1e-3)


def test_stacked_siblings_split_into_their_rows():
    weight, statistics = problem()
    found = REPLICA.quantise(weight, statistics, spec(), Settings())
    parts = split(found, [10, 14])
    assert [part.codes.shape for part in parts] == [(10, 64), (14, 64)]
    assert mx.array_equal(mx.concatenate([part.dequantise() for part in parts]), found.dequantise())


@pytest.mark.parametrize("options,message", [
    (dict(bits=5), "bits is 5"), (dict(replicas=0), "replicas is 0"),
    (dict(group=12), "replica_group is 12")])
def test_impossible_shapes_are_refused(options, message):
    with pytest.raises(BadValue, match=message):
        spec(**options)
    with pytest.raises(BadValue, match="does not divide the 40 inputs of q"):
        ReplicaShape(replica_group=16).check_inputs(40, "q")


@pytest.mark.parametrize("alike", [0.0, 0.99])
@pytest.mark.parametrize("columns", [1, 2, 16])
def test_columns_become_orthonormal_and_keep_their_span(columns, alike):
    drawn = mx.random.normal((64, columns), key=mx.random.key(0))
    drawn = (alike * drawn[:, :1] + (1 - alike) * drawn) * 10.0 ** mx.arange(columns)
    found = envelope._orthonormal(drawn)
    assert mx.allclose(found.T @ found, mx.eye(columns), atol=1e-4)
    kept = found @ (found.T @ drawn)
    assert (mx.linalg.norm(kept - drawn, axis=0) < 1e-3 * mx.linalg.norm(drawn, axis=0)).all()


def test_columns_that_are_the_same_do_no_harm():
    assert mx.isfinite(envelope._orthonormal(mx.ones((64, 3)))).all()
