"""Verbs about speed: chips, probe, bench and plan."""

from pathlib import Path
from typing import Annotated

import typer

from mlxquant.base.errors import BadValue
from mlxquant.cli.common import (
    MODEL_HELP,
    AsJson,
    Memory,
    Revision,
    app,
    print_json,
    progress,
    remark,
)

ChipName = Annotated[str | None, typer.Option(
    "--chip", help="Predict for this chip, e.g. 'M1 Pro' or 'M3 Max 30c', in place of this machine.")]


@app.command(epilog="Example: mlxquant chips --backtest")
def chips(
    backtest: Annotated[bool, typer.Option(
        "--backtest", help="Instead, how well published speeds are predicted from those of other chips.")] = False,
    lanes: Annotated[bool, typer.Option(
        "--lanes", help="Instead, the replicas predicted to be free, from counted operations.")] = False,
    as_json: AsJson = False,
):
    """This machine's chip and all that are known, each figure with the mark of its source."""
    from dataclasses import asdict

    from mlxquant.machine import chips as known
    from mlxquant.machine import lanes as operations
    from mlxquant.machine.chip_table import MARKS
    from mlxquant.report import predict

    if backtest:
        summary = predict.backtest_summary()
        if as_json:
            print_json({"families": summary, "runs": predict.backtest(), "products": operations.check()})
            return
        for row in summary:
            print(f"{row['chips']:10} {row['runs']:3} runs: median error {100 * row['median_error']:4.1f} %, "
                  f"worst {100 * row['worst_error']:+5.1f} % ({row['worst_run']})")
        print("Each chip predicted from the published runs of all others. "
              f"Lane-operations: {operations.check_line()}")
        return
    if lanes:
        found = {chip.label: {str(bits): operations.free_replicas(chip, bits) for bits in (1, 2, 3, 4)}
                 for chip in known.every() if chip.lane_operations_per_s}
        if as_json:
            print_json({label: {bits: {"largest_replicas": most, "smallest_group": groups}
                                for bits, (most, groups) in widths.items()} for label, widths in found.items()})
            return
        _print_table(["predicted", *(f"{bits} bit" for bits in (1, 2, 3, 4))],
                     [[label, *(_free(*free) for free in widths.values())] for label, widths in found.items()])
        remark("A prediction: replicas that cost at most 5 % more than one, and groups with which 4, 8 and 16 do.\n"
               + "\n".join(f"- {line}" for line in operations.ASSUMPTIONS) + f"\n- {operations.check_line()}")
        return
    here = known.detect()
    if as_json:
        print_json({"here": asdict(here), "chips": [asdict(chip) for chip in known.every()], "marks": MARKS})
        return
    stated = here.headline_gb_per_s
    print(f"Here: {here.label}, {f'{stated:g} GB/s stated' if stated else 'unknown: measured ceiling only'}\n")
    figures = {"GB/s": "headline_gb_per_s", "FP32 TFLOP/s": "fp32_tflops", "clock GHz": "clock_ghz",
               "memory GB": "max_memory_gb", "cache MB": "slc_mb"}
    _print_table(["chip", *figures], [[chip.label, *(_figure(chip, key) for key in figures.values())]
                                      for chip in known.every()])
    print("\n" + "; ".join(f"{mark}: {meaning}" for mark, meaning in MARKS.items()))


def _figure(chip, key: str) -> str:
    value = getattr(chip, key)
    return "?" if value is None else f"{value:.4g} {chip.sources[key]}"


def _free(most: int, groups: dict) -> str:
    parts = [f"{k} in {g}s" for k, g in groups.items() if g and int(k) >= 4]
    return f"{most}" + (f"; {', '.join(parts)}" if parts else "")


def _print_table(head: list[str], rows: list[list[str]], left: tuple[int, ...] = (0,)) -> None:
    """Columns wide enough for everything: a speed that is cut short is no speed."""
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    for row in [head, *rows]:
        cells = [cell.ljust(width) if i in left else cell.rjust(width)
                 for i, (cell, width) in enumerate(zip(row, widths))]
        print("  ".join(cells).rstrip())


@app.command(epilog="Example: mlxquant probe --json")
def probe(
    refresh: Annotated[bool, typer.Option("--refresh", help="Measure again what is known already.")] = False,
    as_json: AsJson = False,
):
    """Measure how fast this machine reads memory, and how many replicas are free on it."""
    from mlxquant.machine import chips
    from mlxquant.runtime.probe import measured

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
    depth: Annotated[list[int] | None, typer.Option(
        "-d", "--depth", help="Tokens in the context beforehand; repeatable. Default: 0.")] = None,
    batch: Annotated[list[int] | None, typer.Option(
        "-b", "--batch", help="Sequences at once; repeatable. Default: 1.")] = None,
    form: Annotated[str, typer.Option("--format", help="md, json, jsonl or csv.")] = "md",
    output: Annotated[Path | None, typer.Option(
        "-o", "--output", help="Write there; a table is still shown.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the roofline into a .png or .svg file.")] = None,
    chip: ChipName = None, memory: Memory = None,
):
    """Tokens per second against the ceiling, by llama-bench's conventions.

    Ctrl-C ends early and keeps what was measured. With --chip nothing runs here: the speed there is
    predicted, from a configuration alone.
    """
    from mlxquant.base.storage import new_file
    from mlxquant.machine import chips
    from mlxquant.report import bench_output
    from mlxquant.report.bench import bench as run
    from mlxquant.report.by_layer import check_plot
    from mlxquant.runtime.probe import measured

    if form not in bench_output.FORMATS:
        raise BadValue(f"format is {form!r}, allowed are {', '.join(bench_output.FORMATS)}")
    if plot is not None:
        check_plot(plot)
    if chip is not None:
        _predict(models, chip, depth or [0], form, output)
        return
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


def _predict(models: list[str], chip: str, depths: list[int], form: str, output: Path | None) -> None:
    from mlxquant.base.storage import write_json
    from mlxquant.machine import chips as known
    from mlxquant.report.plan import predict_model
    from mlxquant.sources.names import config_of

    if form not in ("md", "json"):
        raise BadValue(f"format is {form!r}, allowed with --chip are md and json")
    found = known.find(chip)
    predicted = {(model, depth): predict_model(config_of(model), found, depth)
                 for model in models for depth in depths}
    rows = [{"model": model, "depth": depth, "predicted": True, **value.as_dict()}
            for (model, depth), value in predicted.items()]
    if output is not None:
        write_json(output, rows)
    elif form == "json":
        print_json(rows)
        return
    for (model, depth), value in predicted.items():
        print(f"{model} @ d{depth} on {found.label}: {value.bytes_per_token / 1e9:.2f} GB/token; {value.line()}")
    remark("Assumed:\n" + "\n".join(f"- {line}" for line in next(iter(predicted.values())).assumptions))


@app.command(epilog="Example: mlxquant plan Qwen/Qwen3-32B --chip 'M1 Pro' --context 8192")
def plan(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help=MODEL_HELP)] = None,
    memory: Annotated[str | None, typer.Option(help="The machine's memory, e.g. 16GB.")] = None,
    chip: ChipName = None,
    context: Annotated[int, typer.Option(help="Tokens that must fit with the model.")] = 8192,
    min_tps: Annotated[float, typer.Option(help="Recommend nothing slower, in tokens/s.")] = 0.0,
    config: Annotated[Path | None, typer.Option(help="A config.json in place of MODEL.")] = None,
    revision: Revision = None, as_json: AsJson = False,
):
    """What to make of a model for a machine: what fits, how fast, how good, and the command.

    Reads a configuration only; of a repository nothing else is downloaded.
    """
    from mlxquant.report.plan import plan as make

    if (model is None) == (config is None):
        raise BadValue("give MODEL or --config FILE, one of them")
    result = make(model or str(config), memory=memory, chip=chip, context=context, min_tps=min_tps,
                  revision=revision)
    if as_json:
        print_json(result.as_dict())
        return
    print(f"{result.model}: {result.parameters / 1e9:.2f} billion parameters, for {result.machine} with "
          f"{result.memory_bytes / 1e9:.1f} GB for a model and {result.context:,} tokens, "
          "at the end of which speeds are\n")
    best = {}
    for row in result.rows:  # of each form the most bits of keys and values that fit, else the fewest
        key = row.method, row.bits, row.replicas, row.group
        if key not in best or not best[key].fits:
            best[key] = row
    head = ["form", "bits/weight", "KV bits", "file GB", "total GB", "fits", "tokens/s", "perplexity", "source"]
    _print_table(head, [_plan_line(row) for row in best.values()], left=(0, 8))
    for line in result.remarks:
        remark(f"Assumed: {line}")
    row = result.recommended
    if row is None:
        smallest = min(result.rows, key=lambda r: r.total_bytes)
        print(f"\nRecommended: none. The smallest form takes {smallest.total_bytes / 1e9:.1f} GB; "
              "a form is recommended only if it fits, is fast enough and its quality was measured")
        return
    speed = f", {row.tps:.1f} tokens/s ({row.tps_source})" if row.tps else ""
    kv = "16-bit" if row.kv_bits == 16 else f"{row.kv_bits}-bit (their cost in quality is not measured)"
    print(f"\nRecommended: {_form(row)} with {kv} keys and values: {row.total_bytes / 1e9:.1f} GB{speed}, "
          f"perplexity × {row.quality:.2f} ({row.quality_source})")
    print(row.command or f"mlxquant chat {result.model}")


def _form(row) -> str:
    if row.replicas:
        width = row.bits if row.bits == "ternary" else f"{row.bits} bit"
        stored = "as stored " if row.method == "as stored" else ""
        return f"{stored}{width}, K={row.replicas}" + (f" G={row.group}" if row.group else "")
    group = f", groups of {row.group}" if row.group else ""
    return f"{row.method if row.method != 'affine' else ''} {row.bits} bit{group}".strip()


def _plan_line(row) -> list[str]:
    quality = ("", "not measured") if row.quality is None else (f"× {row.quality:.2f}", row.quality_source)
    slower = "" if row.free_replicas is not False else ", replicas not free"
    return [_form(row), f"{row.bits_per_weight:.2f}", str(row.kv_bits), f"{row.file_bytes / 1e9:.2f}",
            f"{row.total_bytes / 1e9:.2f}", "yes" if row.fits else "no",
            "" if row.tps is None else f"{row.tps:.1f}{slower}", *quality]
