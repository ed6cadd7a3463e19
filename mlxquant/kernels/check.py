"""Each kernel against its reference, on this machine: at first use, and all of them for
``mlxquant check``."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Any

import mlx.core as mx

from mlxquant.base.errors import first_line
from mlxquant.kernels import (
    backend,
    column_sweep,
    expand_codes,
    prepare_input,
    read_ceiling,
    replicated_matvec,
    replicated_tensor_cores,
    rotary,
)
from mlxquant.kernels.cases import ALL, Case, Heads, cases, heads, mixtures
from mlxquant.kernels.first_step import AS_IS, AsIs, Gate, Norm
from mlxquant.kernels.matrix import NOTHING, Added, Scales
from mlxquant.kernels.prepare_input import Layout

HALF, SINGLE = 2e-3, 1e-5  # relative error that is allowed; bfloat16 rounds results to 8 bits
_ALLOWED = {mx.float32: SINGLE, mx.float16: HALF, mx.bfloat16: 4 * HALF}
_SIXTEEN_BITS = (mx.float16, mx.bfloat16)
MIXTURE = "replicated_experts"  # all kernels of a mixture's experts, in the order of a token


@dataclass(frozen=True)
class Comparison:
    """One kernel and case; ``error`` is null where it did not run, and ``complaint`` says why."""

    kernel: str
    case: str
    error: float | None
    allowed: float
    complaint: str | None = None

    @property
    def passed(self) -> bool:
        return self.error is not None and self.error <= self.allowed


def _prepare(case: Case, step: type[AsIs] = AsIs) -> float:
    (x, matrix), (other, _) = case.draw(), case.draw(1)
    scales, first = matrix.scales, AS_IS
    if step is Norm:
        x, first = 3 * x, Norm(mx.abs(other[0]), 0.1)  # an eps that shows
    elif step is Gate:
        x, first = mx.concatenate([x, other], axis=1), Gate()
    layouts = [replicated_matvec.layout(case.shape, case.dtype, case.tokens)]
    if case.dtype != mx.float32:
        layouts.append(replicated_tensor_cores.layout(case.shape, case.dtype))
    errors = []
    for layout in layouts:
        found = prepare_input.prepare(x, scales, layout, first)
        expected = prepare_input.reference(x, scales, layout, first)
        errors += _prepared_errors(found, expected, layout, scales)
    return max(errors)


def _prepared_errors(found: mx.array, expected: mx.array, layout: Layout,
                     scales: Scales) -> list[float]:
    """Errors of X, and of the sums behind it against the sums of the X that was found."""
    shape = (layout.padded(scales.inputs) // layout.block, layout.run // layout.piece, -1,
             layout.lanes, layout.piece)
    size = len(found) * layout.padded(scales.inputs) // layout.stored(scales.inputs)
    again = prepare_input.with_sums(found[:size].reshape(shape), layout, scales.spec.bits)
    return [backend.relative_error(found[:size], expected[:size]),
            backend.relative_error(found, again)]


def _product(case: Case, kernel: ModuleType) -> float:
    """Error of the matrix kernel alone: its input is prepared by the reference."""
    x, matrix = case.draw()
    layout = kernel.layout(case.shape, case.dtype, case.tokens)
    prepared = prepare_input.reference(x, matrix.scales, layout)
    with mx.stream(mx.cpu):  # a GPU's own products may round float32 to 10 bits
        expected = matrix.product(matrix.scales.rotated(x), mx.float32)
    wide, _ = replace(case, inputs=case.rows, tokens=1 + case.tokens, group=0, rotation=0).draw(3)
    terms = case.inputs**0.5 * wide  # as large as the product
    errors = []
    for added in (NOTHING, Added(terms[0], terms[1:])):
        y = kernel.multiply(prepared, matrix, case.tokens, case.dtype, added=added)
        with mx.stream(mx.cpu):
            errors.append(backend.relative_error(y, added(expected)))
    return max(errors)


_matvec = partial(_product, kernel=replicated_matvec)
_tensor_cores = partial(_product, kernel=replicated_tensor_cores)


def _expand(case: Case) -> float:
    _, matrix = case.draw()
    found = expand_codes.expand(matrix, case.dtype)
    with mx.stream(mx.cpu):
        return backend.relative_error(found, matrix.dense())


def _experts(case: Case) -> float:
    """Largest error, for experts, of the preparation with and without a gate, the product and the
    expansion."""
    x, matrix = case.draw()
    layout, chosen = replicated_matvec.layout(case.shape, case.dtype), case.chosen()
    prepared = prepare_input.reference(x, matrix.scales, layout, AS_IS, chosen)
    y = replicated_matvec.multiply(prepared, matrix, len(chosen), case.dtype, chosen)
    gated = mx.concatenate([x, case.draw(1)[0]], axis=1)
    with mx.stream(mx.cpu):
        expected = matrix.product(matrix.scales.rotated(x), mx.float32, chosen)
    errors = [_expand(case), backend.relative_error(y, expected)]
    for given, first in ((x, AS_IS), (gated, Gate())):
        errors += _prepared_errors(
            prepare_input.prepare(given, matrix.scales, layout, first, chosen),
            prepare_input.reference(given, matrix.scales, layout, first, chosen), layout,
            matrix.scales)
    return max(errors)


def _rotary(case: Heads) -> float:
    """Largest error of the queries and of the whole cache, which the kernel changes in place."""
    drawn = case.draw()
    expected = rotary.reference(*drawn)
    mx.eval(expected)
    return max(map(backend.relative_error, rotary.turn(*drawn), expected))


@dataclass(frozen=True)
class _Check:
    """How a kernel's error in a case is found, and the cases it serves."""

    error_of: Callable[[Any], float]
    cases: Callable[[tuple[mx.Dtype, ...]], Iterator[Case] | Iterator[Heads]] = cases
    dtypes: tuple[mx.Dtype, ...] = ALL

    def worst(self) -> float:
        """The largest error in a few cases, in units of what is allowed."""
        return max(self.error_of(case) / _ALLOWED[case.dtype]
                   for case in self.cases(self.dtypes[:2]) if case.quick)


CHECKS = {**{step.kernel: _Check(partial(_prepare, step=step)) for step in (AsIs, Norm, Gate)},
          "replicated_matvec": _Check(_matvec),
          "replicated_tensor_cores": _Check(_tensor_cores, dtypes=_SIXTEEN_BITS),
          "expand_codes": _Check(_expand), "rotary": _Check(_rotary, heads),
          MIXTURE: _Check(_experts, mixtures)}


def pending() -> list[tuple[str, str, float, Callable[[], float]]]:
    """(kernel, case, allowed error, how to find the error) of all that this machine can compare;
    none without a GPU."""
    if not backend.has_gpu():
        return []
    made = [("column_sweep", "70×64, 4 levels", column_sweep.TIES, column_sweep.disagreement),
            ("read_ceiling", "192 kB", 0.0, read_ceiling.disagreement)]
    for kernel, check in CHECKS.items():
        if kernel != "replicated_tensor_cores" or backend.is_cuda():
            made += [(kernel, str(case), _ALLOWED[case.dtype], partial(check.error_of, case))
                     for case in check.cases(check.dtypes)]
    return made


def comparisons() -> Iterator[Comparison]:
    """Run the comparisons that are ``pending``, one by one."""
    for kernel, case, allowed, find_error in pending():
        try:
            yield Comparison(kernel, case, find_error(), allowed)
        except Exception as failure:  # a compiler's complaints have no common type
            yield Comparison(kernel, case, None, allowed, first_line(failure))


def trusted(kernel: str) -> bool:
    """Whether ``kernel`` may be used here: on a GPU on which it agreed with its reference, tried
    once per chip and MLX version on a few of the cases above."""
    return backend.has_gpu() and backend.trusted(kernel, CHECKS[kernel].worst, 1.0)
