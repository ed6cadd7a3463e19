"""Stacked siblings as one matrix: rotated, quantised, and the error measured."""

import zlib
from itertools import accumulate

import mlx.core as mx

from mlxquant.codes import hadamard
from mlxquant.codes.spec import Spec, Whole
from mlxquant.codes.statistics import Statistics
from mlxquant.quantise import awq
from mlxquant.quantise.methods import METHODS, Codes
from mlxquant.quantise.profile import step
from mlxquant.quantise.settings import Settings

_MEASURED = 2e10  # rows · columns²: above it, measuring would take longer than rounding


@step("rounding")
def codes_of(weights: dict[str, mx.array], statistics: Statistics | None, spec: Spec,
              settings: Settings) -> dict[str, Codes]:
    """Siblings of one spec as one matrix: rows are independent, the input is shared."""
    if spec.group_size is Whole.MATRIX and len(weights) > 1:  # one scale a matrix: not together
        apart = [codes_of({p: w}, statistics, spec, settings) for p, w in weights.items()]
        return {path: made for one in apart for path, made in one.items()}
    rows = [len(weight) for weight in weights.values()]
    made = METHODS[spec.method].quantise(mx.concatenate(list(weights.values())), statistics, spec,
                                         settings)
    return dict(zip(weights, split(made, rows)))


def split(made: Codes, rows: list[int]) -> list[Codes]:
    """The matrices that were stacked, by their numbers of rows."""
    return [made.rows(slice(end - count, end)) for count, end in zip(rows, accumulate(rows))]


@step("errors")
def relative_error(weight: mx.array, made: Codes, statistics: Statistics | None) -> float:
    """E‖(Ŵ − W) x‖² / E‖W x‖²; for a very large matrix only over evenly spread rows, at least 256.
    Without statistics ‖Ŵ − W‖² / ‖W‖²."""
    rows, columns = weight.shape
    step = max(1, min(rows // 256, round(rows * columns**2 / _MEASURED)))
    weight, error = weight[::step], made.rows(slice(None, None, step)).dequantise() - weight[::step]
    if statistics is None:
        parts = mx.square(error).sum().item(), mx.square(weight).sum().item()
    else:
        parts = (awq.output_error(error, statistics.hessian),
                 awq.output_error(weight, statistics.hessian))
    return parts[0] / parts[1] if parts[1] > 0 else 0.0


def by_spec(specs: dict[str, Spec]) -> dict[Spec, list[str]]:
    kinds: dict[Spec, list[str]] = {}
    for path, spec in specs.items():
        kinds.setdefault(spec, []).append(path)
    return kinds


def rotated(statistics: Statistics, signs: mx.array, size: int) -> Statistics:
    """Statistics of R x. E|x| and max |x|, not known for R x, are set to 1 and 4 RMS."""
    hessian, cross = hadamard.rotate_hessian(statistics.hessian, signs, size), statistics.cross
    cross = None if cross is None else hadamard.rotate_hessian(cross, signs, size)
    deviation = mx.sqrt(mx.maximum(hessian.diagonal(), 0))
    return Statistics(statistics.count, hessian, deviation, deviation * 4, cross)


def rotation_of(seed: int, path: str, columns: int) -> tuple[mx.array, int]:
    """Signs (n,) and block of an input's rotation, the same in every run."""
    mixed = zlib.crc32(f"{seed}:{path}".encode())
    return hadamard.random_signs(columns, mixed), hadamard.default_block(columns)
