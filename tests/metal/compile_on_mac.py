"""Compile every kernel's Metal source with Apple's compiler, running none.

``python tests/metal/compile_on_mac.py`` needs ``xcrun metal``. The source is what MLX would
generate, behind the header that MLX puts before it.
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))

import mlx.core as mx

from metal import source
from mlxquant.kernels import backend, check

_MLX = Path(mx.__file__).parent / "include"
_PREAMBLE = '#include "mlx/backend/metal/kernels/utils.h"\n'


class Recorder:
    """Takes the place of ``mx.fast.metal_kernel``: keeps each call's source, computes nothing."""

    def __init__(self):
        self.sources: dict[str, str] = {}
        self.mlx_metal_kernel = mx.fast.metal_kernel

    def metal_kernel(self, *arguments, **options):
        kernel = self.mlx_metal_kernel(*arguments, **options)

        def call(*, inputs, output_shapes, output_dtypes, **rest):
            made = source.generate(kernel, [mx.array(x) for x in inputs],
                                   output_shapes=output_shapes, output_dtypes=output_dtypes, **rest)
            self.sources[made.entry] = made.text
            return [mx.zeros(shape, dtype) for shape, dtype in zip(output_shapes, output_dtypes)]

        return call


def sources() -> dict[str, str]:
    """The Metal source of every comparison of ``mlxquant check``, by the kernel's name."""
    recorder = Recorder()
    with (patch.object(mx.fast, "metal_kernel", recorder.metal_kernel),
          patch.object(backend, "has_gpu", lambda: True),
          patch.object(backend, "is_cuda", lambda: False),
          patch.object(mx.metal, "is_available", lambda: True)):
        for _ in check.comparisons():
            pass
    return recorder.sources


def main() -> None:
    found, failed = sources(), 0
    with tempfile.TemporaryDirectory() as folder:
        for name, text in found.items():
            path = Path(folder) / "kernel.metal"
            path.write_text(_PREAMBLE + text)
            done = subprocess.run(["xcrun", "-sdk", "macosx", "metal", "-std=metal3.1", "-Werror",
                                   "-I", str(_MLX), "-c", str(path), "-o", f"{path}.air"],
                                  capture_output=True, text=True)
            if done.returncode:
                failed += 1
                print(f"{name}\n{done.stderr}", file=sys.stderr)
    print(f"{len(found) - failed} of {len(found)} kernels compile")
    sys.exit(failed > 0 or not found)


if __name__ == "__main__":
    main()
