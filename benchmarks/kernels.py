"""Kernels of replicated layers on this machine's GPU, beside MLX's own and a read ceiling.

    python benchmarks/kernels.py [--out NAME] [--quick] [--kernels NAME …] [--tokens N …]
        [--list]

Every row names the kernel that ran. ``replicated_matvec`` is the body that Metal compiles; on an
NVIDIA GPU the same text runs through CUDA on ordinary cores. ``replicated_tensor_cores`` exists on
NVIDIA only. Without ``--kernels`` every row is timed with each of the two that this machine has.
``--tokens`` takes the rows of so many tokens alone. ``--list`` prints the rows and times nothing,
which needs no GPU.

Weights are cold: matrices that together are several times the cache take turns. Times are the GPU's
own (``mlxquant/kernels/gpu_clock.py``): launching from Python does not count. "chain": every step
reads what the last one wrote, as decoding does (for our layers that includes preparing the input).
"free": no step waits for another, so that ends of kernels overlap: the kernel alone.
"""

import statistics
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

from record import parser, save  # first: it loads the BLAS before MLX

# isort: split
import mlx.core as mx
import numpy as np

from mlxquant.codes import hadamard
from mlxquant.codes.width import Width
from mlxquant.kernels import (
    backend,
    code_order,
    expand_codes,
    gpu_clock,
    prepare_input,
    replicated_matvec,
    replicated_tensor_cores,
)
from mlxquant.kernels.cases import Case
from mlxquant.kernels.matrix import Matrix
from mlxquant.runtime.probe import measured

COLD = 600e6  # bytes of distinct weights
REPEATS = 7
HALF = mx.float16
MAIN, LARGE = (14336, 4096), (28672, 8192)
SHAPES = ((4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336))
KERNELS = {"replicated_matvec": replicated_matvec,
           "replicated_tensor_cores": replicated_tensor_cores}
Step = Callable[[int, mx.array], mx.array]


def layer(bits: int | str, replicas: int, group: int = 0, shape: tuple[int, int] = MAIN,
          tokens: int = 1) -> Case:
    """A row of ours: K replicas, plain or over groups of inputs, rotated in blocks of 64."""
    return Case(Width.of(bits), replicas, group, 64, *shape, tokens, HALF)


OURS = [layer(2, k) for k in (1, 2, 4, 8, 16)] + [layer(2, k, 16) for k in (4, 8)] + [
    layer(4, 1), layer(4, 4), layer(4, 4, 16), *(layer(bits, 1, shape=LARGE) for bits in (2, 4))]
OURS_TOO = [layer(bits, k) for bits in (1, "ternary", 3) for k in (1, 4)] + [
    layer(3, 2), layer(1, 4, 16), *(layer(2, 4, tokens=tokens) for tokens in (2, 4, 8)),
    *(layer(2, 4, 16, tokens=tokens) for tokens in (4, 8)), *(layer(2, 4, shape=s) for s in SHAPES)]
# Bits, rows, inputs and tokens of MLX's rows.
STOCK = [(2, *MAIN, 1), (2, *MAIN, 4), (4, *MAIN, 1)]
STOCK_TOO = [(3, *MAIN, 1), (2, *MAIN, 8), (2, *LARGE, 1), (4, *LARGE, 1), (2, 4096, 4096, 1),
             (2, 4096, 14336, 1)]
CHECKED = [layer(bits, k, g, (2048, 4096)) for bits, k, g in ((2, 4, 0), (2, 8, 16), (4, 1, 0))]
CHECKED_DTYPES = {"replicated_matvec": (mx.float32, HALF),
                  "replicated_tensor_cores": (HALF, mx.bfloat16)}


def seconds_per_step(run: gpu_clock.Steps, steps: int) -> float:
    return statistics.median(gpu_clock.seconds_per_step(run, steps, REPEATS))


def chain(step: Step, x: mx.array) -> gpu_clock.Steps:
    """Each step's input is the output of the last, cut to its width."""
    def run(count: int, zero: mx.array) -> list[mx.array]:
        value = x + zero
        for i in range(count):
            value = step(i, value)[:, :x.shape[1]]
        return [value]
    return run


def free(step: Step, x: mx.array) -> gpu_clock.Steps:
    """Every step has the same input."""
    def run(count: int, zero: mx.array) -> list[mx.array]:
        value = x + zero
        return [step(i, value) for i in range(count)]
    return run


class Replicated:
    """Distinct random matrices of one shape, their scales, and an input."""

    def __init__(self, case: Case, cold: float = COLD):
        self.case = case
        self.x, small = replace(case, rows=8).draw()
        width = case.bits.code_bits
        words = case.inputs * width // 32
        self.count = max(8, round(cold / (case.rows * words * 4)))
        codes = [mx.random.randint(0, 2**31 - 1, (case.rows, words // width, width))
                 .astype(mx.uint32) for _ in range(self.count)]
        out = mx.random.normal((case.rows, case.replicas)).astype(case.dtype) / case.inputs
        mx.eval(codes, out)
        self.scales = small.scales
        self.matrices = [Matrix(words, out, self.scales) for words in codes]

    def kernels(self, names: list[str]) -> list[ModuleType]:
        """Those of ``names`` that serve this case on this machine."""
        case, tensor_cores = self.case, replicated_tensor_cores
        return [KERNELS[name] for name in names if KERNELS[name] is not tensor_cores
                or tensor_cores.fits(self.matrices[0], case.tokens, case.dtype)]

    def times(self, kernel: ModuleType) -> dict[str, Any]:
        """Microseconds of one kernel, alone and in a chain with the preparation of its input."""
        case = self.case
        layout = kernel.layout(case.shape, case.dtype, case.tokens)
        prepared = prepare_input.prepare(self.x, self.scales, layout)
        mx.eval(prepared)

        def product(i: int, prepared: mx.array) -> mx.array:
            return kernel.multiply(prepared, self.matrices[i % self.count], case.tokens,
                                   case.dtype)

        def whole(i: int, x: mx.array) -> mx.array:
            return product(i, prepare_input.prepare(x, self.scales, layout))

        steps = 2 * self.count
        row = dict(kernel=kernel.__name__.split(".")[-1], bytes=self.bytes(),
                   free_us=1e6 * seconds_per_step(free(product, prepared), steps))
        if case.rows >= case.inputs:
            row["chain_us"] = 1e6 * seconds_per_step(chain(whole, self.x), steps)
        return row

    def times_expanded(self) -> dict[str, Any]:
        """The way of a prompt: the codes expanded to a matrix, then one product."""
        def whole(i: int, x: mx.array) -> mx.array:
            weight = expand_codes.expand(self.matrices[i % self.count], self.case.dtype)
            return self.scales.rotated(x).astype(x.dtype) @ weight.T

        return dict(kernel="expand_codes, product", bytes=self.bytes(),
                    free_us=1e6 * seconds_per_step(free(whole, self.x), self.count))

    def bytes(self) -> int:
        """The fewest that a call can move: codes, scales, x and y, each once."""
        case, matrix, scales = self.case, self.matrices[0], self.scales
        read = [matrix.codes, matrix.replica_out, scales.replica_in,
                *[scales.column_scale] * bool(case.group), *[scales.signs] * bool(case.rotation)]
        return (sum(array.nbytes for array in read)
                + case.tokens * (case.inputs + case.rows) * case.dtype.size)


def stock(bits: int, rows: int, inputs: int, tokens: int, cold: float = COLD) -> dict[str, Any]:
    """MLX's ``quantized_matmul`` in groups of 64, the same way."""
    count = max(8, round(cold / (rows * inputs * bits / 8)))
    words = [mx.random.randint(0, 2**31 - 1, (rows, inputs * bits // 32)).astype(mx.uint32)
             for _ in range(count)]
    scales = mx.random.normal((rows, inputs // 64)).astype(HALF) / inputs
    x = mx.random.normal((tokens, inputs)).astype(HALF)
    mx.eval(words, scales, x)

    def step(i: int, x: mx.array) -> mx.array:
        return mx.quantized_matmul(x, words[i % count], scales, scales, True, 64, bits)

    row = dict(kernel="mx.quantized_matmul", bytes=words[0].nbytes + 2 * scales.nbytes,
               free_us=1e6 * seconds_per_step(free(step, x), 2 * count))
    if rows >= inputs:
        row["chain_us"] = 1e6 * seconds_per_step(chain(step, x), 2 * count)
    return row


def error(case: Case, kernel: ModuleType) -> float:
    """Relative error of a whole layer, one token, against a product in float64."""
    x, drawn = case.draw(1)
    scales, inputs = drawn.scales, case.inputs
    prepared = prepare_input.prepare(x, scales, kernel.layout(case.shape, case.dtype))
    found = kernel.multiply(prepared, drawn, 1, case.dtype)
    codes = np.array(code_order.unpack(drawn.codes, inputs), np.float64)
    matrix = case.bits.lowest + case.bits.distance * codes
    a = np.array(scales.envelope(), np.float64)
    h = np.ones((1, 1))
    for _ in range(6):
        h = np.block([[h, h], [h, -h]])
    signs = np.array(hadamard.unpack_signs(scales.signs, inputs), np.float64)
    x64 = np.array(x.astype(mx.float32), np.float64)
    z = ((x64 * signs).reshape(-1, 64) @ h / 8).reshape(-1)
    b = np.array(drawn.replica_out.astype(mx.float32), np.float64)
    expected = sum(matrix @ (a[:, k] * z) * b[:, k] for k in range(case.replicas))
    difference = np.array(found.astype(mx.float32), np.float64)[0] - expected
    return float(np.linalg.norm(difference) / np.linalg.norm(expected))


class Results:
    """Rows and errors, each printed and saved as soon as it is there."""

    def __init__(self, name: str):
        self.name, self.ceiling = name, measured(refresh=True).ceiling
        self.rows: list[dict[str, Any]] = []
        self.errors: list[dict[str, Any]] = []
        print(f"read ceiling {self.ceiling.gb_per_s:.0f} GB/s ({self.ceiling.kernel})", flush=True)

    def add(self, shape: dict[str, Any], times: dict[str, Any]) -> None:
        row = shape | times
        row["gb_per_s"] = row["bytes"] / row["free_us"] / 1e3
        row["percent_of_ceiling"] = 100 * row["gb_per_s"] / self.ceiling.gb_per_s
        self.rows.append(row)
        print(f"{row['kernel']:24} {row['bits']!s:>7} bit K{row['replicas']} G{row['group']} "
              f"{row['rows']}×{row['inputs']} {row['tokens']} tokens: "
              f"free {row['free_us']:.1f} µs, {row['gb_per_s']:.0f} GB/s, "
              f"{row['percent_of_ceiling']:.0f} %; "
              f"chain {row.get('chain_us', float('nan')):.1f} µs", flush=True)
        self.save()

    def add_error(self, case: Case, dtype: mx.Dtype, name: str) -> None:
        self.errors.append(dict(
            bits=case.bits.value, replicas=case.replicas, group=case.group,
            dtype=str(dtype).split(".")[-1], kernel=name,
            error=error(replace(case, dtype=dtype), KERNELS[name])))
        print(self.errors[-1], flush=True)
        self.save()

    def save(self) -> None:
        save(self.name, ceiling=self.ceiling.__dict__, rows=self.rows, errors=self.errors)


def measure(results: Results, names: list[str], ours: list[Case],
            theirs: list[tuple[int, int, int, int]], checked: list[Case],
            cold: float = COLD) -> None:
    for bits, rows, inputs, tokens in theirs:
        results.add(dict(bits=bits, replicas=None, group=64, rows=rows, inputs=inputs,
                         tokens=tokens), stock(bits, rows, inputs, tokens, cold))
    for case in ours:
        weights = Replicated(case, cold)
        shape = {field: getattr(case, field)
                 for field in ("replicas", "group", "rows", "inputs", "tokens")}
        shape["bits"] = case.bits.value
        for kernel in weights.kernels(names):
            results.add(shape, weights.times(kernel))
        if case.tokens == 8:
            results.add(shape, weights.times_expanded())
        del weights
        mx.clear_cache()
    for case in checked:
        for name in names:
            for dtype in CHECKED_DTYPES[name]:
                results.add_error(case, dtype, name)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--out", default="kernels")
    options.add_argument("--quick", action="store_true")
    options.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    options.add_argument("--tokens", nargs="+", type=int)
    options.add_argument("--list", action="store_true")
    a = options.parse_args()
    ours, theirs = (OURS, STOCK) if a.quick else (OURS + OURS_TOO, STOCK + STOCK_TOO)
    if a.tokens:
        ours = [case for case in ours if case.tokens in a.tokens]
        theirs = [row for row in theirs if row[-1] in a.tokens]
    names = [name for name in a.kernels if backend.is_cuda() or name != "replicated_tensor_cores"]
    if a.list:
        print(*(f"mx.quantized_matmul: {bits} bit G64 {rows}×{inputs}, {tokens} tokens"
                for bits, rows, inputs, tokens in theirs), sep="\n")
        print(*(f"{', '.join(a.kernels)}: {case}" for case in ours), sep="\n")
    elif not backend.has_gpu() or not names:
        options.exit(1, "kernels need a GPU; --list shows what would be timed\n")
    else:
        measure(Results(a.out), names, ours, theirs, [] if a.tokens else CHECKED)


if __name__ == "__main__":
    main()
