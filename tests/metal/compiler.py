"""Metal source to a shared object, by the clang inside the Python package ``ziglang``.

Clang reads Metal Shading Language as C++17 after a small rewriting:
- Metal's attributes go: C++ has none in an explicit instantiation. The signature was parsed before.
- ``half2(x)`` becomes ``make_vector<half2>(x)``: in C++ it would reinterpret bits, or not compile.

The first pass gives ``device`` and ``constant`` an address space each, so that a pointer into
the wrong one is an error, and is thrown away; the second is run. Undefined behaviour that clang can
see at run time (an index beyond a local array, a shift too far) becomes a trap. No optimising:
that takes longer than the kernels run, and could leave out a read of what is not used. ``quick``
optimises for networks, whose kernels run hundreds of times, with all traps, but no loop unrolled:
unrolled, the traps of one kernel take seconds to compile.
"""

import hashlib
import os
import platform
import re
import subprocess
import tempfile
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from .source import NotEmulated, Source

_INCLUDE = Path(__file__).parent / "include"
_ATTRIBUTE = re.compile(r"\s*\[\[\w+(\([^()]*\))?\]\]")
_VECTOR = r"(?:float|half|u?int|u?short|u?char)[234]"
_VECTOR_CALL = re.compile(rf"\b({_VECTOR})\s*\(")
_VECTOR_CAST = re.compile(rf"(?<!sizeof)\(\s*{_VECTOR}\s*\)\s*[\w(]")
# zig's own target for the machine would differ from one CPU to the next, and so would roundings.
_CPU = ["-mcpu=x86_64_v3"] if platform.machine() == "x86_64" else []
# Never without -c or -nostdlib++: zig would first build its C++ library, for more than a minute.
_COMPILE = ["-std=c++17", "-O0", "-g0", "-fPIC", "-ffp-contract=off",
            "-fno-exceptions", "-fno-rtti",
            "-Xclang", "-ffloat16-excess-precision=none",
            "-Xclang", "-fbfloat16-excess-precision=none",
            "-I", str(_INCLUDE), "-include", "mlx_preamble.h", *_CPU]
_LIBRARY = ["-shared", "-nostdlib", "-nostdlib++",
            "-fsanitize=undefined", "-fsanitize-trap=undefined"]
_QUICK = ["-O1", "-fno-unroll-loops", "-U_FORTIFY_SOURCE"]  # whose longjmp knows no fibers
_UNROLL = '_Pragma("clang loop unroll(full)")'
_COUNTED = ["-S", "-emit-llvm", "-O2", "-ffast-math", "-ffp-contract=fast", "-fno-vectorize",
            "-fno-slp-vectorize", "-fno-sanitize=all"]
_FIBERS = '#define SIMDGROUPS_MEET\n#include "fibers.h"\n'
_MEETINGS_DECLARED = "namespace metal { float simd_sum(float); }\n"
_PREFIX = {"*": "", "&": "*"}  # a reference is passed what its pointer points at


class Rejected(Exception):
    """The compiler's complaints."""


class Compiler:
    """Compiles each source once into ``folder``, which processes and test runs may share."""

    def __init__(self, folder: Path, quick: bool = False):
        self.folder, self.quick = folder, quick
        self.compiled = 0
        self.built: dict[Source, Path] = {}

    def build(self, source: Source) -> Path:
        """The shared object that exports ``launch`` of ``include/dispatch.h``."""
        if source not in self.built:
            self.built[source] = self._build(source)
        return self.built[source]

    def _build(self, source: Source) -> Path:
        text = f'{_cpp(source)}\n#include "dispatch.h"\n{_launcher(source)}'
        options = _LIBRARY
        if self.quick:
            text, options = text.replace(_UNROLL, ""), [*_LIBRARY, *_QUICK]
        key = hashlib.sha256(f"{_toolchain()}{options}{text}".encode()).hexdigest()
        path = self.folder / f"{key[:16]}.so"
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=self.folder) as place:
                self._run(Path(place), _cpp(source), "address_spaces.o", ["-c", "-DADDRESS_SPACES"])
                self._run(Path(place), text, path.name, options).replace(path)
            self.compiled += 1
        return path

    def llvm(self, source: Source) -> str:
        """LLVM's own code for one thread, optimised, products and sums fused: to be counted."""
        text = _MEETINGS_DECLARED + _cpp(source).removeprefix(_FIBERS)
        key = hashlib.sha256(f"{_toolchain()}{_COUNTED}{text}".encode()).hexdigest()
        path = self.folder / f"{key[:16]}.ll"
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=self.folder) as place:
                self._run(Path(place), text, path.name, _COUNTED).replace(path)
        return path.read_text()

    def _run(self, place: Path, text: str, output: str, options: list[str]) -> Path:
        (place / "kernel.cpp").write_text(text)
        cache = {f"ZIG_{kind}_CACHE_DIR": str(place / "zig") for kind in ("GLOBAL", "LOCAL")}
        done = subprocess.run(
            [_zig(), "c++", *_COMPILE, *options,
             str(place / "kernel.cpp"), "-o", str(place / output)],
            env=os.environ | cache, capture_output=True, text=True, timeout=120)
        if done.returncode:
            raise Rejected(done.stderr)
        return place / output


@cache
def _zig() -> Path:
    """The program that ``python -m ziglang`` starts, after Python itself."""
    return Path(find_spec("ziglang").origin).with_name("zig")


@cache
def _toolchain() -> str:
    """What besides the text decides what is built."""
    headers = [path.read_text() for path in sorted(_INCLUDE.iterdir())]
    return "\n".join([version("ziglang"), *_COMPILE, *_LIBRARY, *headers])


def _cpp(source: Source) -> str:
    """The kernel as C++, behind the simdgroup functions it calls, if any."""
    text = source.text
    if cast := _VECTOR_CAST.search(text):
        raise NotEmulated(f"C++ would reinterpret bits in `{cast[0]}…`: "
                          "write it as a call, `float4(x)`")
    return _FIBERS * bool(source.meetings()) + _VECTOR_CALL.sub(
        r"metal::make_vector<\1>(", _ATTRIBUTE.sub("", text))


def _launcher(source: Source) -> str:
    """The C function that calls the kernel once per thread."""
    arguments, buffers = [], 0
    for parameter in source.parameters:
        if parameter.is_buffer:
            arguments.append(f"{_PREFIX[parameter.mode]}({parameter.type}*)buffers[{buffers}]")
            buffers += 1
        else:
            arguments.append(f"at.{parameter.attribute}")
    return ('extern "C" void launch(void** buffers, const uint* grid, const uint* group,\n'
            "                       bool backwards) {\n"
            f"    dispatch(grid, group, backwards, [=](const Thread& at) {{\n"
            f"        {source.entry}({', '.join(arguments)});\n    }});\n}}\n")
