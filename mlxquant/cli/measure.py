"""Verbs that measure models by running them: bench, evaluate, compare; and the machine: probe."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Context, Option

from mlxquant.base.errors import BadValue, MlxquantError
from mlxquant.cli import options as option
from mlxquant.cli.common import (
    app,
    load_model,
    print_json,
    print_table,
    progress,
    refuse,
    remark,
)

if TYPE_CHECKING:
    from mlxquant.report.tasks import BuiltTask, Score


@app.command(epilog="Example: mlxquant bench smollm2-135m -p 512 -n 128 -r 5 -o result.json "
                    "--format json")
def bench(
    ctx: Context,
    models: Annotated[list[str], Argument(metavar="MODEL...", help=option.MODEL_HELP)],
    prompt: Annotated[int, Option("-p", "--prompt", help="Prompt tokens; 0: no such test.")] = 512,
    generated: Annotated[int, Option(
        "-n", "--generate", help="Generated tokens; 0: no such test.")] = 128,
    repetitions: Annotated[int, Option("-r", "--repetitions", help="Runs of each test.")] = 5,
    depth: Annotated[list[int] | None, Option(
        "-d", "--depth", help="Tokens in the context beforehand; repeatable. Default: 0.")] = None,
    batch: Annotated[list[int] | None, Option(
        "-b", "--batch", help="Sequences at once; repeatable. Default: 1.")] = None,
    form: Annotated[str, Option("--format", help="md, json, jsonl or csv.")] = "md",
    output: Annotated[Path | None, Option(
        "-o", "--output", help="Write there; a table is still shown.")] = None,
    plot: Annotated[Path | None, Option(help="Draw the roofline into a .png or .svg file.")] = None,
    chip: option.Chip = None, memory: option.Memory = None,
    as_json: Annotated[bool, Option("--json", help="The same as --format json.")] = False,
) -> None:
    """Tokens per second against the ceiling, by llama-bench's conventions.

    Ctrl-C ends early and keeps what was measured. With --chip nothing runs here: the speed there is
    predicted, from a configuration alone; --depth, --output and the formats md and json are for
    predictions too.
    """
    from mlxquant.machine import chips
    from mlxquant.report import bench_output
    from mlxquant.report.bench import Record
    from mlxquant.report.bench import bench as run
    from mlxquant.report.figure import check_plot
    from mlxquant.runtime.probe import measured

    if as_json:
        refuse(ctx, "and --json exclude each other", "form")
        form = "json"
    if form not in bench_output.FORMATS:
        raise BadValue(f"format is {form!r}, allowed are {', '.join(bench_output.FORMATS)}")
    check_plot(plot)
    if chip is not None:
        refuse(ctx, "is for measuring; with --chip nothing runs", "prompt", "generated",
               "repetitions", "batch", "plot", "memory")
        _predict(models, chip, depth or [0], form, output)
        return
    records: list[Record] = []

    def keep(known: list[Record]) -> None:
        records[:] = known
        if output is not None:
            _write(output, bench_output.FORMATS[form](records))

    try:
        with progress("tokens/s") as advance:
            run(models, prompt=prompt, generated=generated, depths=depth or (0,),
                batches=batch or (1,), repetitions=repetitions, memory=memory, on_record=keep,
                progress=advance)
    finally:
        if records:
            print(bench_output.FORMATS["md" if output is not None else form](records))
            if plot is not None:
                bench_output.plot(records, chips.detect(), measured().product_tflops, plot)


def _write(output: Path, text: str) -> None:
    from mlxquant.base.storage import new_file

    with new_file(output) as scratch:
        scratch.write_text(text + "\n", encoding="utf-8")


def _predict(models: list[str], chip: str, depths: list[int], form: str,
             output: Path | None) -> None:
    from mlxquant.base.storage import json_text
    from mlxquant.machine import chips as known
    from mlxquant.report.plan import predict_model
    from mlxquant.sources.names import config_of

    if form not in ("md", "json"):
        raise BadValue(f"format is {form!r}, allowed with --chip are md and json")
    found = known.find(chip)
    predicted = {(model, depth): predict_model(config_of(model), found, depth)
                 for model in models for depth in depths}
    rows = [{"model": model, "depth": depth, "predicted": True, **asdict(value)}
            for (model, depth), value in predicted.items()]
    lines = "\n".join(
        f"{model} @ d{depth} on {found.label}: {value.bytes_per_token / 1e9:.2f} GB/token; "
        f"{value.line()}" for (model, depth), value in predicted.items())
    if output is not None:
        _write(output, json_text(rows).rstrip() if form == "json" else lines)
    elif form == "json":
        print_json(rows)
        return
    print(lines)
    remark("Assumed:")
    for line in next(iter(predicted.values())).assumptions:
        remark(f"- {line}")


def _prepared(tasks: list[str] | None, questions: int | None) -> "list[BuiltTask]":
    """What ``--tasks`` names, ready to be asked."""
    if not tasks:
        if questions is not None:
            raise BadValue("--questions needs --tasks")
        return []
    try:
        from mlxquant.report.tasks import prepare
    except ModuleNotFoundError as error:
        raise MlxquantError("--tasks needs lm-eval: pip install 'mlxquant[tasks]' "
                            f"({error.name} is missing)") from error
    return prepare(tasks, questions)


@app.command(epilog="Example: mlxquant evaluate smollm2-135m --text wikitext2-raw-test.txt "
                    "--windows 40")
def evaluate(
    ctx: Context, model: option.Model,
    text: Annotated[Path | None, Option(help="A UTF-8 text file, for the perplexity.")] = None,
    context: option.Context = 1024, windows: option.Windows = None,
    tasks: option.Tasks = None, questions: option.Questions = None,
    reference: Annotated[str | None, Option(
        metavar="MODEL", help="Also the divergence from this model, the unquantised one, and how "
                              "often the answers are its own.")] = None,
    layerwise: Annotated[bool, Option(
        "--by-layer", help="Instead, the hidden state's error after every block.")] = False,
    plot: Annotated[Path | None, Option(
        metavar="FILE", help="Draw --by-layer into a .png or .svg file.")] = None,
    revision: option.Revision = None, memory: option.Memory = None,
    trust_remote_code: option.Trust = False, as_json: option.AsJson = False,
) -> None:
    """Perplexity on a text, accuracy on tasks, and how far both are from a reference model's."""
    from mlxquant.report import by_layer, divergence, perplexity
    from mlxquant.report.figure import check_plot

    if text is None and not tasks:
        raise BadValue("nothing to evaluate on; give --text, or --tasks, or both")
    if text is not None and not text.is_file():
        raise MlxquantError(f"no such file: {text}")
    if layerwise and (reference is None or text is None or tasks):
        raise BadValue("--by-layer needs --reference and --text, and goes without --tasks")
    if plot is not None and not layerwise:
        raise BadValue("--plot needs --by-layer")
    if text is None:
        refuse(ctx, "needs --text", "context", "windows")
    check_plot(plot)
    asked = _prepared(tasks, questions)
    models = [load_model(model, revision, memory, trust_remote_code, probe=False)]
    if reference is not None:
        models.append(load_model(reference, None, memory, trust_remote_code, probe=False))
    title = "perplexity"
    measure: Callable[..., Any] = perplexity.evaluate
    if reference is not None:
        title, measure = ("relative error", by_layer.by_layer) if layerwise else (
            "KL divergence", divergence.divergence)
    result: Any = None
    scores: list[Score] = []
    try:
        if text is not None:
            with progress(title) as advance:
                result = measure(*models, text, context=context, windows=windows, progress=advance)
        for task in asked:
            with progress(f"{task.name}, answers:") as advance:
                own, *original = [task.answered(each, advance) for each in models]
            scores.append(own.score(*original))
    finally:
        _print_found(result, scores, as_json)
    if plot is not None:
        by_layer.plot(result, plot)


def _print_found(result: Any, scores: "list[Score]", as_json: bool) -> None:
    """What ``evaluate`` measured before it ended: the errors by layer, or what is known of a text
    (None: nothing) and the scores of tasks."""
    from mlxquant.report import by_layer

    if isinstance(result, list):
        print_json([*map(asdict, result)]) if as_json else print_table(by_layer.table(result))
    elif as_json and (result or scores):
        print_json((asdict(result) if result else {}) | (
            {"tasks": [*map(asdict, scores)]} if scores else {}))
    else:
        for each in [result, *scores] if result else scores:
            print(each.line())


@app.command(epilog="Example: mlxquant compare smollm2-135m --text test.txt --data train.txt "
                    "--bits 4 --bits 2")
def compare(
    model: option.Model,
    text: Annotated[Path, Option(help="A UTF-8 text to evaluate on, apart from --data.")],
    methods: Annotated[str, Option(help="Comma-separated.")] = "rtn,awq,gptq,gptq-rotated",
    bits: Annotated[list[str] | None, Option(help="A width; repeatable. Default: 4, 3, 2.")] = None,
    group_size: option.GroupSize = 64, context: option.Context = 1024,
    windows: option.Windows = 40, tasks: option.Tasks = None, questions: option.Questions = None,
    plot: Annotated[Path | None, Option(help="Draw perplexity over bytes into this file.")] = None,
    data: option.Data = None, samples: option.Samples = 128, sequence_length: option.Length = 512,
    seed: option.ByteSeed = 0, as_json: option.AsJson = False,
) -> None:
    """The methods side by side on one model: quality, size, time and memory."""
    from mlxquant.codes.spec import Spec
    from mlxquant.codes.width import Width
    from mlxquant.quantise.job import Job, Text
    from mlxquant.report import comparison
    from mlxquant.report.figure import check_plot
    from mlxquant.report.made import check_apart

    if not text.is_file():
        raise MlxquantError(f"no such file: {text}")
    check_apart(text, data or ())
    check_plot(plot)
    evaluation = comparison.Evaluation(text, context, windows, _prepared(tasks, questions))
    job = Job(Spec(group_size=group_size), seed=seed,
              text=Text(tuple(data or ()), samples, sequence_length))
    names = [name.strip() for name in methods.split(",")]
    widths = [Width.of(width) for width in bits or ("4", "3", "2")]
    rows: list[comparison.ComparedRow] = []
    try:
        with progress("models compared:") as advance:
            for row in comparison.compare(model, evaluation, methods=names, bits=widths, job=job,
                                          progress=remark):
                rows.append(row)
                advance(len(rows), 1 + len(names) * len(widths), None)
    finally:
        if rows:
            print_json([*map(asdict, rows)]) if as_json else print_table(comparison.table(rows))
            if plot is not None:
                comparison.plot(rows, plot)


@app.command(epilog="Example: mlxquant probe --json")
def probe(
    refresh: Annotated[bool, Option(
        "--refresh", help="Measure again what is known already.")] = False,
    as_json: option.AsJson = False,
) -> None:
    """Measure how fast this machine reads memory, and how many replicas are free on it."""
    from mlxquant.machine import chips
    from mlxquant.runtime.probe import measured

    with progress("replicated layers, microseconds:") as advance:
        found = measured(refresh=refresh, replicas=True, progress=advance)
    if as_json:
        print_json(asdict(found))
        return
    ceiling, stated = found.ceiling, chips.detect().headline_gb_per_s
    share = f", {100 * ceiling.gb_per_s / stated:.0f} % of {stated:g} GB/s stated" if stated else ""
    print(f"{ceiling.chip}, MLX {ceiling.mlx}: reads {ceiling.gb_per_s:.1f} GB/s "
          f"(spread {100 * ceiling.spread:.0f} %{share}) by {ceiling.kernel}")
    for name, rate in sorted(found.readers.items(), key=lambda item: -item[1]):
        print(f"  {rate:8.1f} GB/s  {name}")
    print(f"Large matrix product: {found.product_tflops:.3g} TFLOP/s")
    if (limits := found.replicas) is None:
        return
    if limits.reason:
        print(f"Replicas: {limits.reason}")
    for bits, most in (limits.largest_replicas or {}).items():
        if most is not None:
            groups = ", ".join(f"{k} in groups of {g}" for k, g in
                               ((limits.smallest_group or {}).get(bits) or {}).items() if g)
            print(f"Free at {bits} bits: {most} replicas" + (f"; {groups}" if groups else ""))
