"""Replicated layers and their controls on the default model, calibrated only and tuned.

    python benchmarks/replicas.py --text WIKITEXT --other C4 --data FILE [FILE …] [--model NAME]
        [--out NAME] [--plan NAME …] [--steps 300] [--batch-size 32] [--codes 0] [--written 0]
        [--conversations 0] [--tune-blocks N] [--samples 128] [--windows 40] [--keep FOLDER]

Every row is quantised, measured, tuned for the same number of steps, and measured again, on the
text of the protocol wt2-40 and on one that took no part. Rows are saved one by one; what lies in
FOLDER from an earlier run is tuned without being made and measured again.
"""

import argparse
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from record import (  # first: it loads the BLAS before MLX
    Row,
    save,
    tuning_of,
    tuning_options,
)

# isort: split
import mlx.core as mx

import mlxquant
from mlxquant.layers.repeated import parse_repeat
from mlxquant.model.loading import LanguageModel, load
from mlxquant.quantise.job import Job, Target, Text
from mlxquant.report.divergence import divergence
from mlxquant.sources.names import DEFAULT_MODEL

COMMON: Row = dict(rotation="online", propagation="corrected")
REPLICA: Row = dict(method="replica", **COMMON)
GROUPS: Row = dict(method="gptq", bits=2, **COMMON)
PLAN: dict[str, Row] = {
    "replica-2": REPLICA | dict(bits=2, replicas=2),
    "replica-4": REPLICA | dict(bits=2, replicas=4),
    "replica-4-g16": REPLICA | dict(bits=2, replicas=4, replica_group=16),
    "replica-8": REPLICA | dict(bits=2, replicas=8),
    "replica-8-g16": REPLICA | dict(bits=2, replicas=8, replica_group=16),
    **{f"budget-{target:.2f}{end}": REPLICA | dict(bits=2, target=Target(target)) | group
       for target in (2.10, 2.20, 2.40, 2.50, 3.00, 3.05)
       for end, group in (("", {}), ("-g16", dict(replica_group=16)))},
    "budget-1.75": REPLICA | dict(bits="ternary", target=Target(1.75)),
    "budget-1.20": REPLICA | dict(bits=1, target=Target(1.20)),
    **{f"{gigabytes}-gb": REPLICA | dict(bits=2, target=Target(gigabytes=gigabytes))
       for gigabytes in (0.0675, 0.2, 0.6, 0.76)},
    "ternary-4": REPLICA | dict(bits="ternary", replicas=4),
    "1-bit-5": REPLICA | dict(bits=1, replicas=5),
    "groups-192": GROUPS | dict(group_size=192),
    "groups-64": GROUPS | dict(group_size=64),
    "groups-32": GROUPS | dict(group_size=32),
    "groups-budget-2.20": GROUPS | dict(group_size=192, target=Target(2.20)),
    "groups-budget-2.40": GROUPS | dict(group_size=192, target=Target(2.40)),
    "groups-budget-3.00": GROUPS | dict(group_size=192, target=Target(3.00)),
    "replica-4-3bit": REPLICA | dict(bits=3, replicas=4),
    "replica-4-4bit": REPLICA | dict(bits=4, replicas=4),
    "replica-4-unrotated": dict(method="replica", propagation="corrected", bits=2, replicas=4),
    "replica-4-unrefined": REPLICA | dict(bits=2, replicas=4, refine=0),
    "replica-4-twice": REPLICA | dict(bits=2, replicas=4,
                                      repeats=tuple(parse_repeat("8:16x2").one_by_one())),
}


def quality(folder: Path, teacher: LanguageModel, a: argparse.Namespace) -> Row:
    """What a folder scores on both texts."""
    student = load(str(folder), dense=True)
    main = divergence(student, teacher, Path(a.text), windows=a.windows)
    other = divergence(student, teacher, Path(a.other))
    return dict(bits_per_weight=main.bits_per_weight, file_bytes=main.file_bytes,
                perplexity=main.perplexity, kl_mean=main.kl_mean, kl_stderr=main.kl_stderr,
                top1_agreement=main.top1_agreement, other_perplexity=other.perplexity,
                other_kl_mean=other.kl_mean, other_top1_agreement=other.top1_agreement,
                other_reference=other.reference_perplexity)


def rows_of(name: str, a: argparse.Namespace, teacher: LanguageModel,
            folder: Path) -> Iterator[Row]:
    """The row calibrated only, then the tuned one."""
    options = PLAN[name]
    about = dict(method=name, bits=options["bits"], group_size=options.get("group_size"),
                 rotated="rotation" in options, replicas=options.get("replicas"),
                 replica_group=options.get("replica_group"))
    if not (folder / name).exists():
        start = time.perf_counter()
        job = Job(text=Text(tuple(a.data), a.samples)).changed(
            tune_blocks=a.tune_blocks > 0, tune_steps=a.tune_blocks or None, **options)
        made = mlxquant.quantize(a.model, folder / name, job, progress=tell("block"))
        about_run = dict(tuned=False, block_steps=a.tune_blocks, steps=0,
                         seconds=time.perf_counter() - start, notes=made.notes)
        yield about | about_run | quality(folder / name, teacher, a)
    if not a.steps:
        return
    settings = dict(codes=a.codes, written=a.written, conversations=a.conversations)
    tuned = folder / "-".join(map(str, (name, "tuned", a.steps, *settings.values())))
    result = mlxquant.tune(str(folder / name), tuned, tuning_of(a, a.model), progress=tell("step"))
    about_run = dict(tuned=True, seconds=result.seconds, steps=a.steps, batch_size=a.batch_size,
                     **settings, divergence_before=result.divergence_before,
                     divergence_after=result.divergence_after)
    yield about | about_run | quality(tuned, teacher, a)


def tell(what: str) -> Callable[..., None]:
    """A line now and then: how far, and the value that comes with it (seconds, or a loss)."""
    def progress(done: int, total: int, value: float, stage: str = what) -> None:
        if done in (1, 2) or done % max(1, total // 8) == 0:
            print(f"  {stage} {done}/{total}: {value:.4g}, {time.strftime('%H:%M:%S')}", flush=True)
    return progress


def main() -> None:
    options = tuning_options(__doc__)
    options.add_argument("--text", required=True)
    options.add_argument("--other", required=True)
    options.add_argument("--data", nargs="+", required=True)
    options.add_argument("--model", default=DEFAULT_MODEL)
    options.add_argument("--out", default="replicas")
    options.add_argument("--plan", nargs="+", default=list(PLAN), choices=PLAN)
    options.add_argument("--tune-blocks", type=int, default=0, metavar="STEPS")
    options.add_argument("--samples", type=int, default=128)
    a = options.parse_args()
    teacher = load(a.model, dense=True)
    rows = []
    with tempfile.TemporaryDirectory(prefix="mlxquant-") as scratch:
        for name in a.plan:
            try:
                for row in rows_of(name, a, teacher, a.keep or Path(scratch)):
                    rows.append(row)
                    print(f"{name:20} {'tuned' if row['tuned'] else '':6} "
                          f"{row['bits_per_weight']:6.3f} bpw {row['perplexity']:10.3f} ppl  "
                          f"KL {row['kl_mean']:.4f}  other {row['other_perplexity']:.2f}  "
                          f"{row['seconds']:.1f} s", flush=True)
                    save(a.out, windows=a.windows, samples=a.samples, rows=rows)
            except Exception:  # one row's failure must not cost the others' measurements
                traceback.print_exc()
            mx.clear_cache()
            if not a.keep:
                for made in Path(scratch).iterdir():
                    shutil.rmtree(made, ignore_errors=True)


if __name__ == "__main__":
    main()
