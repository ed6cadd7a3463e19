"""Arguments and options that several verbs take, as annotated types for typer."""

from functools import partial
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

MODEL_HELP = "A folder, a .gguf file, a Hugging Face repository, or a recipe's name."
advanced = partial(Option, rich_help_panel="Advanced")  # where a verb has panels

Model = Annotated[str, Argument(metavar="MODEL", help=MODEL_HELP)]
DefaultModel = Annotated[str, Argument(metavar="[MODEL]", help=MODEL_HELP)]
AsJson = Annotated[bool, Option("--json", help="Print JSON on stdout.")]
Revision = Annotated[str | None, advanced(help="Branch, tag or commit of a repository.")]
Memory = Annotated[str | None, Option(help="Most the model may take, e.g. 8GB.")]
Trust = Annotated[bool, Option(
    "--trust-remote-code", help="Run code that the model folder brings. Off by default.")]
System = Annotated[str | None, Option(help="System prompt.")]

MaxTokens = Annotated[int, Option(help="Longest reply in tokens.")]
Temperature = Annotated[float, Option("--temp", help="Sampling temperature; 0 is greedy.")]
TopP = Annotated[float, Option(help="Nucleus sampling; 1 is off.")]
TopK = Annotated[int, Option(help="Sample from the k likeliest; 0 is off.")]
MinP = Annotated[float, Option(help="Least probability, relative to the likeliest; 0 is off.")]
Penalty = Annotated[float, Option("--repetition-penalty", help="Above 1 discourages repeats.")]
Seed = Annotated[int | None, Option(help="Makes sampling repeatable.")]
KvBits = Annotated[int | None, Option(help="Quantise the KV cache: 2, 3, 4, 5, 6 or 8.")]
Draft = Annotated[str | None, Option(
    metavar="MODEL", help="A small model with the same tokenizer that guesses tokens ahead.")]
DraftTokens = Annotated[int, Option(help="Tokens that --draft guesses at a time.")]
Lookup = Annotated[int, Option(
    metavar="N",
    help="Guess up to N tokens ahead from what followed the same words before; 0 is off.")]

NewFolder = Annotated[Path, Option("-o", "--output", help="The folder to make.")]
Tasks = Annotated[list[str] | None, Option(
    metavar="FILE|NAME",
    help="Questions: a file of JSON lines, or a task of lm-eval by name; repeatable. Needs "
         "pip install 'mlxquant[tasks]'.")]
Questions = Annotated[int | None, Option(
    metavar="N", help="Of each of --tasks the first N questions; default: all.")]
Context = Annotated[int, Option(help="Tokens in a window.")]
Windows = Annotated[int | None, Option(help="Use the first N windows; default: all.")]
Data = Annotated[list[str] | None, Option(
    help="Calibration text: a file or hf://datasets/OWNER/NAME/FILE; repeatable. "
         "Default: text the model writes itself.")]
Samples = Annotated[int, advanced(help="Calibration samples.")]
Length = Annotated[int, advanced("--sequence-length", help="Tokens in a sample.")]
GroupSize = Annotated[int, Option(
    help="Inputs that share a scale; 0: a whole row, -1: the whole matrix.")]
ByteSeed = Annotated[int, advanced("--seed", help="The same seed gives the same bytes.")]
Chip = Annotated[str | None, Option(
    "--chip",
    help="Predict for this chip, e.g. 'M1 Pro' or 'M3 Max 30c', in place of this machine.")]
