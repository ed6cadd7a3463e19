"""Run compiled kernels with every array between forbidden pages.

A program: each line of its standard input is a job as JSON, and may kill it. A job runs twice:
1. each array ends where a forbidden page begins, memory not given holds 0xFF, threads run forwards;
2. each array starts where a forbidden page ends, memory not given holds 0x7F, threads backwards.
It answers with a line of JSON: what the kernel may write, outputs and inputs that are said to be
written, after either run; all others are read-only. Where both agree, all outputs were written, and
from the inputs alone. It exits with 3 and one line on standard error after an access out of bounds,
with 4 after a trap.
"""

import ctypes
import json
import mmap
import os
import signal
import sys

_PAGE = mmap.PAGESIZE
_FORBIDDEN = 1 << 26  # on each side: enough for an index that is wrong by a factor
_NONE, _READ, _READ_WRITE = 0, 1, 3
_PRIVATE_ANONYMOUS_NORESERVE = 0x4022
_SA_SIGINFO, _ADDRESS_IN_SIGINFO = 4, 16
_PATIENCE_S = 120
_C = ctypes.CDLL(None, use_errno=True)
_C.mmap.restype = ctypes.c_void_p
_C.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int,
                    ctypes.c_long]
_C.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_C.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


_Handle = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


class Handler(ctypes.Structure):
    """C's ``struct sigaction``, as Linux's libraries lay it out."""

    _fields_ = [("call", _Handle), ("mask", ctypes.c_ulong * 16), ("flags", ctypes.c_int),
                ("restorer", ctypes.c_void_p)]


class Guarded:
    """``size`` bytes that touch a forbidden page at their start or, but for alignment, at their
    end."""

    def __init__(self, name: str, size: int, content: bytes | None, poison: int, at_end: bool,
                 alignment: int, written: bool):
        pages = -(-size // _PAGE) * _PAGE
        base = _C.mmap(None, 2 * _FORBIDDEN + pages, _NONE, _PRIVATE_ANONYMOUS_NORESERVE, -1, 0)
        if base == ctypes.c_void_p(-1).value:
            raise OSError(ctypes.get_errno(), f"no address space for {name}")
        inside = base + _FORBIDDEN
        _C.mprotect(inside, pages, _READ_WRITE)
        ctypes.memset(inside, poison, pages)
        self.name, self.size = name, size
        self.reach = range(base, inside + pages + _FORBIDDEN)
        self.start = inside + (pages - size) // alignment * alignment if at_end else inside
        if content is not None:
            ctypes.memmove(self.start, content, size)
            if not written:
                _C.mprotect(inside, pages, _READ)

    def free(self) -> None:
        _C.munmap(self.reach.start, len(self.reach))

    def describe(self, address: int) -> str:
        offset = address - self.start
        if offset < 0:
            return f"{-offset} bytes before `{self.name}`"
        past = offset - self.size
        if past >= 0:
            return f"{past} bytes past the end of `{self.name}`"
        return f"in read-only `{self.name}`"


def report(arrays: list[Guarded], running) -> Handler:
    """What to do when a thread dies: say which, and where it reached."""
    @_Handle
    def handle(number, info, _):
        address = ctypes.c_void_p.from_address(info + _ADDRESS_IN_SIGINFO).value or 0
        where = next((a.describe(address) for a in arrays if address in a.reach),
                     f"at {address:#x}")
        trapped = number == signal.SIGILL or number == signal.SIGTRAP
        what = "undefined behaviour" if trapped else f"access {where}"
        os.write(2, f"thread {tuple(running)} of the grid: {what}\n".encode())
        os._exit(4 if trapped else 3)

    handler = Handler(call=handle, flags=_SA_SIGINFO)
    for number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGTRAP):
        _C.sigaction(int(number), ctypes.byref(handler), None)
    return handler  # must outlive the launch


def run(job: dict, library: ctypes.CDLL, backwards: bool) -> list[str]:
    """What the kernel may write, as hexadecimal digits, after a run."""
    poison = 0x7F if backwards else 0xFF
    arrays = []
    for array in job["arrays"]:
        content = bytes.fromhex(array["content"]) if array["content"] is not None else None
        arrays.append(Guarded(array["name"], array["size"], content, poison, not backwards,
                              job["alignment"], array["written"]))
    handler = report(arrays, (ctypes.c_uint * 3).in_dll(library, "running"))
    library.launch((ctypes.c_void_p * len(arrays))(*(a.start for a in arrays)),
                   (ctypes.c_uint * 3)(*job["grid"]), (ctypes.c_uint * 3)(*job["threadgroup"]),
                   ctypes.c_bool(backwards))
    del handler
    outputs = [ctypes.string_at(a.start, a.size).hex()
               for a, given in zip(arrays, job["arrays"]) if given["written"]]
    for array in arrays:
        array.free()
    return outputs


if __name__ == "__main__":
    ctypes.CDLL("libm.so.6", mode=ctypes.RTLD_GLOBAL)  # for what clang leaves to a library
    libraries = {}
    for line in sys.stdin:
        signal.alarm(_PATIENCE_S)
        job = json.loads(line)
        path = job["library"]
        library = libraries[path] = libraries.get(path) or ctypes.CDLL(path)
        print(json.dumps([run(job, library, backwards) for backwards in (False, True)]), flush=True)
        signal.alarm(0)
