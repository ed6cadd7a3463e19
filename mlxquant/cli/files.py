"""The verb that makes a model folder of a GGUF file."""

from pathlib import Path
from typing import Annotated

import typer

from mlxquant.base.errors import ModelNotFound
from mlxquant.cli.common import AsJson, app, print_json, progress


@app.command("import", epilog="Example: mlxquant import model-Q4_K_M.gguf -o model")
def import_gguf(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A .gguf file, or any part of a split one.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder to make.")],
    bits: Annotated[int | None, typer.Option(
        help="Width of types that MLX has no exact place for: 2, 3, 4, 5, 6, 8, or 16 to keep them as numbers. "
             "Default: the narrowest that holds their bits per weight.")] = None,
    as_json: AsJson = False,
):
    """Make a folder that mlx-lm can load of a GGUF file, and say what that rounded."""
    from mlxquant.sources.gguf import import_file

    if not file.is_file():
        raise ModelNotFound(f"no such file: {file}")
    with progress("importing, GB:") as advance:
        outcome = import_file(file, output, bits, advance)
    record, speed = outcome.record, outcome.bytes / outcome.seconds / 1e9
    if as_json:
        print_json({"folder": str(output), "bytes": outcome.bytes, "seconds": outcome.seconds, "gb_per_s": speed,
                    **record})
        return
    if record["rounded"]:
        _print_rounded(record["rounded"])
    exact = record["tensors"] - len(record["rounded"])
    print(f"{output}: {exact} of {record['tensors']} tensors exact"
          + (f", the others within a relative error of {record['error']:.1e}" if record["rounded"] else "")
          + f"; {outcome.bytes / 1e9:.2f} GB in {outcome.seconds:.1f} s, {speed:.2f} GB/s")


def _print_rounded(rounded: dict[str, dict]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("layer", "type", "stored as", "error", box=None)
    for path, r in rounded.items():
        if r["bits"] == 16:  # norms and the like, by the hundred
            continue
        how = "same codes, scales in float16" if r["repacked"] else f"{r['bits']} bits, groups of 32"
        table.add_row(path, r["type"], how, f"{r['error']:.1e}")
    Console().print(table)
