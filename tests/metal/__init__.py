"""Metal kernels run on Linux: the text MLX generates, compiled as C++ and executed on real data.

No GPU is needed. ``Emulation`` takes the place of ``mx.fast.metal_kernel``, so a kernel's own launcher
runs unchanged and gets arrays back, to be compared with its reference:

    source.py    has MLX itself write the Metal source of one call, and reads its signature
    compiler.py  compiles it with ziglang's clang against ``include/metal_stdlib``, twice: with address
                 spaces (a pointer to the wrong one is an error), and to be run
    guarded.py   runs it in a child process, every array between forbidden pages
    kernels.py   ties them together

It proves syntax, address spaces, indexing, tails, and the arithmetic up to float rounding. It proves
nothing about speed, about Apple's compiler, or about anything for which threads must meet: barriers,
threadgroup memory, simdgroup functions and atomics are refused (``source.MEETINGS`` and
``include/dispatch.h`` say where they would be added).
"""

from .compiler import Compiler, Rejected
from .kernels import Emulation, OutOfBounds, Runner, Undefined, Unsettled
from .source import NotEmulated

__all__ = ["Compiler", "Emulation", "NotEmulated", "OutOfBounds", "Rejected", "Runner", "Undefined", "Unsettled"]
