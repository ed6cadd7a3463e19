"""Verbs that make a model folder of another: tune and import; ``quantize.py`` has the third."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from mlxquant.base.errors import ModelNotFound
from mlxquant.cli import options as option
from mlxquant.cli.common import app, print_json, print_table, progress


@app.command(epilog="Example: mlxquant tune small -o tuned --teacher smollm2-135m "
                    "--data text.txt --steps 300")
def tune(
    model: Annotated[str, Argument(metavar="DIR", help="A folder that quantize made.")],
    output: option.NewFolder,
    teacher: Annotated[str, Option(
        help="The original: a folder, a .gguf file, a repository, a recipe.")],
    data: Annotated[list[str], Option(
        help="Text to train on: a file or hf://datasets/OWNER/NAME/FILE; repeatable.")],
    steps: Annotated[int, Option(help="Training steps.")] = 1000,
    batch_size: Annotated[int | None, Option(
        help="Sequences in a step; default: 8 on a GPU, 2 without one.")] = None,
    sequence_length: Annotated[int, Option(help="Tokens in a sequence.")] = 512,
    learning_rate: Annotated[float, Option(help="Relative to the size of what is trained.")] = 2e-3,
    norms: Annotated[bool, Option(help="Train the norms' weights too.")] = True,
    codes: Annotated[float, Option(
        help="Let codes move: how many levels chance alone would carry one; 0: they stay. "
             "0.2 serves well at 2 to 2.5 bits in 300 steps, of 1.5 billion weights in 600: of "
             "fewer each goes farther. 26 bytes of memory more for each weight."
        )] = 0.0,
    written: Annotated[int, Option(
        help="Windows in which the teacher goes on from what the texts begin; for runs that see "
             "the texts many times.")] = 0,
    conversations: Annotated[int, Option(
        help="Windows of talk that the teacher writes with itself, beside the texts; keeps a chat "
             "model talking.")] = 0,
    check_every: Annotated[int, Option(
        help="Steps between tries on held-out text; where it costs little, state is saved.")] = 100,
    seed: Annotated[int, Option(help="The same seed gives the same order of texts.")] = 0,
    as_json: option.AsJson = False,
) -> None:
    """Train a quantised model's scales, and repeated blocks' gates, on the original's predictions.

    A killed run goes on at the last state that it kept. The result is never worse on held-out text
    than DIR.
    """
    from mlxquant.tuning.settings import Schedule, Tuning
    from mlxquant.tuning.tune import tune as run

    batch = {} if batch_size is None else {"batch_size": batch_size}
    schedule = Schedule(steps, learning_rate=learning_rate, check_every=check_every, **batch)
    tuning = Tuning(teacher, data, schedule, sequence_length, norms=norms, codes=codes,
                    written=written, conversations=conversations, seed=seed)
    with progress("tuning, divergence in nats:") as advance:
        result = run(
            model, output, tuning, progress=advance,
            writing=lambda done, total, kind: advance(
                done, total, None, f"{kind} by the teacher, windows:"))
    if as_json:
        print_json({"folder": str(output), "divergence_before": result.divergence_before,
                    "divergence_after": result.divergence_after, "seconds": result.seconds,
                    "peak_memory_gb": result.peak_memory / 1e9})
        return
    print(f"{output}: divergence on held-out text {result.divergence_before:.4f} → "
          f"{result.divergence_after:.4f} nats per token, {result.seconds:.0f} s, "
          f"peak {result.peak_memory / 1e9:.2f} GB")


@app.command("import", epilog="Example: mlxquant import model-Q4_K_M.gguf -o model")
def import_gguf(
    file: Annotated[Path, Argument(
        metavar="FILE", help="A .gguf file, or any part of a split one.")],
    output: option.NewFolder,
    bits: Annotated[int | None, Option(
        help="Width of types that MLX has no exact place for: 2, 3, 4, 5, 6, 8, or 16 to keep "
             "them as numbers. Default: the narrowest that holds their bits per weight.")] = None,
    as_json: option.AsJson = False,
) -> None:
    """Make a folder that mlx-lm can load of a GGUF file, and say what that rounded."""
    from mlxquant.sources.gguf import import_file

    if not file.is_file():
        raise ModelNotFound(f"no such file: {file}")
    with progress("importing, GB:") as advance:
        outcome = import_file(file, output, bits, advance)
    record, speed = outcome.record, outcome.bytes / outcome.seconds / 1e9
    if as_json:
        print_json({"folder": str(output), "bytes": outcome.bytes, "seconds": outcome.seconds,
                    "gb_per_s": speed, **record})
        return
    if rounded := record["rounded"]:
        print_table([["layer", "type", "stored as", "error"], *(
            [path, r["type"], "same codes, scales in float16" if r["repacked"]
             else f"{r['bits']} bits, groups of 32", f"{r['error']:.1e}"]
            for path, r in rounded.items() if r["bits"] != 16)], left=(0, 1, 2))  # 16: norms
    others = f", the others within a relative error of {record['error']:.1e}" if rounded else ""
    print(f"{output}: {record['tensors'] - len(rounded)} of {record['tensors']} tensors exact"
          f"{others}; {outcome.bytes / 1e9:.2f} GB in {outcome.seconds:.1f} s, {speed:.2f} GB/s")
