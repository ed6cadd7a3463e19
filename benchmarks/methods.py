"""Every method and width on the default model, by the protocol wt2-40.

    python benchmarks/methods.py --text WIKITEXT --data FILE [FILE …] [--model NAME] [--out NAME]
        [--windows 40] [--samples 128] [--no-original]
        [--plan METHOD[,METHOD…]:BITS[,BITS…] …]

One row at a time is printed and saved, so that a run that is cut short keeps
what it measured. Without --plan the README's table is made.
"""

import argparse
import traceback

from record import RESULTS, save

from mlxquant.codes.width import Width
from mlxquant.quantise.job import Job, Text
from mlxquant.report.comparison import as_dicts, compare, plot
from mlxquant.sources.names import DEFAULT_MODEL

PLAN = ["rtn,w8a8,smoothquant,gptq:8", "rtn,awq,gptq,gptq-corrected,gptq-rotated,gptq-fused:4",
        "rtn,awq,gptq,gptq-corrected,gptq-rotated,gptq-fused:3",
        "rtn,awq,gptq,gptq-corrected,gptq-rotated,gptq-fused:2",
        "gptq,gptq-rotated:ternary", "gptq,gptq-rotated:1"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--text", required=True)
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--out", default="methods")
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--no-original", dest="original", action="store_false")
    parser.add_argument("--plan", nargs="+", default=PLAN)
    arguments = parser.parse_args()
    from pathlib import Path

    rows = []
    for step in arguments.plan:
        methods, _, bits = step.partition(":")
        try:
            for row in compare(arguments.model, Path(arguments.text), methods=methods.split(","),
                               bits=[Width.of(b) for b in bits.split(",")], windows=arguments.windows,
                               job=Job(text=Text(tuple(arguments.data), arguments.samples)),
                               original=arguments.original and not rows,
                               progress=lambda what: print(what, flush=True)):
                rows.append(row)
                print(f"{row.method:16} {row.bits!s:8} {row.bits_per_weight:6.3f} bpw "
                      f"{row.perplexity:12.3f} ppl  KL {row.kl_mean:.4f}  {row.seconds or 0:.1f} s", flush=True)
                save(arguments.out, windows=arguments.windows, samples=arguments.samples,
                     rows=as_dicts(rows))
        except Exception:  # one method's failure must not cost the others' measurements
            traceback.print_exc()
    plot(rows, RESULTS / f"{arguments.out}.png")


if __name__ == "__main__":
    main()
