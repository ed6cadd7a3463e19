"""Refinement of codes and scales against what an exhaustive float64 search and solver find."""

import mlx.core as mx
import numpy as np
import pytest

from mlxquant.codes.affine import expand, fit
from mlxquant.codes.spec import Spec
from mlxquant.quantise import refine


def problem(rows=6, columns=96, seed=0):
    random = np.random.default_rng(seed)
    x = random.normal(size=(500, columns)) @ random.normal(size=(columns, columns))
    hessian = x.T @ x / len(x)
    return random.normal(size=(rows, columns)).astype(np.float32), hessian.astype(np.float32)


def loss(weight, affine, hessian):
    error = np.array(affine.dequantise(), np.float64) - weight
    return ((error @ hessian.astype(np.float64)) * error).sum(1)


@pytest.mark.parametrize("bits", [1, "ternary", 2, 4])
def test_codes_move_as_one_by_one_trials_would(bits):
    weight, hessian = problem()
    spec = Spec(bits=bits, group_size=32)
    start = fit(mx.array(weight), spec)
    moved = np.array(refine.move_codes(mx.array(weight), start, mx.array(hessian)).codes)
    scales, biases = (np.array(expand(x, 32), np.float64) for x in (start.scales, start.biases))
    codes = np.array(start.codes, np.float64)
    for row in range(len(weight)):
        for j in range(weight.shape[1]):
            trials = np.repeat(codes[row][None], spec.bits.levels, 0)
            trials[:, j] = np.arange(spec.bits.levels)
            error = trials * scales[row] + biases[row] - weight[row]
            codes[row, j] = ((error @ hessian) * error).sum(1).argmin()
    assert (moved == codes).mean() > 0.99  # a tie broken differently in float32 moves what follows


@pytest.mark.parametrize("spec", [Spec(bits=2, group_size=32), Spec(bits=3, group_size=0),
                                  Spec(bits=2, group_size=32, symmetric=True),
                                  Spec(bits="ternary", group_size=32)],
                         ids=lambda s: f"{s.bits}-{s.group_size}")
@pytest.mark.parametrize("steps,near", [(40, 1e-3), (refine._STEPS, 0.02)])
def test_scales_go_to_the_least_squares_solution(spec, steps, near, monkeypatch):
    monkeypatch.setattr(refine, "_STEPS", steps)
    weight, hessian = problem()
    start = fit(mx.array(weight), spec)
    found = refine.refit(mx.array(weight), start, mx.array(hessian), mx.float32)
    root = np.linalg.cholesky(hessian.astype(np.float64))  # e H eᵀ = ‖e·root‖²
    groups = start.scales.shape[1]
    for row, codes in enumerate(np.array(start.codes, np.float64)):
        level = codes - (spec.bits.levels - 1) / 2 if spec.mirrored else codes
        member = np.kron(np.eye(groups), np.ones(start.group))
        basis = member * level if spec.mirrored else np.concatenate([member * level, member])
        best, *_ = np.linalg.lstsq((basis @ root).T, weight[row] @ root, rcond=None)
        least = np.square((best @ basis - weight[row]) @ root).sum()
        assert loss(weight, found, hessian)[row] == pytest.approx(least, rel=near)


@pytest.mark.parametrize("spec", [Spec(bits=2, group_size=32), Spec(bits=1, group_size=32),
                                  Spec(bits=2, group_size=-1),
                                  Spec(bits=4, group_size=32, symmetric=True)],
                         ids=lambda s: f"{s.bits}-{s.group_size}")
def test_no_round_raises_the_loss_of_a_row(spec):
    weight, hessian = problem(seed=3)
    current = fit(mx.array(weight), spec)
    first = loss(weight, current, hessian).sum()
    for _ in range(4):
        better = refine.refine(mx.array(weight), current, mx.array(hessian), mx.float16)
        assert (loss(weight, better, hessian) <= loss(weight, current, hessian) * (1 + 1e-5)).all()
        current = better
    assert loss(weight, current, hessian).sum() < 0.9 * first
    assert np.array_equal(current.scales, current.scales.astype(mx.float16).astype(mx.float32))
