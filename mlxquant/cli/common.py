"""What the verbs share: the app, options, progress on stderr, results on stdout."""

import json
import sys
from contextlib import contextmanager
from typing import Annotated

import typer

from mlxquant.base import blas

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Low-bit inference on MLX, with every speed shown against the bandwidth ceiling.")

MODEL_HELP = "A folder, a .gguf file, a Hugging Face repository, or a recipe's name."

ModelName = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a repository.")]
Memory = Annotated[str | None, typer.Option(help="Most the model may take, e.g. 8GB.")]
Trust = Annotated[bool, typer.Option(
    "--trust-remote-code", help="Run code that the model folder brings. Off by default.")]
MaxTokens = Annotated[int, typer.Option(help="Longest reply in tokens.")]
Temperature = Annotated[float, typer.Option("--temp", help="Sampling temperature; 0 is greedy.")]
TopP = Annotated[float, typer.Option(help="Nucleus sampling; 1 is off.")]
TopK = Annotated[int, typer.Option(help="Sample from the k likeliest; 0 is off.")]
MinP = Annotated[float, typer.Option(help="Least probability, relative to the likeliest; 0 is off.")]
Penalty = Annotated[float, typer.Option("--repetition-penalty", help="Above 1 discourages repeats.")]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]
KvBits = Annotated[int | None, typer.Option(help="Quantise the KV cache: 2, 3, 4, 5, 6 or 8.")]
Draft = Annotated[str | None, typer.Option(
    metavar="MODEL", help="A small model of the same vocabulary that guesses tokens ahead.")]
DraftTokens = Annotated[int, typer.Option(help="Tokens that --draft guesses at a time.")]
Lookup = Annotated[int, typer.Option(
    metavar="N", help="Guess up to N tokens ahead from what followed the same words before; 0 is off.")]
System = Annotated[str | None, typer.Option(help="System prompt.")]


def load_model(model: str, revision: str | None, memory: str | None, trust: bool, *,
               probe: bool = True):
    """Load by name, with the hint for a slow BLAS, and the ceiling measured beforehand."""
    from mlxquant.model.loading import load
    from mlxquant.runtime.probe import read_ceiling

    if hint := blas.hint():
        remark(hint)
    if probe:
        read_ceiling()
    return load(model, revision=revision, memory=memory, trust_remote_code=trust)


@contextmanager
def progress(title: str):
    """A progress bar on stderr; the context gives a function (done, total, value). A part of the work with another title
    gets a bar of its own."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks = {title: bar.add_task(title, total=None)}

        def advance(done: int, total: int, value: float | None, part: str = title) -> None:
            if part not in tasks:
                tasks[part] = bar.add_task(part, total=None)
            bar.update(tasks[part], completed=done, total=total,
                       description=part if value is None else f"{part} {value:.2f}")

        yield advance


def print_json(value) -> None:
    """A result on stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def remark(text: str) -> None:
    """A line for people on stderr."""
    print(text, file=sys.stderr, flush=True)
