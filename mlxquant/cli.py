"""The command line: verbs that parse, call and print.

Results go to stdout, progress and remarks to stderr. Exit codes: 0, 1 for a
failure (one line says which), 2 for a wrong call, 130 for Ctrl-C.
"""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from mlxquant import __version__, blas
from mlxquant.errors import BadValue, MlxquantError

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Low-bit inference on MLX, with every speed shown against the bandwidth ceiling.")

_MODEL_HELP = "A folder, a .gguf file, a Hugging Face repository, or a recipe's name."

ModelName = Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL_HELP)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
Revision = Annotated[Optional[str], typer.Option(help="Branch, tag or commit of a repository.")]
Memory = Annotated[Optional[str], typer.Option(help="Most the model may take, e.g. 8GB.")]
Trust = Annotated[bool, typer.Option(
    "--trust-remote-code", help="Run code that the model folder brings. Off by default.")]
MaxTokens = Annotated[int, typer.Option(help="Longest reply in tokens.")]
Temperature = Annotated[float, typer.Option("--temp", help="Sampling temperature; 0 is greedy.")]
TopP = Annotated[float, typer.Option(help="Nucleus sampling; 1 is off.")]
TopK = Annotated[int, typer.Option(help="Sample from the k likeliest; 0 is off.")]
MinP = Annotated[float, typer.Option(help="Least probability, relative to the likeliest; 0 is off.")]
Penalty = Annotated[float, typer.Option("--repetition-penalty", help="Above 1 discourages repeats.")]
Seed = Annotated[Optional[int], typer.Option(help="Makes sampling repeatable.")]
KvBits = Annotated[Optional[int], typer.Option(help="Quantise the KV cache: 2, 3, 4, 5, 6 or 8.")]
System = Annotated[Optional[str], typer.Option(help="System prompt.")]


@app.command(epilog='Example: mlxquant generate smollm2-135m -p "What is gravity?"')
def generate(
    model: ModelName,
    prompt: Annotated[Optional[str], typer.Option("-p", "--prompt", help="Default: stdin.")] = None,
    system: System = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text, no chat template.")] = False,
    max_tokens: MaxTokens = 256, temp: Temperature = 0.0, top_p: TopP = 1.0, top_k: TopK = 0,
    min_p: MinP = 0.0, repetition_penalty: Penalty = 1.0, seed: Seed = None,
    stop: Annotated[Optional[list[str]], typer.Option(help="End at this text; repeatable.")] = None,
    kv_bits: KvBits = None, revision: Revision = None, memory: Memory = None,
    trust_remote_code: Trust = False, as_json: AsJson = False,
):
    """Answer one prompt, streaming, with a report of the speed."""
    from mlxquant.generation import Response, stream_generate
    from mlxquant.sampling import Sampling

    sampling = Sampling(temp, top_p, top_k, min_p, repetition_penalty, seed)
    text = sys.stdin.read() if prompt is None else prompt
    loaded = _load(model, revision, memory, trust_remote_code)
    request = text
    if not raw and loaded.tokenizer.has_chat_template:
        request = [{"role": "system", "content": system}] if system else []
        request.append({"role": "user", "content": text})
    pieces = []
    for chunk in stream_generate(loaded, request, max_tokens=max_tokens, sampling=sampling,
                                 stop=stop or (), kv_bits=kv_bits):
        pieces.append(chunk.text)
        if not as_json:
            print(chunk.text, end="", flush=True)
    response = Response("".join(pieces), chunk.finish_reason, chunk.report)
    if as_json:
        _print_json(response.as_dict())
    else:
        print(flush=True)
        _remark(response.report.line())


@app.command(epilog="Example: mlxquant chat smollm2-135m --system 'Answer briefly.'")
def chat(
    model: Annotated[str, typer.Argument(metavar="[MODEL]", help=_MODEL_HELP)] = "",
    system: System = None, max_tokens: MaxTokens = 1024, temp: Temperature = 0.7,
    top_p: TopP = 0.95, top_k: TopK = 0, min_p: MinP = 0.0, repetition_penalty: Penalty = 1.0,
    seed: Seed = None, kv_bits: KvBits = None, revision: Revision = None, memory: Memory = None,
    trust_remote_code: Trust = False,
):
    """Talk with a model; /help lists the commands."""
    from mlxquant.chat import Conversation, run
    from mlxquant.models import DEFAULT_MODEL
    from mlxquant.sampling import Sampling

    sampling = Sampling(temp, top_p, top_k, min_p, repetition_penalty, seed)
    loaded = _load(model or DEFAULT_MODEL, revision, memory, trust_remote_code)
    _remark(f"{loaded.name}: /help lists the commands, Ctrl-D leaves")
    run(Conversation(loaded, system, sampling, max_tokens, kv_bits))


@app.command(epilog="Example: mlxquant evaluate smollm2-135m --text wikitext2-raw-test.txt --windows 40")
def evaluate(
    model: ModelName,
    text: Annotated[Path, typer.Option(help="A UTF-8 text file.")],
    context: Annotated[int, typer.Option(help="Tokens in a window.")] = 1024,
    windows: Annotated[Optional[int], typer.Option(help="Use the first N windows; default: all.")] = None,
    revision: Revision = None, memory: Memory = None, trust_remote_code: Trust = False,
    as_json: AsJson = False,
):
    """Perplexity over the first windows of a text."""
    from dataclasses import asdict

    from mlxquant.evaluation.perplexity import evaluate as measure

    if not text.is_file():
        raise MlxquantError(f"no such file: {text}")
    loaded = _load(model, revision, memory, trust_remote_code, probe=False)
    with _progress("perplexity") as advance:
        result = measure(loaded, text, context=context, windows=windows, progress=advance)
    if as_json:
        _print_json(asdict(result))
    else:
        print(f"perplexity {result.perplexity:.2f} over {result.windows} windows of "
              f"{result.context} tokens · {result.bits_per_weight:.2f} bits per weight · "
              f"{result.file_bytes / 1e6:.1f} MB on disk")


@app.command(epilog="Example: mlxquant inspect smollm2-135m")
def inspect(model: ModelName, revision: Revision = None, as_json: AsJson = False):
    """Show a model's formats, size and bytes read per token."""
    from mlxquant.inspection import inspect as look

    result = look(model, revision=revision)
    if as_json:
        _print_json(result.as_dict())
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("layer", "format", "bits", "shape", "MB", box=None)
    for layer in result.layers:
        table.add_row(layer.path, layer.format, str(layer.bits),
                      "×".join(map(str, layer.shape)), f"{layer.bytes / 1e6:.2f}")
    Console().print(table)
    print(f"{result.architecture}, {result.parameters / 1e6:.1f} M parameters · "
          f"{result.bits_per_weight:.2f} bits per weight of the body · "
          f"{result.file_bytes / 1e6:.1f} MB on disk\n"
          f"reads {result.bytes_per_token / 1e6:.1f} MB of weights per token "
          f"({result.bytes_per_token_cpu / 1e6:.1f} MB as dense float32 on a plain CPU)")


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False):
    if version:
        print(f"mlxquant {__version__}")
        raise typer.Exit


def main() -> None:
    """Entry point: turns our errors and Ctrl-C into one line and an exit code."""
    try:
        app()
    except MlxquantError as error:
        _remark(f"error: {error}")
        sys.exit(2 if isinstance(error, BadValue) else 1)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _load(model: str, revision: str | None, memory: str | None, trust: bool, *, probe: bool = True):
    from mlxquant.loading import load
    from mlxquant.roofline.probe import read_ceiling

    if hint := blas.hint():
        _remark(hint)
    if probe:
        read_ceiling()
    return load(model, revision=revision, memory=memory, trust_remote_code=trust)


def _progress(title: str):
    """A progress bar on stderr; the context gives a function (done, total, value)."""
    from contextlib import contextmanager

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    @contextmanager
    def bar():
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                   TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task(title, total=None)
            yield lambda done, total, value: progress.update(
                task, completed=done, total=total, description=f"{title} {value:.2f}")

    return bar()


def _print_json(value) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def _remark(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
