"""The tables of docs/ on real models: made by each method, trained, asked, and how long it took."""

import math
from itertools import pairwise

from record import RESULTS, Row, Rows, place, read
from tables import table

REAL = ("real-models-1.5b", "real-models-1.5b-2", "real-models-0.5b", "real-models-135m")
WAYS = {"replica": "replicas K = 4, 2 bits, rotated, corrected", "tuned": "the same, blocks tuned",
        "gptq": "GPTQ, 4 bits", "rtn": "RTN, 4 bits", "budget": "replicas, 2.4 bits a weight",
        "mlx-gptq": "mlx-lm's GPTQ, 4 bits", "mlx-rtn": "mlx-lm's RTN, 4 bits"}


def blocks_trained() -> str:
    """Models whose blocks were trained as they were made."""
    run = read("blocks-trained-h100")
    rows = [[*_whose(row, "method"), f"{row['windows']} × 512 of {row['text']}",
             str(row["block_steps"]), f"{row['bits_per_weight']:.2f}",
             f"{row['file_bytes'] / 1e6:.0f}" if "file_bytes" in row else "",
             f"{row['before']:.1f}" if row["before"] else "", f"{row['perplexity']:.1f}",
             f"{row['kl_mean']:.3f}",
             f"{row['other_perplexity']:.1f}" if "other_perplexity" in row else "",
             ", ".join(str(row[key]) for key in ("seconds", "training_seconds") if row[key]),
             f"{row['peak_gb']:.1f}" if row["peak_gb"] else ""] for row in run["rows"]]
    return table(("run:", "model", "body", "tokens", "steps:", "bits/weight:", "folder, MB:",
                  "`wt2-40` before:", "trained:", "KL:", "other text:",
                  "seconds in all, training:", "peak GB:"), rows,
                 f"{place(run)}: `{run['command']}`. {run['note']}", _runs(run))


def _whose(row: Row, body: str) -> list[str]:
    """The run, the model and the body, with what was special about it, that a row is of."""
    return [str(row["run"]), row["model"].removesuffix("-Instruct"),
            ", ".join(filter(None, (row[body], row["variant"])))]


def _runs(measured: Row) -> str:
    """A line on each run that rows are of."""
    return "\n".join(f"- Run {number}: {about}." for number, about in measured["runs"].items())


def tuned_after() -> str:
    """What tuning the whole model adds to trained blocks."""
    run = read("tuned-after-blocks-h100")
    rows = [[*_whose(row, "body"), f"{row['made_windows']:,} × 512, {row['block_steps']}",
             f"{row['steps']} × {row['batch_size']}, {row['learning_rate']:g}"
             + "".join(f", {row[kind]:,} {kind}" for kind in ("written", "conversations")
                       if row[kind]),
             f"{row['perplexity_before']:.2f}", f"{row['perplexity_after']:.2f}",
             f"{row['kl_before']:.3f}", f"{row['kl_after']:.3f}",
             f"{row['total_seconds']:.0f}", f"{row['peak_gb']['training']:.1f}",
             f"{row['foretold_gb']['training']:.1f}"] for row in run["rows"]]
    return table(("run:", "model", "body", "blocks: tokens, steps", "steps × 512 tokens, rate",
                  "`wt2-40` before:", "after:", "KL before:", "after:", "seconds:",
                  "peak GB:", "foretold:"), rows,
                 f"{place(run)}: `{run['command']}`. {run['note']}", _runs(run))


def talking() -> str:
    """How near a tuned model stays to the original where it talks."""
    run = read("talking-h100")
    rows = [[row["folder"], f"{row['kl_mean']:.3f} ± {row['kl_stderr']:.3f}",
             f"{100 * row['top1_agreement']:.1f} %"] for row in run["rows"]]
    return table(("SmolLM2-135M, 2.40 bits", "KL on conversations, nats a token:",
                  "same likeliest token:"), rows,
                 f"{run['windows']} conversations of {run['length']} tokens that the original "
                 f"wrote and no run saw. {place(run)}: `{run['command']}`. {run['note']}")


def tasks() -> str:
    """What made models answer to questions, beside the original."""
    runs = [read(f"tasks-1.5b-{card}") for card in ("h100", "h200")]
    rows = [[row["body"], f"{row['bits_per_weight']:.2f}", f"{row['file_bytes'] / 1e6:.0f}",
             row["task"].removesuffix("-100"), *(
                 f"{100 * row[share]:.0f} ± {100 * row[error]:.1f} %" for share, error in (
                     ("accuracy", "accuracy_stderr"), ("original_accuracy", "original_stderr"),
                     ("agreement", "agreement_stderr")))] for run in runs for row in run["rows"]]
    return table(("body", "bits/weight:", "folder, MB:", "100 questions of", "accuracy:",
                  "the original's:", "the same choice:"), rows,
                 f"{place(runs[0])}, the last two rows {place(runs[1]).removeprefix('Measured ')}: "
                 f"`{runs[0]['command']}`.")


def real_rows() -> list[Row]:
    """What ``real_models.py`` measured, each model and way once."""
    rows = {}
    for name in REAL:
        for row in read(name)["rows"]:
            rows[row["model"].removesuffix(".gguf"), row["method"], row["bits"]] = row
    return [row | {"model": model} for (model, *_), row in rows.items()]


def real_models() -> str:
    """Real models of two families, calibrated only."""
    rows = [[r["model"], "the file itself" if r["method"] == "original" else
             f"{r['method']}, {r['bits']} bits", f"{r['bits_per_weight']:.2f}",
             f"{r['file_bytes'] / 1e6:,.0f}", f"{r['perplexity']:.2f}", f"{r['kl_mean']:.4f}",
             f"{100 * r['top1_agreement']:.0f} %",
             f"{r['seconds']:.0f}" if r.get("seconds") else "",
             f"{r['peak_memory_gb']:.1f}" if r.get("seconds") else ""] for r in real_rows()]
    return table(("model", "body", "bits/weight:", "MB:", "perplexity:", "KL:", "same top token:",
                  "seconds:", "peak GB:"), rows,
                 f"{place(read(REAL[0]))}: `{read(REAL[0])['command']}` and its kin "
                 "(`results/real-models-*.json`). Calibrated on 128 samples of 512 tokens, no "
                 "tuning, groups of 64; perplexity `wt2-40`, by the layers that a GPU runs.")


def making_rows() -> dict[str, Rows]:
    """What ``making.py`` measured, by place: the latest row of each model and way, by size."""
    found: dict[str, dict[tuple[str, str], Row]] = {}
    for path in sorted(RESULTS.glob("making-*.json")):
        run = read(path.stem)
        for row in run["rows"]:
            found.setdefault(place(run), {})[row["model"], row["way"]] = row | {
                "tokens": f"{run['samples']} × {run['length']}"}
    return {where: sorted(rows.values(), key=lambda row: (row["body_weights"], row["way"]))
            for where, rows in found.items()}


def making() -> str:
    """Seconds and peaks of making models, a table for each machine, ours beside mlx-lm's; and with
    what power of the weights they grow."""
    return "\n\n".join(table(
        ("model", "billion weights:", "what is made", "tokens", "seconds:", "peak GB of MLX:",
         "of the process:", "slowest steps, seconds"), map(_making_line, rows),
        f"{where}: `python benchmarks/making.py --only MODEL --ways WAY [--blocks N]`, random "
        "weights and tokens.", *_growth(rows)) for where, rows in making_rows().items())


def _making_line(row: Row) -> list[str]:
    steps = list(row.get("profile", {}).get("seconds", {}).items())[1:4]
    seconds = f"{row['seconds_in_all']:,.0f}"
    if row["made_blocks"] != row["blocks"]:
        seconds += f" ({row['made_blocks']} of {row['blocks']} blocks took {row['seconds']:.0f})"
    return [row["model"], f"{row['body_weights'] / 1e9:.2f}", WAYS[row["way"]], row["tokens"],
            seconds, f"{row['mlx_peak_gb']:.1f}", f"{row['host_peak_gb']:.1f}",
            ", ".join(f"{name} {took:.0f}" for name, took in steps)]


def _growth(rows: Rows) -> list[str]:
    """From each size to the next of a way: by what power of the weights seconds and peak grow."""
    said = []
    for way in WAYS:
        sizes = [row for row in rows if row["way"] == way and row["model"] != "mixture"]
        for small, large in pairwise(sizes):
            ratio = math.log(large["body_weights"] / small["body_weights"])
            powers = [math.log(large[key] / small[key]) / ratio
                      for key in ("seconds_in_all", "mlx_peak_gb")]
            part = any(row["made_blocks"] != row["blocks"] for row in (small, large))
            said.append(f"{WAYS[way]} from {small['model']} to {large['model']} seconds "
                        f"{powers[0]:.1f}{' (extrapolated)' * part}, peak {powers[1]:.1f}")
    return [f"With the weights to the power of: {'; '.join(said)}."] if said else []


def answers() -> str:
    """The six answers of the 1.5B model and of what was made of it, unedited."""
    shown = [row for row in real_rows() if "1.5b" in row["model"]]
    for name, how in (("h100", "blocks trained on 128 × 512 tokens"),
                      ("h100-2", "blocks trained on 512 × 512 tokens"),
                      ("h100-3", "blocks trained on 512 × 512 tokens"),
                      ("h200", "blocks trained on 512 × 512 tokens, then tuned as a whole")):
        shown += [row | {"method": f"replicas under a budget, {row['file_bytes'] / 1e6:.0f} MB in "
                                   f"all, {how}",
                         "bits": "1 to 4"}
                  for row in read(f"answers-1.5b-{name}")["rows"] if row["method"] != "original"]
    parts = []
    for index, prompt in enumerate(a["prompt"] for a in shown[0]["answers"]):
        parts.append(f"## {prompt}")
        for row in shown:
            name = "The file itself" if row["method"] == "original" else (
                f"{row['method']}, {row['bits']} bits ({row['bits_per_weight']:.2f} a weight)")
            answer = row["answers"][index]["answer"].rstrip()
            parts.append(f"{name}:\n\n````\n{answer}\n````")
    return "\n\n".join(parts)
