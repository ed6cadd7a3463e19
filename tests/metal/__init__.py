"""Metal kernels run on Linux: the text MLX generates, compiled as C++ and executed on real data.

No GPU is needed. ``Emulation`` takes the place of ``mx.fast.metal_kernel``, so a kernel's own
launcher runs unchanged and gets arrays back, to be compared with its reference:

    source.py    has MLX itself write the Metal source of one call, and reads its signature
    compiler.py  compiles it with ziglang's clang against ``include/metal_stdlib``, twice: with
                 address spaces (a pointer to the wrong one is an error), and to be run
    guarded.py   runs it in a process of its own, every array between forbidden pages
    kernels.py   ties them together

It proves syntax, address spaces, indexing, tails, and the arithmetic up to float rounding. It
proves nothing about speed or about Apple's compiler. Of what needs threads to meet it has two
functions of a simdgroup (``include/fibers.h``); barriers, threadgroup memory and atomics are
refused (``source.MEETINGS``).
"""

from .compiler import Compiler, Rejected
from .kernels import Emulation, OutOfBounds, Runner, Undefined, Unsettled
from .source import NotEmulated

__all__ = ["Compiler", "Emulation", "NotEmulated", "OutOfBounds", "Rejected", "Runner",
           "Undefined", "Unsettled"]
