"""Speed and perplexity of the default model, as a user of this machine gets them.

    python benchmarks/default_model.py TEXT

Prefill of 512 tokens and decode of 128, five times after a warm-up; perplexity
of TEXT (WikiText-2 raw test) by the protocol wt2-40.
"""

import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

from record import parser, save

import mlxquant
from mlxquant.sources.names import DEFAULT_MODEL

REPETITIONS = 5


def spread(values: list[float]) -> dict[str, Any]:
    return {"mean": statistics.mean(values), "stdev": statistics.stdev(values), "values": values}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("text", type=Path)
    text = options.parse_args().text
    model = mlxquant.load(DEFAULT_MODEL)
    tokens = model.tokenizer.encode(text.read_text(encoding="utf-8"), verbose=False)[:513]
    reports = []
    for _ in range(REPETITIONS + 1):
        prefill = mlxquant.generate(model, tokens[:512], max_tokens=1).report
        decode = mlxquant.generate(model, tokens[:16], max_tokens=129).report
        print(f"prefill {prefill.prompt_tps:.1f} tokens/s; {decode.line()}", flush=True)
        reports.append((prefill, decode))
    reports = reports[1:]
    quality = mlxquant.evaluate(model, text, windows=40,
                                progress=lambda done, total, value: print(done, value, flush=True))
    last = reports[-1][1]
    print(save("default-model-cpu", model=DEFAULT_MODEL,
               prefill_512_tps=spread([prefill.prompt_tps for prefill, _ in reports]),
               decode_128_tps=spread([decode.generation_tps for _, decode in reports
                                      if decode.generation_tps is not None]),
               bytes_per_token=last.bytes_per_token, ceiling_gb_per_s=last.ceiling_gb_per_s,
               ceiling_source=last.ceiling_source, peak_memory_gb=last.peak_memory_gb,
               quality=asdict(quality)))


if __name__ == "__main__":
    main()
