"""The command line: verbs that parse, call and print.

Results go to stdout, progress and remarks to stderr. Exit codes: 0, 1 for a failure (one line says
which), 2 for a wrong call, 130 for Ctrl-C. What a verb needs is imported when it runs, so that the
help is quick.
"""

import os
import sys
from io import TextIOWrapper
from typing import Annotated

import typer

from mlxquant.base.errors import BadValue, one_line
from mlxquant.base.text import clean
from mlxquant.base.version import __version__
from mlxquant.cli import look, make, measure, quantize, talk
from mlxquant.cli.common import app

__all__ = ["app", "look", "main", "make", "measure", "quantize", "talk"]


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option(
        "--version", help="Print the version.")] = False) -> None:
    if version:
        print(f"mlxquant {__version__}")
        raise typer.Exit


def main() -> None:
    """Entry point: turns errors that are no bugs, and Ctrl-C, into one line and an exit code.

    Of several machines that run the same command under ``mlx.launch``, only the first one prints.
    """
    _prepare_streams()
    rank, stderr = int(os.environ.get("MLX_RANK") or 0), sys.stderr
    if rank:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - until the end
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        line = one_line(error)
        if line is None:
            raise
        where = f"machine {rank}: " if rank else ""
        print(clean(f"{where}error: {line}"), file=stderr, flush=True)
        sys.exit(2 if isinstance(error, BadValue) else 1)


def _prepare_streams() -> None:
    """Read UTF-8, escape what an encoding lacks, and put empty files in place of closed ones."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - until the end
        elif isinstance(stream, TextIOWrapper):
            stream.reconfigure(encoding="utf-8" if mode == "r" else None,
                               errors="surrogateescape" if mode == "r" else "backslashreplace")
