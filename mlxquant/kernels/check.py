"""Each kernel against its reference, on this machine: at first use, and all of them for ``mlxquant check``."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import numpy as np

from mlxquant.codes import hadamard
from mlxquant.codes.spec import REPLICA_WIDTHS
from mlxquant.codes.width import Width
from mlxquant.kernels import (
    backend,
    code_order,
    column_sweep,
    expand_codes,
    prepare_input,
    read_ceiling,
    replicated_matvec,
    replicated_tensor_cores,
)
from mlxquant.kernels.first_step import AS_IS, AsIs, Gate, Norm
from mlxquant.kernels.prepare_input import Scales

HALF, SINGLE = 2e-3, 1e-5  # relative error that is allowed; bfloat16 rounds results to 8 bits
_ALLOWED = {mx.float32: SINGLE, mx.float16: HALF, mx.bfloat16: 4 * HALF}


@dataclass(frozen=True)
class Outcome:
    """One comparison; ``error`` is null where the kernel did not run, and ``complaint`` says why."""

    kernel: str
    case: str
    error: float | None
    allowed: float
    complaint: str | None = None

    @property
    def passed(self) -> bool:
        return self.error is not None and self.error <= self.allowed


@dataclass(frozen=True)
class Case:
    """A random replicated matrix and an input for it."""

    bits: Width
    replicas: int
    group: int
    rotation: int
    rows: int
    inputs: int
    tokens: int
    dtype: mx.Dtype

    def __str__(self) -> str:
        shape = f"{self.bits} bit K{self.replicas} " + f"G{self.group} " * bool(self.group)
        return f"{shape}{self.rows}×{self.inputs}, {self.tokens} tokens, {str(self.dtype).split('.')[-1]}"

    def draw(self, seed: int = 0) -> tuple[mx.array, mx.array, mx.array, Scales]:
        """x (tokens, n), codes in the kernels' order, B (m, K), and what siblings share."""
        random = np.random.default_rng(seed)

        def normal(*shape: int) -> mx.array:
            return mx.array(random.normal(size=shape).astype(np.float32))

        shape = self.rows, self.inputs
        codes = mx.array(random.integers(0, self.bits.levels, shape).astype(np.uint8))
        scales = Scales.of(
            self.inputs, self.replicas, self.group, self.rotation,
            normal(self.inputs // (self.group or 1), self.replicas), normal(self.inputs) if self.group else None,
            hadamard.pack_signs(hadamard.random_signs(self.inputs, seed)) if self.rotation else None)
        words = code_order.pack(codes, self.bits.code_bits)
        kept = self.dtype if self.dtype != mx.float32 else mx.float16
        return normal(self.tokens, self.inputs).astype(self.dtype), words, normal(self.rows, self.replicas).astype(kept), scales


def _cases(dtypes: tuple = (mx.float32, mx.float16, mx.bfloat16)) -> Iterator[Case]:
    """Every width and dtype, plain and grouped, sizes that fill nothing up, several tokens."""
    for dtype in dtypes:
        for bits in REPLICA_WIDTHS:
            yield Case(bits, 4, 0, 64, 83, 1344, 1, dtype)
            yield Case(bits, 8, 16, 64, 40, 576, 3, dtype)
        yield Case(Width.TWO, 1, 0, 0, 17, 100, 8, dtype)
        yield Case(Width.TWO, 16, 64, 256, 33, 2304, 4, dtype)


def _prepare(case: Case) -> float:
    x, _, _, scales = case.draw()
    return _preparation(case, x, scales, AS_IS)


def _prepare_normed(case: Case) -> float:
    x, _, _, scales = case.draw()
    return _preparation(case, 3 * x, scales, Norm(mx.abs(case.draw(1)[0][0]), 0.1))  # an eps that shows


def _prepare_gated(case: Case) -> float:
    gate, _, _, scales = case.draw()
    return _preparation(case, mx.concatenate([gate, case.draw(1)[0]], axis=1), scales, Gate())


def _preparation(case: Case, x: mx.array, scales: Scales, first: AsIs) -> float:
    layouts = [replicated_matvec.layout(case.group)]
    if case.dtype != mx.float32:
        layouts.append(replicated_tensor_cores.layout(case.bits.code_bits, case.dtype))
    return max(backend.relative_error(prepare_input.prepare(x, scales, layout, first),
                                      prepare_input.reference(x, scales, layout, first)) for layout in layouts)


def _matvec(case: Case) -> float:
    return _product(case, replicated_matvec, replicated_matvec.layout(case.group))


def _tensor_cores(case: Case) -> float:
    return _product(case, replicated_tensor_cores,
                    replicated_tensor_cores.layout(case.bits.code_bits, case.dtype))


def _product(case: Case, kernel, layout: prepare_input.Layout) -> float:
    """Of the matrix kernel alone: its input is prepared by the reference."""
    x, codes, replica_out, scales = case.draw()
    levels = case.bits.levels
    prepared = prepare_input.reference(x, scales, layout)
    y = kernel.multiply(prepared, codes, replica_out, scales, levels, case.tokens, case.dtype)
    with mx.stream(mx.cpu):  # a GPU's own products may round float32 to 10 bits
        return backend.relative_error(y, replicated_matvec.reference(
            prepare_input.rotated(x, scales), codes, replica_out, scales, levels, mx.float32))


def _expand(case: Case) -> float:
    _, codes, replica_out, scales = case.draw()
    levels = case.bits.levels
    found = expand_codes.expand(codes, replica_out, scales, levels, case.dtype)
    with mx.stream(mx.cpu):
        return backend.relative_error(found, replicated_matvec.reference(
            mx.eye(case.inputs), codes, replica_out, scales, levels, mx.float32).T)


_CHECKS: dict[str, tuple[Callable[[Case], float], tuple]] = {
    AsIs.kernel: (_prepare, (mx.float32, mx.float16, mx.bfloat16)),
    Norm.kernel: (_prepare_normed, (mx.float32, mx.float16, mx.bfloat16)),
    Gate.kernel: (_prepare_gated, (mx.float32, mx.float16, mx.bfloat16)),
    "replicated_matvec": (_matvec, (mx.float32, mx.float16, mx.bfloat16)),
    "replicated_tensor_cores": (_tensor_cores, (mx.float16, mx.bfloat16)),
    "expand_codes": (_expand, (mx.float32, mx.float16, mx.bfloat16)),
}


def comparisons() -> list[tuple[str, str, float, Callable[[], float]]]:
    """(kernel, case, allowed error, how to find the error) of all that this machine can compare; none without a GPU."""
    if not backend.has_gpu():
        return []
    made = [("column_sweep", "70×64, 4 levels", column_sweep.TIES, column_sweep.disagreement),
            ("read_ceiling", "192 kB", 0.0, read_ceiling.disagreement)]
    for kernel, (error_of, dtypes) in _CHECKS.items():
        if kernel != "replicated_tensor_cores" or backend.is_cuda():
            made += [(kernel, str(case), _ALLOWED[case.dtype], partial(error_of, case)) for case in _cases(dtypes)]
    return made


def outcomes() -> Iterator[Outcome]:
    """What ``comparisons`` give, one by one."""
    for kernel, case, allowed, find_error in comparisons():
        try:
            yield Outcome(kernel, case, find_error(), allowed)
        except Exception as failure:  # a compiler's complaints have no common type
            yield Outcome(kernel, case, None, allowed, str(failure).strip().split("\n")[0])


def trusted(kernel: str) -> bool:
    """Whether ``kernel`` may be used here: on a GPU on which it agreed with its reference, tried once per chip
    and MLX version on two of the cases above."""
    return backend.has_gpu() and backend.trusted(kernel, partial(_worst, kernel), 1.0)


def _worst(kernel: str) -> float:
    """The largest error, in units of what is allowed."""
    error_of, dtypes = _CHECKS[kernel]
    cases = [case for case in _cases(dtypes[:2]) if case.bits is Width.TWO and case.replicas in (4, 8)]
    return max(error_of(case) / _ALLOWED[case.dtype] for case in cases)
