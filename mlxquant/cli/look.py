"""Verbs that describe models and machines without running a model: plan, inspect, chips, check."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from mlxquant.base.errors import BadValue
from mlxquant.base.text import clean
from mlxquant.cli import options as option
from mlxquant.cli.common import app, print_json, print_table, progress, remark

if TYPE_CHECKING:
    from mlxquant.report.plan import Plan, PlanRow


@app.command(epilog="Example: mlxquant plan Qwen/Qwen3-32B --chip 'M1 Pro' --context 8192")
def plan(
    model: Annotated[str | None, Argument(metavar="[MODEL]", help=option.MODEL_HELP)] = None,
    memory: Annotated[str | None, Option(help="The machine's memory, e.g. 16GB.")] = None,
    chip: option.Chip = None,
    context: Annotated[int, Option(help="Tokens that must fit with the model.")] = 8192,
    min_tps: Annotated[float, Option(help="Recommend nothing slower, in tokens/s.")] = 0.0,
    config: Annotated[Path | None, Option(help="A config.json in place of MODEL.")] = None,
    revision: option.Revision = None, as_json: option.AsJson = False,
) -> None:
    """What to make of a model for a machine: what fits, how fast, how good, and the command.

    Reads a configuration only; of a repository nothing else is downloaded.
    """
    from mlxquant.report.plan import plan as make

    if (model is None) == (config is None):
        raise BadValue("give MODEL or --config FILE, one of them")
    result = make(model or str(config), memory=memory, chip=chip, context=context,
                  min_tps=min_tps, revision=revision)
    if as_json:
        print_json(asdict(result))
        return
    active = ("" if result.active_parameters == result.parameters else
              f", {result.active_parameters / 1e9:.2f} of them for a token")
    print(f"{result.model}: {result.parameters / 1e9:.2f} billion parameters{active}, for "
          f"{result.machine} with {result.memory_bytes / 1e9:.1f} GB for a model and "
          f"{result.context:,} tokens, at the end of which speeds are\n")
    best: dict[tuple[Any, ...], PlanRow] = {}
    for row in result.rows:  # of each form the most bits of keys and values that fit, or the least
        key = row.method, row.bits, row.replicas, row.group
        if key not in best or (not best[key].fits and (
                row.fits or row.total_bytes < best[key].total_bytes)):
            best[key] = row
    head = ["form", "bits/weight", "KV bits", "file GB", "total GB", "fits", "tokens/s",
            "perplexity", "source"]
    print_table([head, *map(_plan_line, best.values())], left=(0, 8))
    for line in result.remarks:
        remark(f"Assumed: {line}")
    print(f"\nRecommended: {_recommendation(result)}")


def _plan_line(row: "PlanRow") -> list[str]:
    quality, source = ("", "not measured") if row.quality is None else (
        f"× {row.quality:.2f}", row.quality_source or "")
    slower = "" if row.free_replicas is not False else ", replicas not free"
    return [row.label(), f"{row.bits_per_weight:.2f}", str(row.kv_bits),
            f"{row.file_bytes / 1e9:.2f}", f"{row.total_bytes / 1e9:.2f}",
            "yes" if row.fits else "no", "" if row.tps is None else f"{row.tps:.1f}{slower}",
            quality, source]


def _recommendation(result: "Plan") -> str:
    """What to make and the command for it, or why nothing is recommended."""
    row = result.recommended
    if row is None:
        smallest = min(row.total_bytes for row in result.rows)
        return (f"none. The smallest form takes {smallest / 1e9:.1f} GB; a form is recommended "
                "only if it fits, is fast enough and its quality was measured")
    speed = f", {row.tps:.1f} tokens/s ({row.tps_source})" if row.tps else ""
    kv = "16-bit" if row.kv_bits == 16 else (
        f"{row.kv_bits}-bit (their cost in quality is not measured)")
    return (f"{row.label()} with {kv} keys and values: {row.total_bytes / 1e9:.1f} GB{speed}, "
            f"perplexity × {row.quality:.2f} ({row.quality_source})\n"
            f"{row.command or f'mlxquant chat {result.model}'}")


@app.command(epilog="Example: mlxquant inspect smollm2-135m")
def inspect(model: option.Model, revision: option.Revision = None,
            as_json: option.AsJson = False) -> None:
    """Show a model's formats, size and bytes read per token."""
    from mlxquant.model.inspection import gain_line
    from mlxquant.model.inspection import inspect as look

    result = look(model, revision=revision)
    if as_json:
        print_json(asdict(result))
        return
    print_table([["layer", "format", "bits", "shape", "MB"], *(
        [layer.path, layer.format, str(layer.bits), "×".join(map(str, layer.shape)),
         f"{layer.bytes / 1e6:.2f}"] for layer in result.layers)], left=(0, 1))
    active = ("" if result.active_parameters == result.parameters else
              f", {result.active_parameters / 1e6:.1f} M for a token")
    print(f"{clean(result.architecture)}, {result.parameters / 1e6:.1f} M parameters{active} · "
          f"{result.bits_per_weight:.2f} bits per weight of the body · "
          f"{result.file_bytes / 1e6:.1f} MB on disk\n"
          f"reads {result.bytes_per_token / 1e6:.1f} MB of weights per token "
          f"({result.bytes_per_token_cpu / 1e6:.1f} MB as dense float32 on a plain CPU)")
    if result.untraceable:
        print("each layer is quantised, and on a GPU run, by itself: the network "
              f"cannot be traced: {clean(result.untraceable)}")
    if result.tuned_blocks:
        print(f"tuned: {gain_line(result.tuned_blocks)}")
    if result.making:
        print(f"\n{clean(_making(result.making))}")


def _making(record: dict[str, Any]) -> str:
    """What making a folder took, step by step."""
    seconds, peaks = dict(record["seconds"]), dict(record["peak_memory_gb"])
    total, most = seconds.pop("total"), peaks.pop("total")
    steps = ", ".join(f"{name} {took:.1f}" for name, took in seconds.items() if took >= 0.05)
    where = max(peaks, key=lambda name: peaks[name])
    runs = f" in {record['runs']} runs" if record["runs"] > 1 else ""
    return (f"made in {total:.1f} s{runs}; seconds by step: {steps}\n"
            f"peaks: {most:.2f} GB of MLX's memory ({where}), {record['host_peak_gb']:.2f} GB "
            "resident")


@app.command(epilog="Example: mlxquant chips --backtest")
def chips(
    backtest: Annotated[bool, Option(
        "--backtest",
        help="Instead, how well published speeds are predicted from other chips' speeds.")] = False,
    lanes: Annotated[bool, Option(
        "--lanes",
        help="Instead, the replicas predicted to be free, from counted operations.")] = False,
    as_json: option.AsJson = False,
) -> None:
    """This machine's chip and all that are known, each figure with the mark of its source."""
    if backtest:
        _backtest(as_json)
    elif lanes:
        _lanes(as_json)
    else:
        _chips(as_json)


def _chips(as_json: bool) -> None:
    from mlxquant.machine import chips as known
    from mlxquant.machine.chips import MARKS

    here = known.detect()
    if as_json:
        print_json({"here": asdict(here), "chips": [asdict(chip) for chip in known.every()],
                    "marks": MARKS})
        return
    stated = here.headline_gb_per_s
    print(f"Here: {here.label}, "
          f"{f'{stated:g} GB/s stated' if stated else 'unknown: measured ceiling only'}\n")
    figures = {"GB/s": "headline_gb_per_s", "FP32 TFLOP/s": "fp32_tflops",
               "clock GHz": "clock_ghz", "memory GB": "max_memory_gb", "cache MB": "slc_mb"}
    print_table([["chip", *figures], *(
        [chip.label, *("?" if (value := getattr(chip, key)) is None
                       else f"{value:.4g} {chip.sources[key]}" for key in figures.values())]
        for chip in known.every())])
    print("\n" + "; ".join(f"{mark}: {meaning}" for mark, meaning in MARKS.items()))


def _backtest(as_json: bool) -> None:
    from mlxquant.report import lanes, predict

    summary = predict.backtest_summary()
    if as_json:
        print_json({"families": summary, "runs": predict.backtest(), "products": lanes.check()})
        return
    for row in summary:
        print(f"{row['chips']:10} {row['runs']:3} runs: "
              f"median error {100 * row['median_error']:4.1f} %, "
              f"worst {100 * row['worst_error']:+5.1f} % ({row['worst_run']})")
    print("Each chip predicted from the published runs of all others. "
          f"Lane-operations: {lanes.check_line()}")


def _lanes(as_json: bool) -> None:
    from mlxquant.machine import chips
    from mlxquant.report import lanes

    widths = (1, 2, 3, 4)
    found = {chip.label: {str(bits): lanes.free_replicas(chip, bits) for bits in widths}
             for chip in chips.every() if chip.lane_operations_per_s}
    if as_json:
        print_json({label: {bits: {"largest_replicas": most, "smallest_group": groups}
                            for bits, (most, groups) in row.items()}
                    for label, row in found.items()})
        return

    def free(most: int, groups: dict[str, int | None]) -> str:
        shared = ", ".join(f"{k} in {g}s" for k, g in groups.items() if g and int(k) >= 4)
        return f"{most}; {shared}" if shared else str(most)

    print_table([["predicted", *(f"{bits} bit" for bits in widths)],
                 *([label, *(free(*limits) for limits in row.values())]
                   for label, row in found.items())])
    remark("A prediction: replicas that cost at most 5 % more than one, and groups with which "
           "4, 8 and 16 do.")
    for line in (*lanes.ASSUMPTIONS, lanes.check_line()):
        remark(f"- {line}")


@app.command(epilog="Example: mlxquant check")
def check(as_json: option.AsJson = False) -> None:
    """Hold every GPU kernel against its reference on this machine."""
    from mlxquant.kernels.check import comparisons, pending

    total, found = len(pending()), []
    with progress("kernels") as advance:
        for outcome in comparisons():
            found.append(outcome)
            advance(len(found), total, outcome.error or 0.0)
    if as_json:
        print_json([asdict(outcome) | {"passed": outcome.passed} for outcome in found])
    elif not total:
        print("no GPU here: layers run as plain operations, which are the kernels' reference")
    else:
        print_table([["kernel", "case", "error", "allowed", ""], *(
            [outcome.kernel, outcome.case,
             "" if outcome.error is None else f"{outcome.error:.1e}", f"{outcome.allowed:.0e}",
             "agrees" if outcome.passed else outcome.complaint or "DISAGREES"]
            for outcome in found)], left=(0, 1, 4))
    if not all(outcome.passed for outcome in found):
        raise typer.Exit(1)
