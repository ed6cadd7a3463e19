"""The tables of README.md and of small models and kernels in docs/: one function each, from
``results/`` and from the program."""

import json
import shlex
import subprocess
import sys
from collections.abc import Iterable

from measured import (
    COMPARED,
    HERE,
    STAGES,
    WIDTHS,
    kernel_run,
    literature,
    metal_body_run,
    method_rows,
    original_perplexity,
    replica_rows,
    replica_runs,
)
from record import Row, place, read

from mlxquant.report import bench_output
from mlxquant.report.bench import Record

KERNELS = {
    "mx.quantized_matmul": "MLX's `quantized_matmul`",
    "replicated_matvec": "`replicated_matvec`, Metal's body, through CUDA on ordinary cores",
    "replicated_tensor_cores": "`replicated_tensor_cores`, NVIDIA only",
    "expand_codes, product": "`expand_codes`, then MLX's product",
}
DECODED = "decode-h100-ten"  # by ``decode.py``: as a user sees it, and by the GPU's own clock
FILES = "decode-h100-apart"  # the same of a real model
FOLDER = "decode-h100-1.5b"  # of a larger one, of a folder made of it, and with blocks unfused
# How many times the original's perplexity a width may have to be called so.
VERDICTS = ((1.02, "no loss to speak of"), (1.1, "the default"), (1.5, "usable, with care"),
            (5, "needs tuning"), (float("inf"), "broken without training"))


def table(columns: Iterable[str], rows: Iterable[Iterable[str]], *notes: str) -> str:
    """Markdown; a column whose name ends in a colon is aligned to the right. Notes stand below."""
    columns = list(columns)
    lines = [[column.rstrip(":") for column in columns],
             ["--:" if column.endswith(":") else "---" for column in columns], *rows]
    made = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return "\n\n".join([made, *notes])


# README.md


def quality() -> str:
    """Eight ways to hold the default model's body, ours beside the best that mlx-lm makes."""
    groups = {(row["bits"], row["method"]): {"calibrated": row} for row in method_rows()}
    made = replica_rows()
    shown = [("4 bits: mlx-lm's best, AWQ", groups[4, "mlx-lm awq"]),
             ("4 bits: GPTQ, groups of 64", groups[4, "gptq"]),
             ("3 bits: mlx-lm's best, AWQ", groups[3, "mlx-lm awq"]),
             ("3 bits: replicas, K = 4", made["replica-4-3bit"]),
             ("2 bits: GPTQ, rotated, groups of 64", made["groups-64"]),
             ("2 bits: replicas, K = 4", made["replica-4"]),
             ("1 to 4 bits: replicas under a budget", made["budget-2.40"]),
             ("the same, blocks trained as they are made", _blocks_trained())]
    rows = [[name, f"{latest(stages)['bits_per_weight']:.2f}",
             *(f"{stages[stage]['perplexity']:.1f}" if stage in stages else "" for stage in STAGES),
             f"{100 * latest(stages)['top1_agreement']:.0f} %"] for name, stages in shown]
    return table(("body of the model", "bits per weight:", "perplexity, calibrated:", "tuned:",
                  "same top token:"), rows)


def _blocks_trained() -> dict[str, Row]:
    """The default model at 2.40 bits, made with the most text, then tuned with the most."""
    made = max((row for row in read("blocks-trained-h100")["rows"]
                if (row["method"], row["variant"]) == ("budget-2.40", None)),
               key=lambda row: row["windows"])
    tuned = max((row for row in read("tuned-after-blocks-h100")["rows"]
                 if row["perplexity_before"] == made["perplexity"]), key=lambda row: row["written"])
    return {"calibrated": made, "tuned": {
        "bits_per_weight": made["bits_per_weight"], "perplexity": tuned["perplexity_after"],
        "top1_agreement": tuned["top1_after"]}}


def speed() -> str:
    """One token through one layer, and what ran it: six rows."""
    run = read("one-token-h100")  # both bodies; cut off before the rows of several tokens
    found = {(r["kernel"], r["bits"], r["replicas"], r["group"]): r for r in run["rows"]
             if (r["rows"], r["inputs"], r["tokens"]) == (14336, 4096, 1)}
    stock = [found["mx.quantized_matmul", bits, None, 64] for bits in (4, 2)]
    metal = [found["replicated_matvec", 2, k, g] for k, g in ((1, 0), (4, 0), (4, 16))]
    rows = [*stock, *metal, found["replicated_tensor_cores", 2, 4, 0]]
    one, plain, grouped = (row["free_us"] for row in metal)
    model = {row["model"]: row["tps"] for row in read(DECODED)["rows"]}
    return table(("kernel that ran", "weights", "µs:", "GB/s:"), [
        [KERNELS[row["kernel"]], form(row), f"{row['free_us']:.1f}", f"{row['gb_per_s']:,.0f}"]
        for row in rows],
        f"{place(run)}, all in one run. With the kernel that Macs run, K = 4 takes "
        f"{plain / one:.2f} times as long as K = 1, in groups of 16 inputs "
        f"{grouped / one:.2f} times. A whole model of 8B shape decodes "
        f"{model['llama-3.1-8b:2-k4-g16']:.0f} tokens/s with `replicated_tensor_cores`, "
        f"{model['llama-3.1-8b:4']:.0f} with MLX's 4 bits, and these through mlx-lm "
        f"{model['mlx-lm:llama-3.1-8b:4']:.0f}.")


def mac() -> str:
    """What ``mlxquant plan`` predicts for a 32B model on an M1 Pro."""
    options = ["--config", "benchmarks/configs/qwen3-32b.json", "--chip", "M1 Pro"]
    plan = json.loads(subprocess.run(
        [sys.executable, "-m", "mlxquant", "plan", *options, "--json"], cwd=HERE.parent,
        check=True, capture_output=True, text=True).stdout)
    wanted = {("original", 16, None): "16 bits", ("affine", 4, 64): "4 bits, groups of 64",
              ("affine", 2, 64): "2 bits, groups of 64",
              ("replicas", 2, 16): "2 bits, replicas K = 8, G = 16"}
    rows = [[name, f"{row['bits_per_weight']:.2f}", f"{row['file_bytes'] / 1e9:.1f}",
             f"{row['total_bytes'] / 1e9:.1f}", "yes" if row["fits"] else "no",
             f"{row['tps']:.1f}"] for key, name in wanted.items() for row in plan["rows"]
            if (row["method"], row["bits"], row["group"]) == key and row["kv_bits"] == 16]
    return table(("weights", "bits per weight:", "file, GB:", "in use, GB:", "fits",
                  "tokens/s, predicted:"), rows,
                 f"Predicted by `mlxquant plan {shlex.join(options)}`: {plan['machine']}, "
                 f"200 GB/s, 32 GB, of which macOS lets a model have "
                 f"{plan['memory_bytes'] / 1e9:.1f} GB. \"In use\" is with a context of "
                 f"{plan['context']:,} tokens; speeds are those at its end.")


# docs/results.md


def default_model() -> str:
    """The default model as it comes, on a CPU."""
    r = read("default-model-cpu")
    prefill, decode, quality = r["prefill_512_tps"], r["decode_128_tps"], r["quality"]
    rate = r["bytes_per_token"] * decode["mean"] / 1e9
    return table(("what", "result"), [
        ["prefill, 512 tokens", f"{prefill['mean']:.0f} ± {prefill['stdev']:.0f} tokens/s"],
        ["decode, 128 tokens",
         f"{decode['mean']:.1f} ± {decode['stdev']:.1f} tokens/s, {rate:.1f} GB/s = "
         f"{100 * rate / r['ceiling_gb_per_s']:.0f} % of the {r['ceiling_gb_per_s']:.1f} GB/s "
         "measured there"],
        ["bytes read per token",
         f"{r['bytes_per_token'] / 1e6:.0f} MB (dense float32, KV cache included)"],
        ["perplexity, `wt2-40`",
         f"{quality['perplexity']:.2f} at {quality['bits_per_weight']:.2f} bits per weight, "
         f"{quality['file_bytes'] / 1e6:.0f} MB on disk"],
        ["peak memory", f"{r['peak_memory_gb']:.2f} GB"]], f"{place(r)}: `{r['command']}`")


def widths() -> str:
    """What each width costs: our best calibrated method, and the literature beside it."""
    original, published = original_perplexity(), literature()["rows"]
    rows = []
    for width in WIDTHS:
        best = min((row for row in method_rows() if row["bits"] == width
                    and not row["method"].startswith("mlx-lm")), key=lambda row: row["perplexity"])
        ratio = best["perplexity"] / original
        loss = f"+{100 * (ratio - 1):.1f} %" if ratio < 2 else f"{ratio:.1f} times"
        others = "; ".join(
            f"{row['method']} {row['perplexity']:,.{0 if row['perplexity'] > 1000 else 2}f}"
            for row in published if row["bits"] == width)
        rows.append([str(width), f"{16 / best['bits_per_weight']:.1f} ×",
                     f"{best['perplexity']:,.1f} ({loss}), {best['method']}",
                     next(words for limit, words in VERDICTS if ratio <= limit), others])
    papers = "; ".join(dict.fromkeys(row["paper"] for row in published if row["bits"] != 16))
    return table(("width", "smaller than 16 bits:", "perplexity here", "verdict here",
                  "Llama-2-7B, published by others"), rows,
                 "Here: SmolLM2-135M-Instruct, calibrated only, no tuning. There: WikiText-2, "
                 "context 2,048, where 16 bits score 5.47; not our measurements, but those of "
                 f"{papers}.")


def replicas() -> str:
    """Rotated replicas and rotated groups, on the protocol's text and on one that took no part."""
    made = []
    for name, rows in replica_rows().items():
        last = latest(rows)
        ours, others = ([f"{rows[stage][field]:.1f}" if stage in rows else "" for stage in STAGES]
                        for field in ("perplexity", "other_perplexity"))
        seconds = " / ".join(f"{rows[stage]['seconds']:.0f}" for stage in STAGES if stage in rows)
        made.append([name, f"{last['bits_per_weight']:.2f}", f"{last['file_bytes'] / 1e6:.1f}",
                     *ours, f"{last['kl_mean']:.3f}", f"{100 * last['top1_agreement']:.0f} %",
                     *others, seconds])
    run = replica_runs()[-1]
    columns = ("body", "bits/weight:", "folder, MB:", *(f"{stage}:" for stage in STAGES), "KL:",
               "same top token:", *(f"other text, {stage}:" for stage in STAGES), "seconds:")
    return table(columns, made,
                 f"The model itself: {original_perplexity():.2f}, on the other text "
                 f"{run['rows'][0]['other_reference']:.2f}; KL and same top token are of the last "
                 f"stage. {place(run)}, other jobs on the host's other GPUs. Tuned, the codes too "
                 f"where it does not say otherwise, for {COMPARED} steps of 32 × 512 tokens where "
                 "no other number is given; seconds are those of each stage.")


def kernels() -> str:
    """One token, or a few, through one layer: what ran it, alone and in a chain."""
    run = kernel_run()
    rows = [[KERNELS[row["kernel"]], form(row), f"{row['rows']} × {row['inputs']}",
             str(row["tokens"]), f"{row['free_us']:.1f}", f"{row['gb_per_s']:,.0f}",
             f"{row['percent_of_ceiling']:.0f} %",
             f"{row['chain_us']:.1f}" if "chain_us" in row else ""]
            for row in run["rows"] if row["rows"] >= row["inputs"]]
    errors = ", ".join(
        f"{max(row['error'] for row in run['errors'] if row['dtype'] == dtype):.1e} in {dtype}"
        for dtype in ("float16", "bfloat16", "float32"))
    return table(("kernel that ran", "weights", "shape", "tokens:", "µs, alone:", "GB/s:",
                  "of measured ceiling:", "µs, in a chain:"), rows,
                 f"The ceiling, {run['ceiling']['gb_per_s']:,.0f} GB/s, is that of the fastest "
                 f"reader tried ({run['ceiling']['kernel']}). Relative errors against float64, of "
                 f"both kernels and three forms, are at most {errors}. {place(run)}: "
                 f"`{run['command']}`.")


def metal_body() -> str:
    """The body that Metal compiles, on the same kind of GPU, and what it replaced."""
    run = metal_body_run()
    first = run["rows"][0]["free_us"]
    rows = [[KERNELS[row["kernel"]], form(row), str(row["tokens"]),
             f"{row['before_us']:.1f}" if row["before_us"] else "", f"{row['free_us']:.1f}",
             f"{row['gb_per_s']:,.0f}",
             f"{100 * row['gb_per_s'] / run['ceiling']['gb_per_s']:.0f} %",
             f"{row['free_us'] / first:.2f}" if row["bits"] == 2 and row["replicas"] else ""]
            for row in run["rows"]]
    return table(("kernel that ran", "weights", "tokens:", "µs before, alone:", "µs, alone:",
                  "GB/s:", "of measured ceiling:", "against K = 1:"), rows,
                 f"14336 × 4096, float16, weights in no cache, both bodies in one run on an "
                 f"NVIDIA H100, {run['date']}; read ceiling {run['ceiling']['gb_per_s']:,.0f} GB/s."
                 + ("" if run["stands"] else " Times are those of the candidate that the body was "
                    "made from (benchmarks/LOG.md)."))


def decoding() -> str:
    """Where the time of a token goes: shapes, then a real file."""
    files, usual = read(FILES), read(f"{FILES}-default")
    first, _, stock = (row["tps"] for row in usual["rows"][:3])
    return "\n\n".join((
        _decoded(read(DECODED), "with its own limits the first row was 295 tokens/s."),
        _decoded(files, f"with its own limits these were {first:.0f} tokens/s, and "
                 f"{stock:.0f} as mlx-lm runs them."), _as_seen(read(FOLDER))))


def _as_seen(found: Row) -> str:
    """A run of ``decode.py`` without the GPU's own time."""
    rows = [[row["model"], f"`{decode_kernel(row)}`", f"{row['bytes_per_token'] / 1e6:,.0f}",
             str(row["dispatches"]), f"{row['token_ms']:.2f}", f"{row['tps']:.0f}",
             f"{(rate := row['bytes_per_token'] * row['tps'] / 1e9):.0f}",
             f"{100 * rate / found['ceiling']['gb_per_s']:.0f} %",
             f"{row['build_ms']:.2f}", f"{row['launch_ms']:.2f}"] for row in found["rows"]]
    return table(("one token after a prompt of 16", "kernel that ran", "MB/token:",
                  "kernels:", "as a user sees it, ms:", "tokens/s:", "GB/s:",
                  "of measured ceiling:", "of it Python, ms:", "launching, ms:"), rows,
                 f"{place(found)}: `{found['command']}`, beside jobs on the host's other GPUs.")


def _decoded(found: Row, otherwise: str) -> str:
    """A run of ``decode.py``, and what MLX's own limits gave."""
    rows = [[row["model"], f"`{decode_kernel(row)}`", f"{row['bytes_per_token'] / 1e6:,.0f}",
             f"{row['gpu_ms']:.2f}", f"{row['gpu_gb_per_s']:.0f}",
             f"{row['percent_of_ceiling']:.0f} %", f"{row['token_ms']:.2f}", f"{row['tps']:.0f}",
             f"{row['build_ms']:.2f}", f"{row['launch_ms']:.2f}"] for row in found["rows"]]
    return table(("one token after a prompt of 16", "kernel that ran", "MB/token:",
                  "the GPU itself, ms:", "GB/s:", "of measured ceiling:",
                  "as a user sees it, ms:", "tokens/s:", "of it Python, ms:", "launching, ms:"),
                 rows, f"{place(found)}: `{found['command']}`, with MLX's limits on a graph "
                 f"raised; {otherwise}")


def speeds() -> str:
    """Whole models of one shape with random weights, and the default model."""
    parts = []
    for name in ("bench-h100-2", "bench-h100-16-bit", "bench-cpu"):
        result = read(name)
        records = [Record(**row) for row in result["records"] if row["depth"] == 0]
        parts.append(f"{bench_output.markdown(records)}\n\n{place(result)}: `{result['command']}`")
    return "\n\n".join(parts)


def methods() -> str:
    """Every method at every width on the default model."""
    rows = [[str(r["bits"]), r["method"], f"{r['bits_per_weight']:.2f}", f"{r['perplexity']:,.1f}",
             f"{r['kl_mean']:.3f}", f"{100 * r['top1_agreement']:.0f} %",
             "" if r["seconds"] is None else f"{r['seconds']:.0f}"] for r in method_rows()]
    return table(("width", "method", "bits/weight:", "perplexity:", "KL:", "same top token:",
                  "seconds:"), rows,
                 f"The model itself: {original_perplexity():.2f}. {place(read('methods-h200-6'))}. "
                 "Rows without seconds ran beside other work, on that GPU or an H100, or on a CPU: "
                 "their perplexities compare, their times do not.")


def form(row: Row) -> str:
    """How a kernel's row holds its weights."""
    width = {1: "1 bit", "ternary": "ternary"}.get(row["bits"], f"{row['bits']} bits")
    if row["replicas"] is None:
        return f"{width}, groups of {row['group']}"
    return f"{width}, K = {row['replicas']}" + (f", G = {row['group']}" if row["group"] else "")


def decode_kernel(row: Row) -> str:
    """What ran a model's matrices: runs before this was recorded used the tensor cores."""
    stood = "replicated_tensor_cores" if "-k" in row["model"] else "mx.quantized_matmul"
    return row.get("kernel", stood)


def latest(stages: dict[str, Row]) -> Row:
    """The row of the last stage that was run."""
    return [stages[stage] for stage in STAGES if stage in stages][-1]
