"""The command line in processes of its own, forked from one that has imported everything.

The imports take more than a second, a fork some milliseconds. Where a fork is not safe (macOS),
each process starts from nothing.
"""

import functools
import importlib
import multiprocessing
import os
import pkgutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import mlxquant

_PROCESSES = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
_PROCESSES.set_forkserver_preload(["mlx_lm.generate", *(
    module.name for module in pkgutil.walk_packages(mlxquant.__path__, "mlxquant.")
    if not module.name.endswith("__main__"))])
_STREAMS = ("stdin", "stdout", "stderr")


class Command:
    """``mlxquant`` with ``arguments``, begun; ``before`` is called in its process first."""

    def __init__(self, *arguments, stdin: str = "", cwd: Path | None = None,
                 before: Callable[[], None] | None = None, **environment: str):
        self._folder = tempfile.TemporaryDirectory()
        self.streams = [Path(self._folder.name, name) for name in _STREAMS]
        self.streams[0].write_text(stdin)
        self.arguments = list(map(str, arguments))
        self.process = _PROCESSES.Process(target=_main, args=(
            self.streams, self.arguments, cwd or Path.cwd(), os.environ | environment, before))
        self.process.start()

    def ended(self, patience: float = 120) -> subprocess.CompletedProcess:
        """Wait for it, no longer than ``patience`` seconds."""
        self.process.join(patience)
        self.process.kill()
        self.process.join()
        with self._folder:
            said = [stream.read_text(encoding="utf-8") for stream in self.streams[1:]]
        return subprocess.CompletedProcess(self.arguments, self.process.exitcode, *said)


@functools.wraps(Command.__init__)
def run(*arguments, **options) -> subprocess.CompletedProcess:
    return Command(*arguments, **options).ended()


def _main(streams: list[Path], arguments: list[str], cwd: Path, environment: dict[str, str],
          before: Callable[[], None] | None) -> None:
    for number, path in enumerate(streams):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    sys.stdin = os.fdopen(0, encoding="utf-8")
    sys.stdout = os.fdopen(1, "w", encoding="utf-8")
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", buffering=1)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv[:] = ["mlxquant", *arguments]
    if before:
        before()
    importlib.import_module("mlxquant.cli").main()
