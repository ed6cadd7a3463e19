"""Rewrite the README's tables and plot from ``results/`` and ``literature.json``; ``--check`` only says
whether the tables are current.

    python benchmarks/readme.py [--check]
"""

import json
import re
import sys
from pathlib import Path

from record import RESULTS, read

from mlxquant.report import bench_output
from mlxquant.report.bench import Record
from mlxquant.report.comparison import Row, plot

README = Path(__file__).parents[1] / "README.md"
LITERATURE = Path(__file__).parent / "literature.json"

# Runs side by side on one host: their perplexities hold, their seconds do not.
SHARED_HOST = ("methods-h200-2", "methods-h200-3", "methods-h100-1")
# Made before GPTQ took active inputs first and refined its result, today's --no-act-order --refine 0,
# and with a rounding that no longer exists (see LOG.md).
EARLIER = tuple(f"methods-h200-{n}" for n in range(1, 6))
WIDTHS = [8, 4, 3, 2, "ternary", 1]
# How many times the original's perplexity a width may have to be called so.
VERDICTS = ((1.02, "no loss to speak of"), (1.1, "the default"), (1.5, "usable, with care"),
            (5, "needs tuning"), (float("inf"), "broken without training"))


def place(result: dict) -> str:
    """Where and with what a result was measured."""
    m = result["machine"]
    return (f"Measured {result['date']} on one {m['chip']} ({m['device']}, {m['cores']} cores), "
            f"MLX {m['mlx']}, mlx-lm {m['mlx_lm']}")


def default_model() -> str:
    r = read("default-model-cpu")
    prefill, decode, quality = r["prefill_512_tps"], r["decode_128_tps"], r["quality"]
    rate = r["bytes_per_token"] * decode["mean"] / 1e9
    return "\n".join([
        "| what | result |", "|---|---|",
        f"| prefill, 512 tokens | {prefill['mean']:.0f} ± {prefill['stdev']:.0f} tokens/s |",
        f"| decode, 128 tokens | {decode['mean']:.1f} ± {decode['stdev']:.1f} tokens/s, "
        f"{rate:.1f} GB/s = {100 * rate / r['ceiling_gb_per_s']:.0f} % of the "
        f"{r['ceiling_gb_per_s']:.1f} GB/s measured there |",
        f"| bytes read per token | {r['bytes_per_token'] / 1e6:.0f} MB (dense float32, KV cache included) |",
        f"| perplexity, `wt2-40` | {quality['perplexity']:.2f} at "
        f"{quality['bits_per_weight']:.2f} bits per weight, {quality['file_bytes'] / 1e6:.0f} MB on disk |",
        f"| peak memory | {r['peak_memory_gb']:.2f} GB |", "",
        f"{place(r)}: `{r['command']}`"])


def method_rows() -> list[dict]:
    """Every row of the methods' results, the latest of each method and width, best first in a width."""
    rows = {}
    for path in sorted([*RESULTS.glob("methods-*.json"), *RESULTS.glob("stock-*.json")]):
        on_gpu = read(path.stem)["machine"]["device"] == "gpu"
        for row in read(path.stem)["rows"]:
            method = row["method"]
            if method == "original" or (method == "rtn" and path.stem in EARLIER):
                continue
            if path.stem in SHARED_HOST or not on_gpu:
                row = row | {"seconds": None}
            if path.stem in EARLIER and method.startswith("gptq"):
                method = method.replace("gptq", "gptq-plain")
            rows[method, row["bits"]] = row | {"method": method}
    return sorted(rows.values(), key=lambda r: (WIDTHS.index(r["bits"]), r["perplexity"]))


def draw_methods() -> None:
    """Perplexity over whole-folder bytes of the rows that were saved as folders."""
    fields = Row.__dataclass_fields__
    drawn = [row for row in method_rows() if set(fields) <= set(row) and row["bits"] in (2, 3, 4)]
    plot([Row(**{name: row[name] for name in fields}) for row in drawn], RESULTS / "methods-h200.png")


def methods() -> str:
    lines = ["| width | method | bits/weight | perplexity | KL | same top token | seconds |",
             "|---|---|--:|--:|--:|--:|--:|"]
    for r in method_rows():
        seconds = "" if r["seconds"] is None else f"{r['seconds']:.0f}"
        lines.append(f"| {r['bits']} | {r['method']} | {r['bits_per_weight']:.2f} | "
                     f"{r['perplexity']:,.1f} | {r['kl_mean']:.3f} | {100 * r['top1_agreement']:.0f} % | "
                     f"{seconds} |")
    original = read("methods-h200-1")["rows"][0]["perplexity"]
    return "\n".join([*lines, "", f"The model itself: {original:.2f}. {place(read('methods-h200-6'))}. Rows without "
                      "seconds ran beside other work, on that GPU or an H100, or on a CPU: their perplexities compare, "
                      "their times do not."])


def widths() -> str:
    """Width, compression, loss and verdict: ours by the best calibrated method, the literature beside it."""
    original = read("methods-h200-1")["rows"][0]["perplexity"]
    published = json.loads(LITERATURE.read_text(encoding="utf-8"))["rows"]
    lines = ["| width | smaller than 16 bits | perplexity here | verdict here | Llama-2-7B, published by others |",
             "|---|--:|--:|---|---|"]
    for width in WIDTHS:
        ours = [row for row in method_rows()
                if row["bits"] == width and not row["method"].startswith("mlx-lm")]
        others = "; ".join(f"{row['method']} {row['perplexity']:,.{0 if row['perplexity'] > 1000 else 2}f}"
                           for row in published if row["bits"] == width)
        if not ours:
            lines.append(f"| {width} | | not measured | | {others} |")
            continue
        best = min(ours, key=lambda row: row["perplexity"])
        ratio = best["perplexity"] / original
        verdict = next(words for limit, words in VERDICTS if ratio <= limit)
        loss = f"+{100 * (ratio - 1):.1f} %" if ratio < 2 else f"{ratio:.1f} times"
        lines.append(f"| {width} | {16 / best['bits_per_weight']:.1f} × | {best['perplexity']:,.1f} ({loss}), "
                     f"{best['method']} | {verdict} | {others} |")
    papers = "; ".join(dict.fromkeys(row["paper"] for row in published if row["bits"] != 16))
    return "\n".join([*lines, "", "Here: SmolLM2-135M-Instruct, calibrated only, no tuning. There: WikiText-2, "
                      "context 2,048, where 16 bits score 5.47; not our measurements, but those of "
                      f"{papers}."])


STAGES = ("calibrated", "tuned")
COMPARED = 300  # steps of the rows that are compared with each other
CORRECTED = 19  # the first run in which Adam's bias was corrected; those before it are in LOG.md


def replica_runs() -> list[dict]:
    """The results of ``replicas.py`` that count, the oldest first."""
    numbered = {int(path.stem.split("-")[-1]): path.stem for path in RESULTS.glob("replicas-h*.json")}
    return [read(numbered[number]) for number in sorted(numbered) if number >= CORRECTED]


def replica_results() -> list[dict]:
    """Their rows, each with what was done to it (``STAGES``), named by what sets it apart from others of its plan."""
    found = []
    for row in (row for run in replica_runs() for row in run["rows"]):
        name = row["method"]
        if row["steps"] > COMPARED:
            name += f", {row['steps']:,} steps"
        if row.get("conversations"):
            name += ", conversations"
        if row["tuned"] and not row["codes"]:
            name += ", scales alone"
        found.append(row | {"method": name, "stage": STAGES[row["tuned"]]})
    return found


def replica_rows() -> dict[str, dict[str, dict]]:
    """The latest row of each method and stage, the methods by size."""
    found: dict[str, dict[str, dict]] = {}
    for row in sorted(replica_results(), key=lambda row: row["bits_per_weight"]):
        found.setdefault(row["method"], {})[row["stage"]] = row
    return found


def replicas() -> str:
    """Rotated replicas beside rotated groups, on the protocol's text and on one that took no part."""
    lines = [f"| body | bits/weight | folder, MB | {' | '.join(STAGES)} | KL | same top token | "
             f"{' | '.join(f'other text, {stage}' for stage in STAGES)} | seconds |",
             f"|---|{'--:|' * 9}"]
    found = replica_rows()
    for name, rows in found.items():
        last = [rows[stage] for stage in STAGES if stage in rows][-1]
        perplexities, others = ([f"{rows[stage][field]:.1f}" if stage in rows else "" for stage in STAGES]
                                for field in ("perplexity", "other_perplexity"))
        seconds = " / ".join(f"{rows[stage]['seconds']:.0f}" for stage in STAGES if stage in rows)
        lines.append(f"| {name} | {last['bits_per_weight']:.2f} | {last['file_bytes'] / 1e6:.1f} | "
                     f"{' | '.join(perplexities)} | {last['kl_mean']:.3f} | {last['top1_agreement']:.0%} | "
                     f"{' | '.join(others)} | {seconds} |")
    reference = next(row["other_reference"] for rows in found.values() for row in rows.values())
    return "\n".join([*lines, "", f"The model itself: 24.47, on the other text {reference:.2f}; KL and same top "
                      f"token are of the last stage. {place(replica_runs()[-1])}, other jobs on the host's other GPUs. "
                      f"Tuned, the codes too where it does not say otherwise, for {COMPARED} steps of 32 × 512 tokens where no other "
                      "number is given; seconds are those of each stage."])


def draw_replicas() -> None:
    """Perplexity over whole-folder bytes: replicas and groups, calibrated only and tuned."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    kinds = {"replicas under a budget": r"budget-[\d.]+", "groups under a budget": r"groups-budget-[\d.]+",
             "groups": r"groups-\d+", "replicas, one K": "replica-4", "replicas under a budget, 1,800 steps": r"budget-.*1,800 steps"}
    methods = replica_rows()
    for color, (kind, names) in enumerate(kinds.items()):
        for stage, line, marker in zip(STAGES, (":", "-"), "vo"):
            rows = [rows[stage] for name, rows in methods.items() if stage in rows and re.fullmatch(names, name)]
            points = [(row["file_bytes"] / 1e6, row["perplexity"]) for row in rows if 2 < row["bits_per_weight"] < 3.1]
            if points:
                axes.plot(*zip(*points), marker=marker, color=f"C{color}", linestyle=line, label=f"{kind}, {stage}")
    axes.axhline(24.47, color="gray", linewidth=1)
    axes.set(xlabel="whole folder, MB", ylabel="perplexity (log)", yscale="log")
    axes.grid(True, which="both", alpha=0.3)
    axes.set_yticks(ticks := [25, 30, 40, 50, 60, 80], ticks)
    figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(RESULTS / "replicas.png")


def kernels() -> str:
    """One token through a layer, ours beside MLX's."""
    result = read("kernels-h100-4")
    lines = ["| one token, cold weights | µs, alone | GB/s | of measured ceiling | µs, in a chain |", "|---|--:|--:|--:|--:|"]
    for row in result["rows"]:
        if row["rows"] < row["inputs"]:
            continue
        width = "ternary" if row["bits"] == "ternary" else f"{row['bits']} bit"
        what = (f"MLX, {width}, groups of 64" if row["replicas"] is None else
                f"ours, {width}, K={row['replicas']}" + f" G={row['group']}" * bool(row["group"]))
        tokens = f", {row['tokens']} tokens" * (row["tokens"] > 1) + ", expanded first" * row["kernel"].startswith("expand")
        chain = f"{row['chain_us']:.1f}" if "chain_us" in row else ""
        lines.append(f"| {row['rows']} × {row['inputs']}: {what}{tokens} | {row['free_us']:.1f} | {row['gb_per_s']:,.0f} | "
                     f"{row['percent_of_ceiling']:.0f} % | {chain} |")
    worst = {dtype: max(row["error"] for row in result["errors"] if row["dtype"] == dtype)
             for dtype in ("float16", "bfloat16", "float32")}
    errors = ", ".join(f"{error:.1e} in {dtype}" for dtype, error in worst.items())
    return "\n".join([*lines, "", f"The ceiling, {result['ceiling']['gb_per_s']:,.0f} GB/s, is that of the fastest reader tried "
                      f"({result['ceiling']['kernel']}). Relative errors against float64, of both kernels and three forms, at "
                      f"most {errors}. {place(result)}: `{result['command']}`."])


def decoding() -> str:
    """Where the time of a token of an 8B-shaped model goes."""
    seen, own = read("decode-h100-default-2"), read("decode-h100")
    lines = ["| one token after a prompt of 16 | MB/token | the GPU itself, ms | GB/s | of measured ceiling | as a user sees it, ms | tokens/s | "
             "of it Python, ms | launching, ms |", f"|---|{'--:|' * 8}"]
    for row, gpu in zip(seen["rows"], own["rows"]):
        lines.append(f"| {row['model']} | {row['bytes_per_token'] / 1e6:,.0f} | {gpu['gpu_ms']:.2f} | {gpu['gpu_gb_per_s']:.0f} | "
                     f"{gpu['percent_of_ceiling']:.0f} % | {row['token_ms']:.2f} | {row['tps']:.0f} | {row['build_ms']:.2f} | "
                     f"{row['launch_ms']:.2f} |")
    return "\n".join([*lines, "", f"{place(own)}: `{own['command']}` for the GPU's own time, `{seen['command']}` for the rest."])


def speeds() -> str:
    """Whole models of one shape with random weights, and the default model."""
    parts = []
    for name in ("bench-h100-2", "bench-h100-16-bit", "bench-cpu"):
        result = read(name)
        records = [Record(**row) for row in result["records"] if row["depth"] == 0]
        parts.append(f"{bench_output.markdown(records)}\n\n{place(result)}: `{result['command']}`")
    return "\n\n".join(parts)


TABLES = {"default-model": default_model, "widths": widths, "replicas": replicas, "kernels": kernels,
          "decoding": decoding, "speeds": speeds, "methods": methods}


def render(text: str) -> str:
    for name, table in TABLES.items():
        block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text, found = block.subn(lambda m: f"{m[1]}{table()}\n{m[2]}", text)
        if not found:
            raise SystemExit(f"README.md has no place for the table {name}")
    return text


if __name__ == "__main__":
    old = README.read_text(encoding="utf-8")
    new = render(old)
    if "--check" in sys.argv:
        sys.exit(old != new)
    README.write_text(new, encoding="utf-8")
    draw_methods()
    draw_replicas()
