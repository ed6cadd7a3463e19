"""The Metal source of one kernel call, as MLX generates it, and what its signature says.

MLX prints that source when a kernel is called with ``verbose``, before it looks for a GPU; where
there is none, only a trace gets that far, and ``mx.export_function`` traces without evaluating.
MLX prints from C++, so file descriptor 1 itself is diverted.
"""

import ctypes
import os
import re
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import mlx.core as mx

# What needs threads to meet. Of these, include/fibers.h has the simdgroup functions of EMULATED.
MEETINGS = re.compile(r"\b(threadgroup|atomic\w*|simd_\w+|quad_\w+|\w+_barrier|"
                      r"simdgroup_(?!index_in_)\w+)\b")
EMULATED = {"simd_sum", "simd_broadcast", "simd_shuffle_xor"}
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_PRINTED = re.compile(r"Generated source code for `[^`]*`:\n```\n(.*)\n```", re.DOTALL)
_SIGNATURE = re.compile(r"\[\[kernel\]\] void (\w+)\(\n(.*?)\) \{\n", re.DOTALL)
_PARAMETER = re.compile(
    r"\s*(?P<type>.+?)(?P<mode>[*& ]) ?(?P<name>\w+) \[\[(?P<attribute>\w+)(\(\d+\))?\]\]")
_INSTANCE = re.compile(r"\[\[kernel\]\] decltype\((.+?)\) ")


class NotEmulated(Exception):
    """The kernel uses something that the emulation would get wrong."""


@dataclass(frozen=True)
class Parameter:
    type: str  # with its address space, "const device float" or "uint3"
    mode: str  # "*" pointer, "&" reference, " " value
    name: str
    attribute: str  # "buffer", or the name of an index

    @property
    def is_buffer(self) -> bool:
        return self.attribute == "buffer"


@dataclass(frozen=True)
class Source:
    text: str
    entry: str  # the kernel's name, with its template's arguments
    parameters: tuple[Parameter, ...]

    @staticmethod
    @cache
    def parse(text: str) -> "Source":
        signature, instance = _SIGNATURE.search(text), _INSTANCE.search(text)
        lines = signature[2].split("\n") if signature else [""]
        found = [_PARAMETER.match(line) for line in lines]
        if None in found:
            raise NotEmulated(f"MLX {mx.__version__} writes signatures otherwise than expected: "
                              f"{text}")
        return Source(text, instance[1] if instance else signature[1], tuple(
            Parameter(*match.group("type", "mode", "name", "attribute")) for match in found))

    def meetings(self) -> set[str]:
        """The simdgroup functions it calls; raises ``NotEmulated`` for other ways to meet."""
        used = {match[0] for match in MEETINGS.finditer(_COMMENT.sub(" ", self.text))}
        if unknown := sorted(used - EMULATED):
            raise NotEmulated("simdgroups are run one after the other, which cannot emulate "
                              f"{', '.join(unknown)}")
        return used


def generate(kernel, inputs: list[mx.array], **call) -> Source:
    """What MLX would hand to Metal's compiler for ``kernel(inputs=inputs, **call)``."""
    with tempfile.TemporaryFile() as printed:
        with _standard_output(printed):
            mx.export_function(lambda _: None, lambda *traced: kernel(
                inputs=list(traced), verbose=True, **call), *inputs)
        printed.seek(0)
        return Source.parse(_PRINTED.search(printed.read().decode())[1])


@contextmanager
def _standard_output(file):
    flush = ctypes.CDLL(None).fflush
    sys.stdout.flush()
    flush(None)
    saved = os.dup(1)
    os.dup2(file.fileno(), 1)
    try:
        yield
    finally:
        flush(None)
        os.dup2(saved, 1)
        os.close(saved)
