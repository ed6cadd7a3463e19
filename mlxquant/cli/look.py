"""Verbs that measure and describe: evaluate, inspect and check."""

from pathlib import Path
from typing import Annotated

import typer

from mlxquant.base.errors import BadValue, MlxquantError
from mlxquant.cli.common import (
    AsJson,
    Memory,
    ModelName,
    Revision,
    Trust,
    app,
    load_model,
    print_json,
    progress,
)


@app.command(epilog="Example: mlxquant evaluate smollm2-135m --text wikitext2-raw-test.txt --windows 40")
def evaluate(
    model: ModelName,
    text: Annotated[Path, typer.Option(help="A UTF-8 text file.")],
    context: Annotated[int, typer.Option(help="Tokens in a window.")] = 1024,
    windows: Annotated[int | None, typer.Option(help="Use the first N windows; default: all.")] = None,
    reference: Annotated[str | None, typer.Option(
        metavar="MODEL", help="Also the divergence from this model, the unquantised one.")] = None,
    layerwise: Annotated[bool, typer.Option(
        "--by-layer", help="Instead, the hidden state's error after every block.")] = False,
    plot: Annotated[Path | None, typer.Option(
        metavar="FILE", help="Draw --by-layer into a .png or .svg file.")] = None,
    revision: Revision = None, memory: Memory = None, trust_remote_code: Trust = False,
    as_json: AsJson = False,
):
    """Perplexity over the first windows of a text, and the distance from a reference model."""
    from dataclasses import asdict

    from mlxquant.model.loading import load
    from mlxquant.report import by_layer, divergence, perplexity

    if not text.is_file():
        raise MlxquantError(f"no such file: {text}")
    if layerwise and reference is None:
        raise BadValue("--by-layer needs --reference")
    if plot is not None:
        if not layerwise:
            raise BadValue("--plot needs --by-layer")
        by_layer.check_plot(plot)
    models = [load_model(model, revision, memory, trust_remote_code, probe=False)]
    if reference is not None:
        models.append(load(reference, memory=memory, trust_remote_code=trust_remote_code))
    protocol = {"context": context, "windows": windows}
    if layerwise:
        with progress("relative error") as advance:
            layers = by_layer.by_layer(*models, text, **protocol, progress=advance)
        if plot is not None:
            by_layer.plot(layers, plot)
        if as_json:
            print_json([asdict(layer) for layer in layers])
        else:
            from rich.console import Console

            Console().print(by_layer.table(layers))
        return
    title, measure = (("perplexity", perplexity.evaluate) if reference is None
                      else ("KL divergence", divergence.divergence))
    with progress(title) as advance:
        result = measure(*models, text, **protocol, progress=advance)
    if as_json:
        print_json(asdict(result))
    else:
        print(f"perplexity {result.perplexity:.2f} over {result.windows} windows of "
              f"{result.context} tokens · {result.bits_per_weight:.2f} bits per weight · "
              f"{result.file_bytes / 1e6:.1f} MB on disk")
        if reference is not None:
            print(result.line())


@app.command(epilog="Example: mlxquant inspect smollm2-135m")
def inspect(model: ModelName, revision: Revision = None, as_json: AsJson = False):
    """Show a model's formats, size and bytes read per token."""
    from mlxquant.model.inspection import inspect as look

    result = look(model, revision=revision)
    if as_json:
        print_json(result.as_dict())
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


@app.command(epilog="Example: mlxquant check")
def check(as_json: AsJson = False):
    """Hold every GPU kernel against its reference on this machine."""
    from dataclasses import asdict

    from mlxquant.kernels.check import comparisons, outcomes

    total, found = len(comparisons()), []
    with progress("kernels") as advance:
        for outcome in outcomes():
            found.append(outcome)
            advance(len(found), total, outcome.error or 0.0)
    if as_json:
        print_json([asdict(outcome) | {"passed": outcome.passed} for outcome in found])
    elif not total:
        print("no GPU here: layers run as plain operations, which are the kernels' reference")
    else:
        from rich.console import Console
        from rich.table import Table

        table = Table("kernel", "case", "error", "allowed", "", box=None)
        for outcome in found:
            error = "" if outcome.error is None else f"{outcome.error:.1e}"
            table.add_row(outcome.kernel, outcome.case, error, f"{outcome.allowed:.0e}",
                          "agrees" if outcome.passed else outcome.complaint or "DISAGREES")
        Console().print(table)
    if not all(outcome.passed for outcome in found):
        raise typer.Exit(1)
