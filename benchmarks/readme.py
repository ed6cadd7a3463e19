"""Rewrite the README's tables from ``results/``; ``--check`` only says whether they are current.

    python benchmarks/readme.py [--check]
"""

import re
import sys
from pathlib import Path

from record import read

README = Path(__file__).parents[1] / "README.md"


def place(result: dict) -> str:
    """Where and with what a result was measured."""
    m = result["machine"]
    return (f"Measured {result['date']} on a {m['chip']} ({m['device']}, {m['cores']} cores), "
            f"MLX {m['mlx']}, mlx-lm {m['mlx_lm']}: `{result['command']}`")


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
        f"| peak memory | {r['peak_memory_gb']:.2f} GB |", "", place(r)])


TABLES = {"default-model": default_model}


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
