"""Where a token's time goes: Python, MLX's launching, and the GPU itself.

    python benchmarks/decode.py MODEL … [--out NAME]

A MODEL is a name, or SHAPE:FORM as ``bench.py`` takes it; mlx-lm:MODEL is the same as mlx-lm runs
it, and unfused:MODEL with its layers packed but its blocks as mlx-lm calls them. For each, one
token after the other: how many kernels it launches (``dispatches.py``), in all and a block, what
Python takes to build its graph, what MLX takes to launch it, and both together with the wait, which
is what a user sees. Then the GPU's own time for a token, by its clock (``kernels/gpu_clock.py``):
some tokens are queued behind a wait, so that launching does not count. For that, MLX must be
allowed to put whole tokens into one graph: MLX_MAX_OPS_PER_BUFFER and MLX_MAX_MB_PER_BUFFER are
raised for the GPU's time; ``--limits default`` leaves them, for what a user sees.

Every row names the kernel of its matrices. ``--metal-body`` runs replicas with the body that Metal
compiles (``replicated_matvec``) where an NVIDIA GPU would take its tensor cores.
"""

import os
import statistics
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

_TOKENS, _LOOPS, _QUEUED, _WAIT = 48, 5, 3, 0.25
_STOCK, _UNFUSED = "mlx-lm:", "unfused:"
if "--limits" not in sys.argv:  # read once, when MLX is imported
    os.environ |= {"MLX_MAX_OPS_PER_BUFFER": "1000000", "MLX_MAX_MB_PER_BUFFER": "1000000"}

# isort: split
from record import parser, save  # first: it loads the BLAS before MLX

# isort: split
import mlx.core as mx
import mlx.nn as nn
from bench import open_model
from dispatches import launches
from mlx_lm.models.cache import make_prompt_cache

from mlxquant.kernels import backend, gpu_clock, replicated_tensor_cores
from mlxquant.layers import pack, traffic
from mlxquant.layers.packed import PackedCodes
from mlxquant.layers.packed_experts import PackedExperts
from mlxquant.runtime.probe import measured, percent_of_ceiling


class Decoding:
    """One sequence of a model, a token at a time, after a prompt of 16."""

    def __init__(self, name: str):
        fusing: AbstractContextManager[Any] = (
            mock.patch.object(pack, "read_plain", lambda *_: []) if name.startswith(_UNFUSED)
            else nullcontext())
        with fusing:
            model = open_model(name.removeprefix(_STOCK).removeprefix(_UNFUSED),
                               name.startswith(_STOCK))
        self.network, self.cache = model.network, make_prompt_cache(model.network)
        self.bytes = traffic.weight_bytes(model.network)
        self.token = mx.array([1])
        mx.eval(self.network(mx.array([[1] * 16]), cache=self.cache))
        mx.eval(self.next(self.token))  # the first token makes room in the caches, for 256

    def next(self, token: mx.array) -> mx.array:
        return mx.argmax(self.network(token[None], cache=self.cache)[:, -1], -1)

    def dispatches(self) -> dict[str, int]:
        """Kernels that a token launches, in all and in each block."""
        total = launches(self.next(self.token)).total()
        return dict(dispatches=total, dispatches_a_block=total // len(self.cache))

    def seen(self) -> dict[str, float]:
        """Median milliseconds of a token as a user sees it, and of its parts on the host."""
        loops = []
        for _ in range(_LOOPS + 1):
            build = launch = 0.0
            start = time.perf_counter()
            for _ in range(_TOKENS):
                begun = time.perf_counter()
                self.token = self.next(self.token)
                built = time.perf_counter()
                mx.async_eval(self.token)
                build, launch = build + built - begun, launch + time.perf_counter() - built
            mx.eval(self.token)
            loops.append((time.perf_counter() - start, build, launch))
        token, build, launch = (1e3 * statistics.median(times) / _TOKENS
                                for times in zip(*loops[1:]))
        return dict(token_ms=token, build_ms=build, launch_ms=launch, tps=1e3 / token)

    def on_gpu(self) -> dict[str, float]:
        """Milliseconds that the GPU itself takes for a token, and the bandwidth that is."""
        def run(count: int, zero: mx.array) -> list[mx.array]:
            token = self.token + zero.astype(mx.int32)
            for _ in range(count):
                token = self.next(token)
            return [token]

        times = gpu_clock.seconds_per_step(run, _QUEUED, 7, _WAIT)
        seconds = statistics.median(times)
        return dict(gpu_ms=1e3 * seconds, gpu_ms_spread=1e3 * (max(times) - min(times)),
                    gpu_gb_per_s=self.bytes / seconds / 1e9)


def kernel_of(network: nn.Module, metal_body: bool) -> str:
    """What multiplies the matrices of a network here, a token at a time."""
    modules, names = list(network.modules()), []
    ordinary = metal_body or not backend.is_cuda()
    for module in modules:
        if isinstance(module, PackedCodes):
            names.append("replicated_matvec" if ordinary or isinstance(module, PackedExperts)
                         else "replicated_tensor_cores")
    if any(hasattr(module, "bits") for module in modules):
        names.append("mx.quantized_matmul")
    return " and ".join(sorted(set(names))) or "MLX's dense product"


def main() -> None:
    options = parser(__doc__)
    options.add_argument("models", nargs="+")
    options.add_argument("--limits", choices=["default"])
    options.add_argument("--metal-body", action="store_true")
    options.add_argument("--out", default="cpu")
    arguments = options.parse_args()
    if arguments.metal_body:
        replicated_tensor_cores.fits = lambda *_: False
    ceiling, rows = measured().ceiling, []
    for name in arguments.models:
        decoding = Decoding(name)
        row = dict(model=name, kernel=kernel_of(decoding.network, arguments.metal_body),
                   bytes_per_token=decoding.bytes, **decoding.dispatches(), **decoding.seen())
        if not arguments.limits:
            try:
                row |= decoding.on_gpu()
                row["percent_of_ceiling"], ceiling = percent_of_ceiling(row["gpu_gb_per_s"])
            except RuntimeError as error:  # what a user sees is a result all the same
                print(f"{name}: {error}", flush=True)
        rows.append(row)
        print("  ".join(f"{value}" if isinstance(value, str) else f"{key} {value:.4g}"
                        for key, value in row.items()), flush=True)
        save(f"decode-{arguments.out}", graph_limits=arguments.limits or "raised",
             ceiling=ceiling.__dict__, rows=rows)
        del decoding
        mx.clear_cache()


if __name__ == "__main__":
    main()
