"""The verb that trains a quantised model's scales."""

from pathlib import Path
from typing import Annotated

import typer

from mlxquant.cli.common import AsJson, app, print_json, progress


@app.command(epilog="Example: mlxquant tune small -o tuned --teacher smollm2-135m --data text.txt --steps 300")
def tune(
    model: Annotated[str, typer.Argument(metavar="DIR", help="A folder that quantize made.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder to make.")],
    teacher: Annotated[str, typer.Option(help="The original: a folder, a .gguf file, a repository, a recipe.")],
    data: Annotated[list[str], typer.Option(
        help="Text to train on: a file or hf://datasets/OWNER/NAME/FILE; repeatable.")],
    steps: Annotated[int, typer.Option(help="Training steps.")] = 1000,
    batch_size: Annotated[int, typer.Option(help="Sequences in a step.")] = 8,
    sequence_length: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 512,
    learning_rate: Annotated[float, typer.Option(help="Relative to the size of what is trained.")] = 2e-3,
    norms: Annotated[bool, typer.Option(help="Train the norms' weights too.")] = True,
    codes: Annotated[float, typer.Option(
        help="Let codes move: how many levels chance alone would carry one; 0: they stay. 0.2 serves well, in runs "
             "short and long; it takes 20 bytes of memory more for each weight.")] = 0.0,
    written: Annotated[int, typer.Option(
        help="Windows in which the teacher goes on from what the texts begin; for runs that see the texts many times.")] = 0,
    conversations: Annotated[int, typer.Option(
        help="Windows of talk that the teacher writes with itself, beside the texts; keeps a chat model talking.")] = 0,
    check_every: Annotated[int, typer.Option(
        help="Steps between tries on held-out text; state is saved there.")] = 100,
    seed: Annotated[int, typer.Option(help="The same seed gives the same order of texts.")] = 0,
    as_json: AsJson = False,
):
    """Train a quantised model's scales, and gates of repeated blocks, on the original's predictions.

    A killed run goes on where it was. The result is never worse on held-out text than DIR.
    """
    from mlxquant.tuning.distill import Schedule
    from mlxquant.tuning.tune import tune as run

    schedule = Schedule(steps, batch_size, learning_rate, check_every)
    with progress("tuning, divergence in nats:") as advance:
        result = run(model, output, teacher=teacher, data=data, schedule=schedule,
                     sequence_length=sequence_length, norms=norms, codes=codes, written=written, conversations=conversations,
                     seed=seed, progress=advance,
                     writing=lambda done, total, kind: advance(done, total, None, f"{kind} by the teacher, windows:"))
    if as_json:
        print_json({"folder": str(output), "divergence_before": result.divergence_before,
                    "divergence_after": result.divergence_after, "seconds": result.seconds,
                    "peak_memory_gb": result.peak_memory / 1e9})
        return
    print(f"{output}: divergence on held-out text {result.divergence_before:.4f} → "
          f"{result.divergence_after:.4f} nats per token, {result.seconds:.0f} s, peak {result.peak_memory / 1e9:.2f} GB")
