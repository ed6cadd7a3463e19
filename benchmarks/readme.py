"""Rewrite the README's tables and plot from ``results/``; ``--check`` only says whether the tables are current.

    python benchmarks/readme.py [--check]
"""

import re
import sys
from pathlib import Path

from record import RESULTS, read

from mlxquant.evaluation.comparison import Row, plot

README = Path(__file__).parents[1] / "README.md"

# Two runs side by side on one host: their perplexities hold, their seconds do not.
SHARED_HOST = ("methods-h200-2", "methods-h200-3")
# Measured before rounding was changed (see LOG.md), so not a result of this code.
OUTDATED = {("rtn", 4), ("rtn", 3), ("rtn", 2), ("rtn", 8)}
WIDTHS = [8, 4, 3, 2, "ternary", 1]


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
    for path in sorted([*RESULTS.glob("methods-h200-*.json"), *RESULTS.glob("stock-h200-*.json")]):
        for row in read(path.stem)["rows"]:
            if path.stem in SHARED_HOST:
                row = row | {"seconds": None}
            if (row["method"], row["bits"]) not in OUTDATED and row["method"] != "original":
                rows[row["method"], row["bits"]] = row
    return sorted(rows.values(), key=lambda r: (WIDTHS.index(r["bits"]), r["perplexity"]))


def draw_methods() -> None:
    """Perplexity over whole-folder bytes of the rows that were saved as folders."""
    fields = Row.__dataclass_fields__
    plot([Row(**{name: row[name] for name in fields}) for row in method_rows()
          if set(fields) <= set(row) and row["bits"] != "ternary"], RESULTS / "methods-h200.png")


def methods() -> str:
    lines = ["| width | method | bits/weight | perplexity | KL | same top token | seconds |",
             "|---|---|--:|--:|--:|--:|--:|"]
    for r in method_rows():
        seconds = "" if r["seconds"] is None else f"{r['seconds']:.0f}"
        lines.append(f"| {r['bits']} | {r['method']} | {r['bits_per_weight']:.2f} | {r['perplexity']:,.1f} | "
                     f"{r['kl_mean']:.3f} | {100 * r['top1_agreement']:.0f} % | {seconds} |")
    original = read("methods-h200-1")["rows"][0]["perplexity"]
    return "\n".join([*lines, "", f"The model itself: {original:.2f}. {place(read('methods-h200-4'))}."])


TABLES = {"default-model": default_model, "methods": methods}


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
