"""Kernels of replicated layers on this machine's GPU, beside MLX's own and a read ceiling.

    python benchmarks/kernels.py [--out NAME] [--quick]

Weights are cold: matrices that together are several times the cache take turns. Times are the GPU's own
(``mlxquant/kernels/gpu_clock.py``): launching from Python does not count. "chain": every step reads what the last one wrote, as
decoding does (for our layers that includes preparing the input). "free": no step waits for another, so that ends of
kernels overlap: the kernel alone.
"""

import argparse
import statistics
from collections.abc import Callable

import mlx.core as mx
import numpy as np
from record import save

from mlxquant.codes import hadamard
from mlxquant.codes.packing import level_count
from mlxquant.kernels import (
    backend,
    code_order,
    expand_codes,
    gpu_clock,
    prepare_input,
    replicated_matvec,
    replicated_tensor_cores,
)
from mlxquant.kernels.check import Case
from mlxquant.runtime.probe import read_ceiling

COLD = 600e6  # bytes of distinct weights
REPEATS = 7
HALF = mx.float16
MAIN = (14336, 4096)


def seconds_per_step(run: gpu_clock.Steps, steps: int) -> float:
    return statistics.median(gpu_clock.seconds_per_step(run, steps, REPEATS))


def chain(step: Callable[[int, mx.array], mx.array], x: mx.array):
    """Each step's input is the output of the last, cut to its width."""
    def run(count: int, zero: mx.array) -> list[mx.array]:
        value = x + zero
        for i in range(count):
            value = step(i, value)[:, :x.shape[1]]
        return [value]
    return run


def free(step: Callable[[int, mx.array], mx.array], x: mx.array):
    """Every step has the same input."""
    def run(count: int, zero: mx.array) -> list[mx.array]:
        value = x + zero
        return [step(i, value) for i in range(count)]
    return run


class Replicated:
    """Distinct random matrices of one shape, their scales, and an input."""

    def __init__(self, bits, replicas: int, group: int, rows: int, inputs: int, tokens: int = 1, dtype=HALF,
                 cold: float = COLD):
        case = Case(bits, replicas, group, 64, 8, inputs, tokens, dtype)
        self.x, _, _, self.scales = case.draw()
        self.levels, self.width, self.tokens, self.dtype = level_count(bits), code_order.kernel_bits(bits), tokens, dtype
        words = inputs * self.width // 32
        self.count = max(8, round(cold / (rows * words * 4)))
        self.codes = [mx.random.randint(0, 2**31 - 1, (rows, words // self.width, self.width)).astype(mx.uint32)
                      for _ in range(self.count)]
        self.replica_out = mx.random.normal((rows, replicas)).astype(dtype) / inputs
        mx.eval(self.codes, self.replica_out)
        tensor_cores = replicated_tensor_cores.fits(self.scales, tokens, dtype)
        self.kernel = replicated_tensor_cores if tensor_cores else replicated_matvec
        self.layout = (replicated_tensor_cores.layout(self.width, dtype) if tensor_cores
                       else replicated_matvec.layout(group))

    def layer(self, i: int, x: mx.array) -> mx.array:
        return self.product(i, prepare_input.prepare(x, self.scales, self.layout))

    def product(self, i: int, prepared: mx.array) -> mx.array:
        return self.kernel.multiply(prepared, self.codes[i % self.count], self.replica_out, self.scales, self.levels,
                                    self.tokens, self.dtype)

    def expanded(self, i: int, x: mx.array) -> mx.array:
        weight = expand_codes.expand(self.codes[i % self.count], self.replica_out, self.scales, self.levels, self.dtype)
        return prepare_input.rotated(x, self.scales).astype(x.dtype) @ weight.T

    def bytes(self) -> int:
        return replicated_matvec.bytes_moved(self.codes[0], self.replica_out, self.scales, self.tokens, self.dtype)

    def times(self) -> dict:
        prepared = prepare_input.prepare(self.x, self.scales, self.layout)
        mx.eval(prepared)
        steps = 2 * self.count
        row = dict(kernel=self.kernel.__name__.split(".")[-1], bytes=self.bytes(),
                   free_us=1e6 * seconds_per_step(free(self.product, prepared), steps))
        if self.codes[0].shape[0] >= self.x.shape[1]:
            row["chain_us"] = 1e6 * seconds_per_step(chain(self.layer, self.x), steps)
        return row


def stock(bits: int, rows: int, inputs: int, tokens: int = 1, dtype=HALF) -> dict:
    """MLX's ``quantized_matmul`` in groups of 64, the same way."""
    count = max(8, round(COLD / (rows * inputs * bits / 8)))
    words = [mx.random.randint(0, 2**31 - 1, (rows, inputs * bits // 32)).astype(mx.uint32) for _ in range(count)]
    scales = mx.random.normal((rows, inputs // 64)).astype(dtype) / inputs
    x = mx.random.normal((tokens, inputs)).astype(dtype)
    mx.eval(words, scales, x)

    def step(i: int, x: mx.array) -> mx.array:
        return mx.quantized_matmul(x, words[i % count], scales, scales, True, 64, bits)

    row = dict(kernel="mx.quantized_matmul", bytes=words[0].nbytes + 2 * scales.nbytes,
               free_us=1e6 * seconds_per_step(free(step, x), 2 * count))
    if rows >= inputs:
        row["chain_us"] = 1e6 * seconds_per_step(chain(step, x), 2 * count)
    return row


def error(bits, replicas: int, group: int, dtype: mx.Dtype, kernel) -> float:
    """Relative error of a whole layer at 2048 × 4096 against a product in float64."""
    case = Case(bits, replicas, group, 64, 2048, 4096, 1, dtype)
    x, codes, replica_out, scales = case.draw(1)
    levels = level_count(bits)
    layout = (replicated_matvec.layout(group) if kernel is replicated_matvec
              else kernel.layout(code_order.kernel_bits(bits), dtype))
    found = kernel.multiply(prepare_input.prepare(x, scales, layout), codes, replica_out, scales, levels, 1, dtype)
    grid = np.arange(levels) * (2 if levels == 2 else 1) - (1 if levels == 2 else (levels - 1) / 2)
    matrix = grid[np.array(code_order.unpack(codes, 4096))]
    a = np.array(prepare_input.envelope(scales), np.float64)
    a = a * np.array(scales.column_scale, np.float64)[:, None] if group else a
    signs = np.array(hadamard.unpack_signs(scales.signs, 4096), np.float64)
    h = np.ones((1, 1))
    for _ in range(6):
        h = np.block([[h, h], [h, -h]])
    z = ((np.array(x.astype(mx.float32), np.float64) * signs).reshape(-1, 64) @ h / 8).reshape(-1)
    b = np.array(replica_out.astype(mx.float32), np.float64)
    expected = sum(matrix @ (a[:, k] * z) * b[:, k] for k in range(replicas))
    return float(np.linalg.norm(np.array(found.astype(mx.float32), np.float64)[0] - expected) / np.linalg.norm(expected))


def plan(quick: bool):
    """(bits, K, G, rows, inputs, tokens) of our rows, (bits, rows, inputs, tokens) of MLX's."""
    ours = [(2, k, g, *MAIN, 1) for k, g in ((1, 0), (2, 0), (4, 0), (8, 0), (16, 0), (8, 16), (4, 16))]
    ours += [(bits, 1, 0, 28672, 8192, 1) for bits in (2, 4)]
    theirs = [(2, *MAIN, 1), (2, *MAIN, 4), (4, *MAIN, 1)]
    if not quick:
        ours += [(bits, k, 0, *MAIN, 1) for bits in (1, "ternary", 3, 4) for k in (1, 4)]
        ours += [(2, 4, 0, *MAIN, tokens) for tokens in (2, 4, 8)]
        ours += [(2, 4, 0, *shape, 1) for shape in ((4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336))]
        theirs += [(3, *MAIN, 1), (2, *MAIN, 8), (2, 28672, 8192, 1), (4, 28672, 8192, 1)]
        theirs += [(2, 4096, 4096, 1), (2, 4096, 14336, 1)]
    return ours, theirs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", default="kernels")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    ceiling = read_ceiling(refresh=True)
    print(f"read ceiling {ceiling.gb_per_s:.0f} GB/s ({ceiling.kernel})", flush=True)
    ours, theirs = plan(arguments.quick)
    rows, errors = [], []

    def record(**row) -> None:
        row["gb_per_s"] = row["bytes"] / row["free_us"] / 1e3
        row["percent_of_ceiling"] = 100 * row["gb_per_s"] / ceiling.gb_per_s
        rows.append(row)
        print(f"{row['kernel']:24} {row['bits']!s:>7} bit K{row['replicas']} G{row['group']} {row['rows']}×{row['inputs']} "
              f"{row['tokens']} tokens: free {row['free_us']:.1f} µs, {row['gb_per_s']:.0f} GB/s, "
              f"{row['percent_of_ceiling']:.0f} %; chain {row.get('chain_us', float('nan')):.1f} µs", flush=True)
        save(arguments.out, ceiling=ceiling.__dict__, rows=rows, errors=errors)

    for bits, height, width, tokens in theirs:
        record(bits=bits, replicas=None, group=64, rows=height, inputs=width, tokens=tokens,
               **stock(bits, height, width, tokens))
    for bits, replicas, group, height, width, tokens in ours:
        layer = Replicated(bits, replicas, group, height, width, tokens)
        record(bits=bits, replicas=replicas, group=group, rows=height, inputs=width, tokens=tokens, **layer.times())
        if tokens == 8:
            seconds = seconds_per_step(free(layer.expanded, layer.x), layer.count)
            record(bits=bits, replicas=replicas, group=group, rows=height, inputs=width, tokens=tokens,
                   kernel="expand_codes, product", bytes=layer.bytes(), free_us=1e6 * seconds)
        del layer
        mx.clear_cache()
    for bits, replicas, group in ((2, 4, 0), (2, 8, 16), (4, 1, 0)):
        for dtype, kernel in ((mx.float32, replicated_matvec), (HALF, replicated_matvec),
                              (HALF, replicated_tensor_cores), (mx.bfloat16, replicated_tensor_cores)):
            if kernel is replicated_tensor_cores and not backend.is_cuda():
                continue
            errors.append(dict(bits=bits, replicas=replicas, group=group, dtype=str(dtype).split(".")[-1],
                               kernel=kernel.__name__.split(".")[-1], error=error(bits, replicas, group, dtype, kernel)))
            print(errors[-1], flush=True)
    save(arguments.out, ceiling=ceiling.__dict__, rows=rows, errors=errors)


if __name__ == "__main__":
    main()
