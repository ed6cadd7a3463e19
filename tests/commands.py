"""The command line in processes of its own, forked from one that has imported everything.

The imports take more than a second, a fork some milliseconds. Where a fork is not safe (macOS),
each process starts from nothing.
"""

import importlib
import multiprocessing
import os
import pkgutil
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import mlxquant  # first: it loads the BLAS before MLX

# isort: split

import mlx.core as mx

from mlxquant.runtime import probe

_PROCESSES = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
_PROCESSES.set_forkserver_preload(["mlxquant", "mlx_lm.generate", *(  # that order, for the BLAS
    module.name for module in pkgutil.walk_packages(mlxquant.__path__, "mlxquant.")
    if not module.name.endswith("__main__"))])
_STREAMS = ("stdin", "stdout", "stderr")


def measured(**_) -> probe.Probe:
    """Of this machine, in place of ``probe.measured``, which takes half a minute."""
    ceiling = probe.Ceiling(100.0, 0.01, "mlx product", "test", mx.__version__)
    return probe.Probe(ceiling, {ceiling.kernel: ceiling.gb_per_s}, 0.1)


def command_line() -> None:
    importlib.import_module("mlxquant.cli").main()


class Command:
    """``mlxquant`` with ``arguments``, begun.

    ``before`` is called in its process first; ``program`` instead of the command line. In a
    ``terminal``, by its path, it is the one that the keyboard talks to.
    """

    def __init__(self, *arguments, stdin: str = "", cwd: Path | None = None,
                 before: Callable[[], None] | None = None,
                 program: Callable[[], None] = command_line,
                 terminal: str | None = None, **environment: str):
        self._folder = tempfile.TemporaryDirectory()
        self._streams = [Path(terminal or f"{self._folder.name}/{name}") for name in _STREAMS]
        if not terminal:
            self._streams[0].write_text(stdin)
            self._streams[2].touch()
        self.arguments = list(map(str, arguments))
        self.process = _PROCESSES.Process(target=_main, args=(
            self._streams, self.arguments, cwd or Path.cwd(), os.environ | environment,
            before, program))
        self.process.start()

    def says(self, pattern: str, patience: float = 120) -> re.Match:
        """Wait for the first match on standard error, no longer than ``patience`` seconds."""
        for _ in range(round(patience / 0.02)):
            if found := re.search(pattern, self._streams[2].read_text(encoding="utf-8")):
                return found
            self.process.join(0.02)
        raise TimeoutError(self.ended().stderr)

    def interrupt(self) -> None:
        """Ctrl-C."""
        os.kill(self.process.pid, signal.SIGINT)

    def ended(self, patience: float = 120) -> subprocess.CompletedProcess:
        """Wait for it, no longer than ``patience`` seconds."""
        self.process.join(patience)
        self.process.kill()
        self.process.join()
        with self._folder:
            said = [path.read_text(encoding="utf-8") if path.is_file() else ""
                    for path in self._streams[1:]]
        return subprocess.CompletedProcess(self.arguments, self.process.exitcode, *said)


def run(*arguments, **options) -> subprocess.CompletedProcess:
    """A ``Command`` of these arguments, ended."""
    return Command(*arguments, **options).ended()


def _main(streams: list[Path], arguments: list[str], cwd: Path, environment: dict[str, str],
          before: Callable[[], None] | None, program: Callable[[], None]) -> None:
    os.setsid()  # the first terminal that is opened from here on is its own
    for number, path in enumerate(streams):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    sys.stdin = os.fdopen(0, encoding="utf-8")
    sys.stdout = os.fdopen(1, "w", encoding="utf-8")
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", buffering=1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv[:] = ["mlxquant", *arguments]
    probe.measured = measured
    if before:
        before()
    program()
