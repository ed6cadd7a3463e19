"""Verbs about speed: chips, probe, bench and plan."""

from pathlib import Path
from typing import Annotated, Optional

import typer

from mlxquant.cli.common import MODEL_HELP, AsJson, Memory, Revision, app, print_json, progress, remark
from mlxquant.errors import BadValue

ChipName = Annotated[Optional[str], typer.Option(
    "--chip", help="Predict for this chip, e.g. 'M1 Pro' or 'M3 Max 30c', in place of this machine.")]


@app.command(epilog="Example: mlxquant probe --json")
def probe(
    refresh: Annotated[bool, typer.Option("--refresh", help="Measure again what is known already.")] = False,
    as_json: AsJson = False,
):
    """Measure how fast this machine reads memory, and how many replicas are free on it."""
    from mlxquant.roofline import chips
    from mlxquant.roofline.probe import measured

    with progress("replicated layers, microseconds:") as advance:
        found = measured(refresh=refresh, replicas=True, progress=advance)
    if as_json:
        print_json(found.as_dict())
        return
    ceiling, stated = found.ceiling, chips.detect().headline_gb_per_s
    share = f", {100 * ceiling.gb_per_s / stated:.0f} % of {stated:g} GB/s stated" if stated else ""
    print(f"{ceiling.chip}, MLX {ceiling.mlx}: reads {ceiling.gb_per_s:.1f} GB/s "
          f"(spread {100 * ceiling.spread:.0f} %{share}) by {ceiling.kernel}")
    for name, rate in sorted(found.readers.items(), key=lambda item: -item[1]):
        print(f"  {rate:8.1f} GB/s  {name}")
    print(f"Large matrix product: {found.product_tflops:.3g} TFLOP/s")
    limits = found.replicas
    if limits.reason:
        print(f"Replicas: {limits.reason}")
    for bits, most in (limits.largest_replicas or {}).items():
        if most is not None:
            groups = ", ".join(f"{k} in groups of {g}" for k, g in limits.smallest_group[bits].items() if g)
            print(f"Free at {bits} bits: {most} replicas" + (f"; {groups}" if groups else ""))


@app.command(epilog="Example: mlxquant bench smollm2-135m -p 512 -n 128 -r 5 -o result.json --format json")
def bench(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help=MODEL_HELP)],
    prompt: Annotated[int, typer.Option("-p", "--prompt", help="Prompt tokens; 0: no such test.")] = 512,
    generated: Annotated[int, typer.Option("-n", "--generate", help="Generated tokens; 0: no such test.")] = 128,
    repetitions: Annotated[int, typer.Option("-r", "--repetitions", help="Runs of each test.")] = 5,
    depth: Annotated[Optional[list[int]], typer.Option(
        "-d", "--depth", help="Tokens in the context beforehand; repeatable. Default: 0.")] = None,
    batch: Annotated[Optional[list[int]], typer.Option(
        "-b", "--batch", help="Sequences at once; repeatable. Default: 1.")] = None,
    form: Annotated[str, typer.Option("--format", help="md, json, jsonl or csv.")] = "md",
    output: Annotated[Optional[Path], typer.Option("-o", "--output", help="Write there; a table is still shown.")] = None,
    plot: Annotated[Optional[Path], typer.Option(help="Draw the roofline into a .png or .svg file.")] = None,
    memory: Memory = None,
):
    """Tokens per second against the ceiling, by llama-bench's conventions.

    Ctrl-C ends early and keeps what was measured.
    """
    from mlxquant.evaluation.by_layer import check_plot
    from mlxquant.roofline import bench_output, chips
    from mlxquant.roofline.bench import bench as run
    from mlxquant.roofline.probe import measured
    from mlxquant.storage import new_file

    if form not in bench_output.FORMATS:
        raise BadValue(f"format is {form!r}, allowed are {', '.join(bench_output.FORMATS)}")
    if plot is not None:
        check_plot(plot)
    records = []

    def keep(known: list) -> None:
        records[:] = known
        if output is not None:
            with new_file(output) as scratch:
                scratch.write_text(bench_output.FORMATS[form](records) + "\n", encoding="utf-8")

    try:
        with progress("tokens/s") as advance:
            run(models, prompt=prompt, generated=generated, depths=depth or (0,), batches=batch or (1,),
                repetitions=repetitions, memory=memory, on_record=keep, progress=advance)
    finally:
        if records:
            print(bench_output.FORMATS["md" if output is not None else form](records))
            if plot is not None:
                bench_output.plot(records, chips.detect(), measured().product_tflops, plot)
