"""Arguments and options that several verbs take, as annotated types for typer."""

from pathlib import Path
from typing import Annotated

import typer

MODEL_HELP = "A folder, a .gguf file, a Hugging Face repository, or a recipe's name."

Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
DefaultModel = Annotated[str, typer.Argument(metavar="[MODEL]", help=MODEL_HELP)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a repository.")]
Memory = Annotated[str | None, typer.Option(help="Most the model may take, e.g. 8GB.")]
Trust = Annotated[bool, typer.Option(
    "--trust-remote-code", help="Run code that the model folder brings. Off by default.")]
System = Annotated[str | None, typer.Option(help="System prompt.")]

MaxTokens = Annotated[int, typer.Option(help="Longest reply in tokens.")]
Temperature = Annotated[float, typer.Option("--temp", help="Sampling temperature; 0 is greedy.")]
TopP = Annotated[float, typer.Option(help="Nucleus sampling; 1 is off.")]
TopK = Annotated[int, typer.Option(help="Sample from the k likeliest; 0 is off.")]
MinP = Annotated[float, typer.Option(
    help="Least probability, relative to the likeliest; 0 is off.")]
Penalty = Annotated[float, typer.Option(
    "--repetition-penalty", help="Above 1 discourages repeats.")]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]
KvBits = Annotated[int | None, typer.Option(help="Quantise the KV cache: 2, 3, 4, 5, 6 or 8.")]
Draft = Annotated[str | None, typer.Option(
    metavar="MODEL", help="A small model of the same vocabulary that guesses tokens ahead.")]
DraftTokens = Annotated[int, typer.Option(help="Tokens that --draft guesses at a time.")]
Lookup = Annotated[int, typer.Option(
    metavar="N",
    help="Guess up to N tokens ahead from what followed the same words before; 0 is off.")]

NewFolder = Annotated[Path, typer.Option("-o", "--output", help="The folder to make.")]
Text = Annotated[Path, typer.Option(help="A UTF-8 text file.")]
Context = Annotated[int, typer.Option(help="Tokens in a window.")]
Windows = Annotated[int | None, typer.Option(help="Use the first N windows; default: all.")]
Chip = Annotated[str | None, typer.Option(
    "--chip",
    help="Predict for this chip, e.g. 'M1 Pro' or 'M3 Max 30c', in place of this machine.")]
