"""How long steps take on the GPU itself, without what queueing them costs the host.

On CUDA a kernel first waits while the host queues everything and then reads the GPU's own clock;
another kernel reads it after the last step. Metal lets no kernel read a clock: there the time of
N steps is that of 2N steps less that of N, both queued behind matrix products that keep the GPU
busy. CUDA does not use this difference: the power that the products draw changes the GPU's
frequency, and so the difference, by more than a step takes.
"""

import functools
import statistics
import time
from collections.abc import Callable

import mlx.core as mx

from mlxquant.kernels import backend

Steps = Callable[[int, mx.array], list[mx.array]]
_WAIT = 0.03  # seconds; queueing some hundred kernels takes a tenth of it
_BODY = """
    if (thread_position_in_grid.x != 0) return;
    unsigned long long begin, now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(begin) :: "memory");
    do asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now) :: "memory");
    while (now - begin < WAIT);
    clock[0] = static_cast<uint>(now);
    clock[1] = static_cast<uint>(now >> 32);
    zero[0] = 0;
"""
_PRODUCTS, _PRODUCT_SIZE = 32, 8192  # some 50 ms on an H100


def seconds_per_step(run: Steps, steps: int, repeats: int = 7, wait: float = _WAIT) -> list[float]:
    """Seconds of one step in each of ``repeats`` passes, after one that does not count.

    ``run(n, zero)`` builds n steps that start from ``zero`` (1,), a float16 0, and returns what
    they end in. The host has ``wait`` seconds to queue them; raises ``RuntimeError`` where it
    takes longer.
    """
    measure = functools.partial(_by_gpu_clock, wait=wait) if backend.is_cuda() else _by_difference
    measure(run, steps)
    passes = [measure(run, steps) for _ in range(repeats)]
    queued = statistics.median(queued for _, queued in passes)
    if queued > wait:
        raise RuntimeError(f"queueing took {queued:.3f} s, more than the {wait:g} s "
                           "that the GPU waits")
    return [seconds for seconds, _ in passes]


def _by_gpu_clock(run: Steps, steps: int, wait: float) -> tuple[float, float]:
    """Seconds of a step, and those that the host took to queue all."""
    before, zero = _stamp([mx.zeros(1)], round(1e9 * wait))
    after, _ = _stamp(run(steps, zero), 0)
    begun = time.perf_counter()
    mx.async_eval(before, after)
    queued = time.perf_counter() - begun
    mx.eval(before, after)
    start, end = (words[0].item() + (words[1].item() << 32) for words in (before, after))
    return 1e-9 * (end - start) / steps, queued


def _by_difference(run: Steps, steps: int) -> tuple[float, float]:
    def seconds(count: int) -> float:
        held = _square()
        for _ in range(_PRODUCTS if backend.has_gpu() else 0):
            held = held @ _square()
        outputs = run(count, (held[0, :1] * 0).astype(mx.float16))
        mx.synchronize()
        start = time.perf_counter()
        mx.eval(outputs)
        mx.synchronize()
        return time.perf_counter() - start

    return max(seconds(2 * steps) - seconds(steps), 1e-9) / steps, 0.0


def _stamp(after: list[mx.array], wait: int) -> tuple[mx.array, mx.array]:
    """The GPU clock's two words, read ``wait`` nanoseconds after ``after`` is computed, and a zero
    (1,) in float16 that depends on the reading."""
    clock, zero = _kernel(len(after))(
        inputs=after, template=[("WAIT", wait)], grid=(1, 1, 1), threadgroup=(1, 1, 1),
        output_shapes=[(2,), (1,)], output_dtypes=[mx.uint32, mx.float16])
    return clock, zero


@functools.cache
def _kernel(inputs: int) -> backend.Kernel:
    names = [f"input{i}" for i in range(inputs)]
    return backend.Kernel(f"gpu_clock_{inputs}", names, ["clock", "zero"], _BODY)


@functools.cache
def _square() -> mx.array:
    size = _PRODUCT_SIZE if backend.has_gpu() else 1
    made = mx.random.normal((size, size)).astype(mx.bfloat16) / size  # products stay small
    mx.eval(made)
    return made
