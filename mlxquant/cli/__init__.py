"""The command line: verbs that parse, call and print.

Results go to stdout, progress and remarks to stderr. Exit codes: 0, 1 for a
failure (one line says which), 2 for a wrong call, 130 for Ctrl-C.
"""

import os
import sys
from typing import Annotated

import typer

from mlxquant.base.errors import BadValue, MlxquantError
from mlxquant.base.version import __version__
from mlxquant.cli import look, make, measure, talk
from mlxquant.cli.common import app, remark

__all__ = ["app", "look", "main", "make", "measure", "talk"]


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option(
        "--version", help="Print the version.")] = False) -> None:
    if version:
        print(f"mlxquant {__version__}")
        raise typer.Exit


def main() -> None:
    """Entry point: turns our errors and Ctrl-C into one line and an exit code.

    Of several machines that run the same command under ``mlx.launch``, the first one speaks.
    """
    rank, stderr = int(os.environ.get("MLX_RANK") or 0), sys.stderr
    if rank:
        sys.stdout = sys.stderr = open(os.devnull, "w")
    try:
        app()
    except MlxquantError as error:
        sys.stderr = stderr
        remark(f"machine {rank}: error: {error}" if rank else f"error: {error}")
        sys.exit(2 if isinstance(error, BadValue) else 1)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
