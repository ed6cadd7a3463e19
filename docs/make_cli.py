"""Write docs/cli.md from the command line itself: python docs/make_cli.py [--check]."""

import sys
from pathlib import Path

from typer.main import get_command
from typer.testing import CliRunner

from mlxquant.cli import app

TARGET = Path(__file__).parent / "cli.md"
HEAD = """\
# Command line

Written by `python docs/make_cli.py` from the program's own help; a test fails when it is out of
date. Results go to stdout, progress and remarks to stderr. Exit codes: 0, 1 for a failure (one line
says which), 2 for a wrong call, 130 for Ctrl-C.
"""


def reference() -> str:
    """The help of the program and of each verb, in the order in which the program lists them."""
    verbs = get_command(app).list_commands(None)
    parts = [HEAD, _block("mlxquant", [])]
    parts += [f"## {verb}\n\n{_block(f'mlxquant {verb}', [verb])}" for verb in verbs]
    return "\n".join(parts)


def _block(title: str, verb: list[str]) -> str:
    result = CliRunner().invoke(app, [*verb, "--help"], prog_name="mlxquant",
                                env={"COLUMNS": "100"}, terminal_width=100, max_content_width=100)
    if result.exit_code:
        raise RuntimeError(f"{title} --help failed: {result.output}")
    lines = [line.rstrip() for line in result.output.strip().splitlines()]
    return "```\n" + "\n".join(lines) + "\n```\n"


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        current = TARGET.read_text(encoding="utf-8") == reference()
        sys.exit(0 if current else f"{TARGET} is out of date")
    TARGET.write_text(reference(), encoding="utf-8")
