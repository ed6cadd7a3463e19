"""One kernel body for Metal and CUDA, built on first use and used only where it agrees with its
reference.

Bodies are written with Metal's own attribute names, which MLX looks for, and a few names that the
preludes below give both languages: ``DEVICE`` and ``THREAD`` (address spaces), ``FUNCTION``,
``UNROLL`` and ``floats_of_halves``. Buffers are padded to at least 8 elements: Metal puts smaller
ones into another address space.
"""

import functools
import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxquant.base.errors import first_line
from mlxquant.base.storage import cache_dir, cached
from mlxquant.machine import chips

_METAL = """
#define DEVICE device
#define THREAD thread
#define FUNCTION inline
#define UNROLL _Pragma("clang loop unroll(full)")
inline float2 floats_of_halves(uint word) { return float2(as_type<half2>(word)); }
"""
_CUDA = """
using uint = unsigned int;
#define DEVICE
#define THREAD
#define FUNCTION inline __device__
#define UNROLL _Pragma("unroll")
#define thread_index_in_simdgroup (threadIdx.x & 31u)
#define simdgroup_index_in_threadgroup (threadIdx.x >> 5)
#define threadgroup_position_in_grid blockIdx
#define thread_position_in_grid \\
    (uint3{blockIdx.x * blockDim.x + threadIdx.x, blockIdx.y * blockDim.y + threadIdx.y, \\
           blockIdx.z * blockDim.z + threadIdx.z})
template <class To> inline __device__ To as_type(uint x) { return __uint_as_float(x); }
inline __device__ float2 floats_of_halves(uint word) {
    return __half22float2(reinterpret_cast<const __half2&>(word));
}
template <class T> inline __device__ T simd_shuffle_xor(T x, int mask) {
    return __shfl_xor_sync(~0u, x, mask);
}
template <class T> inline __device__ T simd_broadcast(T x, int lane) {
    return __shfl_sync(~0u, x, lane);
}
inline __device__ float simd_sum(float x) {
    for (int mask = 16; mask; mask >>= 1) x += __shfl_xor_sync(~0u, x, mask);
    return x;
}
"""
SMALLEST = 8  # elements of a buffer
_answers: dict[str, bool] = {}


def has_gpu() -> bool:
    """Whether kernels can run: MLX computes on a GPU."""
    return mx.default_device() == mx.gpu


def is_cuda() -> bool:
    return has_gpu() and not mx.metal.is_available()


class Kernel:
    """MLX's kernel for ``body``, built at its first call; ``header`` holds functions that the body
    calls. In it ``EXPERT(i)`` is ``experts[i]``, the index of a mixture's expert, or 0 in a call
    without ``experts``. MLX tells kernels apart by name and template alone, so a call's template
    holds the types of all inputs whose types may differ."""

    def __init__(self, name: str, inputs: list[str], outputs: list[str], body: str,
                 header: str = ""):
        self.name, self.inputs, self.outputs = name, inputs, outputs
        self.body, self.header = body, header
        self.built: dict[bool, Callable[..., list[mx.array]]] = {}  # by whether for a mixture

    def __call__(self, inputs: list[mx.array], experts: mx.array | None = None,
                 **launch: Any) -> list[mx.array]:
        """The outputs; ``launch`` is as for MLX's kernels."""
        mixture = experts is not None
        given = [*inputs, experts] if mixture else inputs
        if mixture not in self.built:
            self.built[mixture] = self._build(mixture)
        given = [x if x.size >= SMALLEST else mx.pad(x.reshape(-1), (0, SMALLEST - x.size))
                 for x in given]
        return self.built[mixture](inputs=given, **launch)

    def _build(self, mixture: bool) -> Callable[..., list[mx.array]]:
        name = f"mlxquant_{self.name}" + "_experts" * mixture
        inputs = self.inputs + ["experts"] * mixture
        header = f"#define EXPERT(i) {'int(experts[i])' if mixture else '0'}\n{self.header}"
        if mx.metal.is_available():
            return mx.fast.metal_kernel(name, inputs, self.outputs, self.body, _METAL + header,
                                        compile_options={"math_mode": "fast"})
        return mx.fast.cuda_kernel(name, inputs, self.outputs, self.body, _CUDA + header)


def trusted(name: str, check: Callable[[], float], allowed: float) -> bool:
    """Whether a kernel's error on a small random case, ``check()``, is at most ``allowed``.

    The check runs once per chip, MLX version and source. Its result is cached on disk and, since
    every call of a layer asks, in this process. A kernel that is wrong or does not compile causes
    one warning, and its reference is used. A check that fails, for which memory may have been
    short, is tried again by the next process.
    """
    if name not in _answers:
        file = cache_dir("kernels", f"{chips.slug()}-{_sources()}", f"{name}.json")
        try:
            _answers[name] = cached(file, lambda: _agrees(name, check(), allowed))
        except Exception as failure:  # a compiler's complaints have no common type
            _answers[name] = _unused(name, first_line(failure))
    return _answers[name]


def _agrees(name: str, error: float, allowed: float) -> bool:
    return error <= allowed or _unused(name, f"its error is {error:.2g}, allowed is {allowed:g}")


def _unused(name: str, complaint: str) -> bool:
    print(f"The kernel {name} is not used on this machine: {complaint}", file=sys.stderr)
    return False


@functools.cache
def _sources() -> str:
    """A digest of the files here: a changed kernel is another kernel."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:8]


def relative_error(found: mx.array, expected: mx.array) -> float:
    """‖found − expected‖ / ‖expected‖ in float32; infinite where something is not a number."""
    difference = (found - expected).astype(mx.float32).square().sum().sqrt()
    error = float((difference / expected.astype(mx.float32).square().sum().sqrt()).item())
    return error if error == error else float("inf")
