"""Real models quantised, measured and asked: seconds, peak, perplexity, KL, six answers.

    python benchmarks/real_models.py qwen2.5-coder-0.5b qwen2.5-coder-1.5b \\
        --text TEST --data TRAIN --plan gptq:4 gptq:3 rtn:8 replica-4-corrected:2 --out real-models
    python benchmarks/real_models.py qwen2.5-coder-1.5b --text TEST --plan --made FOLDER …

A step of the plan is a row of ``mlxquant compare`` and a width; FOLDER was made by ``mlxquant
quantize`` or ``tune`` and gives its name to its row. Rows are written as they come.
"""

import json
import shutil
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from record import parser, save

import mlxquant
from mlxquant.codes.width import Width
from mlxquant.model.loading import LanguageModel, load
from mlxquant.quantise.job import Job, Text
from mlxquant.quantise.pipeline import quantize
from mlxquant.report.comparison import METHODS
from mlxquant.report.divergence import divergence

PROMPTS = (
    "Write a Python function that returns the n-th Fibonacci number. Code only.",
    "Write a SQL query for the three customers with the highest total of orders.",
    "What is the capital of France?",
    "Why is the sky blue? Answer in two sentences.",
    "What is 17 + 26?",
    "List three colours as a JSON array and nothing else.",
)


def answers(model: LanguageModel, tokens: int) -> list[dict[str, Any]]:
    """Greedy answers to the six prompts, and how fast they came."""
    given = []
    for prompt in PROMPTS:
        reply = mlxquant.generate(model, [{"role": "user", "content": prompt}], max_tokens=tokens)
        print(f"  {prompt}\n    {reply.answer!r}", flush=True)
        given.append({"prompt": prompt, "answer": reply.answer, "ended": reply.finish_reason,
                      "tokens_per_s": reply.report.generation_tps,
                      "gb_per_s": reply.report.gb_per_s,
                      "percent_of_ceiling": reply.report.percent_of_ceiling})
    return given


def quality(model: LanguageModel, teacher: LanguageModel, arguments: Any) -> dict[str, Any]:
    """Perplexity, and the distance from the original."""
    found = divergence(model, teacher, Path(arguments.text), windows=arguments.windows)
    return {key: getattr(found, key) for key in (
        "bits_per_weight", "file_bytes", "perplexity", "kl_mean", "kl_stderr", "kl_noise_floor",
        "top1_agreement")}


def rows(name: str, arguments: Any, folder: Path) -> Iterator[dict[str, Any]]:
    """A row for each folder, asked before it is scored, then the original's, which other runs have
    too, then one for each step of the plan."""
    teacher = load(name)
    for made in arguments.made:
        student = load(str(made))
        record = json.loads((made / "config.json").read_text())["mlxquant_record"]
        said = {"answers": answers(student, arguments.tokens)}
        yield ({"model": name, "method": made.name, "bits": record["bits"]} | said
               | quality(student, teacher, arguments))
    yield ({"model": name, "method": "original", "bits": 16}
           | quality(teacher, teacher, arguments) | {"answers": answers(teacher, arguments.tokens)})
    text = Text(tuple(arguments.data), arguments.samples, arguments.length)
    for step in arguments.plan:
        method, _, bits = step.partition(":")
        settings = {key: value for key, value in METHODS[method].items() if key != "mixed"}
        try:
            job = Job(text=text).changed(**settings, bits=Width.of(bits))
            made = quantize(name, folder / step.replace(":", "-"), job)
            student = load(str(made.folder))
            yield {"model": name, "method": method, "bits": Width.of(bits).value,
                   "seconds": made.seconds, "peak_memory_gb": made.peak_memory / 1e9,
                   "added_error": made.added, "notes": made.notes} | quality(
                student, teacher, arguments) | {"answers": answers(student, arguments.tokens)}
            del student
        except Exception:  # one step's failure must not cost the others' measurements
            traceback.print_exc()


def main() -> None:
    options = parser(__doc__)
    options.add_argument("models", nargs="+")
    options.add_argument("--text", required=True)
    options.add_argument("--data", nargs="*", default=[])
    options.add_argument("--plan", nargs="*", default=["gptq:4", "gptq:3", "rtn:8"])
    options.add_argument("--made", nargs="*", default=[], type=Path)
    options.add_argument("--windows", type=int, default=40)
    options.add_argument("--samples", type=int, default=128)
    options.add_argument("--length", type=int, default=512)
    options.add_argument("--tokens", type=int, default=160, help="Of an answer, at most.")
    options.add_argument("--out", default="real-models")
    arguments = options.parse_args()
    if arguments.plan and not arguments.data:
        options.error("a --plan needs --data to calibrate on")
    kept: list[dict[str, Any]] = []
    folder = Path(tempfile.mkdtemp(prefix="mlxquant-"))
    try:
        for model in arguments.models:
            start = time.perf_counter()
            for row in rows(model, arguments, folder / Path(model).name):
                kept.append(row)
                print(f"{row['model']} {row['method']}:{row['bits']} "
                      f"{row['bits_per_weight']:.2f} bits, perplexity {row['perplexity']:.2f}, "
                      f"KL {row['kl_mean']:.4f}, {row.get('seconds') or 0:.0f} s, "
                      f"in all {time.perf_counter() - start:.0f} s", flush=True)
                save(arguments.out, windows=arguments.windows, samples=arguments.samples,
                     length=arguments.length, data=[Path(d).name for d in arguments.data],
                     rows=kept)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
