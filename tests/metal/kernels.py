"""``mx.fast.metal_kernel`` without Metal: kernels that are compiled for, and run on, the CPU."""

import json
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

import mlx.core as mx
import numpy as np

from . import source
from .compiler import Compiler
from .source import NotEmulated

# Of inputs that a kernel writes to: in MLX they are buffers like its outputs.
_WRITTEN = re.compile(r"const_cast<DEVICE \w+\*>\((\w+)\)")
_GUARDED = Path(__file__).with_name("guarded.py")


class OutOfBounds(Exception):
    """A thread reached beyond an array, or wrote to an input."""


class Undefined(Exception):
    """A thread did what C++ leaves undefined: an index beyond a local array, a shift too far, a
    misaligned vector."""


class Unsettled(Exception):
    """An output depends on the order of threads or on what memory held: a race, or not written."""


class Runner:
    """The process that runs kernels, another after each that killed it; ends with its context."""

    def __enter__(self) -> "Runner":
        self.complaint = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_GUARDED)], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.complaint)
        return self

    def __exit__(self, *_) -> None:
        self.process.communicate()
        self.complaint.close()

    def run(self, job: dict, output_names: list[str]) -> list[bytes]:
        print(json.dumps(job), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            self._raise()
        forwards, backwards = ([bytes.fromhex(x) for x in run] for run in json.loads(answer))
        for name, *both in zip(output_names, forwards, backwards):
            if both[0] != both[1]:
                first = next(i for i, (x, y) in enumerate(zip(*both)) if x != y)
                raise Unsettled(f"byte {first} of `{name}` was not written, "
                                "or depends on the order of threads")
        return forwards

    def _raise(self) -> NoReturn:
        """Say what the process died of, after beginning another."""
        code = self.process.wait()
        self.complaint.seek(0)
        complaint = self.complaint.read()
        self.__exit__()
        self.__enter__()
        if code in (3, -signal.SIGSEGV, -signal.SIGBUS):  # its own report, or not even that
            raise OutOfBounds(complaint or "segmentation fault")
        if code in (4, -signal.SIGILL, -signal.SIGTRAP):
            raise Undefined(complaint)
        raise RuntimeError(f"exit code {code}: {complaint}")


class Emulation:
    """``metal_kernel`` takes the place of MLX's. Vectors loaded through an array's pointer need it
    ``alignment`` bytes aligned, as any MLX array is; what is left behind its end is not guarded."""

    def __init__(self, compiler: Compiler, runner: Runner, alignment: int = 1):
        self.compiler, self.runner, self.alignment = compiler, runner, alignment
        self.mlx_metal_kernel = mx.fast.metal_kernel  # before it is replaced

    def install(self, monkeypatch, module) -> None:
        """Have ``module`` build its kernel here, as on a Mac."""
        monkeypatch.setattr(mx.metal, "is_available", lambda: True)
        monkeypatch.setattr(mx.fast, "metal_kernel", self.metal_kernel)
        monkeypatch.setattr(module._KERNEL, "built", {})

    def metal_kernel(self, name, input_names, output_names, source, header="",
                     ensure_row_contiguous=True, atomic_outputs=False,
                     compile_options=None) -> "EmulatedKernel":
        if not ensure_row_contiguous or atomic_outputs:
            raise NotEmulated("strided inputs and atomic outputs")
        mlx_kernel = self.mlx_metal_kernel(
            name=name, input_names=input_names, output_names=output_names, source=source,
            header=header, compile_options=compile_options)
        return EmulatedKernel(self, mlx_kernel, input_names, output_names)


class EmulatedKernel:
    """Called like MLX's kernels; returns arrays that are computed already."""

    def __init__(self, emulation: Emulation, mlx_kernel, input_names: list[str],
                 output_names: list[str]):
        self.emulation, self.mlx_kernel = emulation, mlx_kernel
        self.input_names, self.output_names = input_names, output_names

    def __call__(self, *, inputs, output_shapes, output_dtypes, grid, threadgroup, template=None,
                 init_value=None, stream=None, verbose=False) -> list[mx.array]:
        if init_value is not None:
            raise NotEmulated("outputs with an initial value")
        given, inputs = inputs, [mx.array(x) for x in inputs]
        made = source.generate(
            self.mlx_kernel, inputs, output_shapes=output_shapes, output_dtypes=output_dtypes,
            grid=grid, threadgroup=threadgroup, template=template)
        outputs = list(zip(self.output_names, output_shapes, output_dtypes, strict=True))
        written = _WRITTEN.findall(made.text)
        arrays = [{"name": name, "size": len(content), "content": content.hex(),
                   "written": name in written}
                  for name, content in zip(self.input_names, map(_bytes, inputs), strict=True)]
        arrays += [{"name": name, "size": int(np.prod(shape)) * dtype.size, "content": None,
                    "written": True} for name, shape, dtype in outputs]
        passed = [p.name for p in made.parameters if p.is_buffer]
        if passed != [a["name"] for a in arrays]:
            raise NotEmulated(f"buffers {passed}: shapes and strides are not passed")
        job = {"library": str(self.emulation.compiler.build(made)), "arrays": arrays, "grid": grid,
               "threadgroup": threadgroup, "alignment": self.emulation.alignment}
        names = [array["name"] for array in arrays if array["written"]]
        contents = dict(zip(names, self.emulation.runner.run(job, names)))
        for name in set(names) - set(self.output_names):
            array = given[self.input_names.index(name)]
            np.array(array.view(mx.uint8), copy=False)[:] = np.frombuffer(
                contents[name], np.uint8).reshape(*array.shape[:-1], -1)
        return [mx.array(np.frombuffer(contents[name], np.uint8)).view(dtype).reshape(shape)
                for name, shape, dtype in outputs]


def _bytes(array: mx.array) -> bytes:
    return bytes(np.array(mx.contiguous(array).reshape(-1).view(mx.uint8)))
