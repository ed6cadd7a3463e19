"""Every method and width on the default model, by the protocol wt2-40.

    python benchmarks/methods.py --text WIKITEXT --data FILE [FILE …] [--model NAME] [--out NAME]
        [--windows 40] [--samples 128] [--no-original]
        [--plan METHOD[,METHOD…]:BITS[,BITS…] …]

One row at a time is printed and saved, so that a run that is cut short keeps what it measured.
"""

import traceback
from dataclasses import asdict
from pathlib import Path

from record import RESULTS, parser, save

from mlxquant.codes.width import Width
from mlxquant.quantise.job import Job, Text
from mlxquant.report.comparison import ComparedRow, Evaluation, compare, plot
from mlxquant.sources.names import DEFAULT_MODEL

PLAN = ["rtn,w8a8,smoothquant,gptq:8",
        "rtn,awq,gptq,gptq-corrected,gptq-rotated,gptq-fused:4,3,2",
        "gptq,gptq-rotated:ternary,1"]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--text", required=True)
    options.add_argument("--data", nargs="+", required=True)
    options.add_argument("--model", default=DEFAULT_MODEL)
    options.add_argument("--out", default="methods")
    options.add_argument("--windows", type=int, default=40)
    options.add_argument("--samples", type=int, default=128)
    options.add_argument("--no-original", dest="original", action="store_false")
    options.add_argument("--plan", nargs="+", default=PLAN)
    arguments = options.parse_args()
    rows: list[ComparedRow] = []
    for step in arguments.plan:
        methods, _, bits = step.partition(":")
        try:
            for row in compare(arguments.model,
                               Evaluation(Path(arguments.text), windows=arguments.windows),
                               methods=methods.split(","),
                               bits=[Width.of(b) for b in bits.split(",")],
                               job=Job(text=Text(tuple(arguments.data), arguments.samples)),
                               original=arguments.original and not rows,
                               progress=lambda what: print(what, flush=True)):
                rows.append(row)
                print(f"{row.method:16} {row.bits or ''!s:8} {row.bits_per_weight:6.3f} bpw "
                      f"{row.perplexity:12.3f} ppl  KL {row.kl_mean:.4f}  {row.seconds or 0:.1f} s",
                      flush=True)
                save(arguments.out, windows=arguments.windows, samples=arguments.samples,
                     rows=list(map(asdict, rows)))
        except Exception:  # one method's failure must not cost the others' measurements
            traceback.print_exc()
    plot(rows, RESULTS / f"{arguments.out}.png")


if __name__ == "__main__":
    main()
