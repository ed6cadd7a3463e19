"""Whole-model tuning: its seconds and peaks by stage beside what was foretold, and its gain.

    python benchmarks/tuning.py FOLDER --teacher MODEL --text WIKITEXT --data FILE [FILE …]
        [--steps 300] [--batch-size 32] [--length 512] [--codes 0] [--written 0]
        [--conversations 0] [--windows 40] [--top 128] [--keep OUT] [--out NAME]
    python benchmarks/tuning.py --teacher MODEL --conversations 2048 [--length 512]
    python benchmarks/tuning.py --shapes
    python benchmarks/tuning.py --measure llama-3.1-8b --batch-size 1 [--length 512] [--steps 3]

The first quantises nothing: FOLDER is what ``mlxquant quantize`` made. The second only writes
conversations, and the third prints what tuning known shapes takes, by the formula. The fourth
tunes a shape of random weights towards another one, to measure that.
"""

import argparse
import gc
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from record import save, tuning_of, tuning_options  # first: it loads the BLAS before MLX

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import shapes
from mlx.utils import tree_flatten, tree_unflatten

import mlxquant
from mlxquant.codes.spec import Spec
from mlxquant.codes.width import Width
from mlxquant.layers import outline
from mlxquant.layers.by_block import judged
from mlxquant.layers.trainable import Trainable, TrainedParts
from mlxquant.model.loading import load, open_lazily
from mlxquant.quantise.conversations import converse
from mlxquant.quantise.job import Job
from mlxquant.quantise.rehearsal import planned
from mlxquant.report.divergence import divergence
from mlxquant.sources.names import resolve
from mlxquant.tuning import predictions
from mlxquant.tuning.distill import Distillation
from mlxquant.tuning.room import Room, Step
from mlxquant.tuning.settings import Schedule, Tuning
from mlxquant.tuning.teacher import Teacher

SHAPES = {name: shapes.SHAPES[name] for name in ("smollm2-135m", "qwen2.5-1.5b", "llama-3.1-8b")}
SHAPES["qwen2.5-32b"] = shapes.llama(5120, 64, 27648, (40, 8), 152064, False)
DTYPE = mx.bfloat16 if mx.default_device() == mx.gpu else mx.float32  # that tuning computes in
QUANTISED = Job(Spec(bits=Width.TWO, method="replica", replicas=4, rotation="online"))


class Stages:
    """Seconds and peak bytes of each stage, by its name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        self._last = time.perf_counter()

    def note(self, stage: str, done: int, total: int, value: float | None = None) -> None:
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self.peaks[stage] = max(self.peaks.get(stage, 0), mx.get_peak_memory())
        mx.reset_peak_memory()
        self._last = now
        if done in (1, 2, total) or done % max(1, total // 8) == 0:
            said = "" if value is None else f", {value:.4f} nats"
            print(f"  {stage} {done}/{total}{said}, {self.seconds[stage]:.1f} s, "
                  f"peak {self.peaks[stage] / 1e9:.2f} GB", flush=True)


def foretold(a: argparse.Namespace, tuning: Tuning) -> dict[str, float]:
    """GB that the formula gives for each stage."""
    network, config = open_lazily(resolve(a.folder))
    teacher = Teacher(a.teacher, DTYPE)
    student = Trainable(network, DTYPE, TrainedParts(codes=tuning.codes))
    return gigabytes(Room(student, teacher.network, config["vocab_size"], teacher.whole),
                     Step.of(tuning, config))


def gigabytes(room: Room, step: Step) -> dict[str, float]:
    return {"predictions": room.teacher_bytes(step) / 1e9,
            "training": room.student_bytes(step) / 1e9}


def tune(a: argparse.Namespace, output: Path) -> dict[str, Any]:
    tuning = tuning_of(a, a.teacher)
    said, stages = foretold(a, tuning), Stages()
    result = mlxquant.tune(
        a.folder, output, tuning,
        progress=lambda done, total, loss: stages.note("training", done, total, loss),
        writing=lambda done, total, kind: stages.note(kind, done, total))
    scores: dict[str, Any] = {}
    teacher = load(a.teacher, dense=True)
    for name, folder in (("before", a.folder), ("after", str(output))):
        found = divergence(load(folder, dense=True), teacher, Path(a.text), windows=a.windows)
        scores |= {f"perplexity_{name}": found.perplexity, f"kl_{name}": found.kl_mean,
                   f"top1_{name}": found.top1_agreement}
        print(f"{name}: perplexity {found.perplexity:.3f} of {found.reference_perplexity:.3f}, "
              f"KL {found.kl_mean:.4f}, same top token {100 * found.top1_agreement:.1f} %")
    peaks = {stage: peak / 1e9 for stage, peak in stages.peaks.items()}
    for stage, seconds in stages.seconds.items():
        expected = f", foretold {said[stage]:.2f}" if stage in said else ""
        print(f"{stage:13} {seconds:8.1f} s, peak {peaks[stage]:.2f} GB{expected}")
    return scores | dict(
        steps=a.steps, batch_size=a.batch_size, learning_rate=a.learning_rate, length=a.length,
        codes=a.codes, written=a.written,
        conversations=a.conversations, top=a.top, windows=a.windows, seconds=stages.seconds,
        total_seconds=result.seconds, peak_gb=peaks, foretold_gb=said,
        divergence_before=result.divergence_before, divergence_after=result.divergence_after)


def measure(a: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Peaks of a shape of random weights and codes, beside what the formula gives."""
    config = shapes.SHAPES[a.measure]
    step = Step(a.batch_size, a.length, config["num_attention_heads"], a.codes > 0)
    batches = np.random.default_rng(0).integers(0, config["vocab_size"],
                                                (a.steps + 1, a.batch_size, a.length))
    kept = predictions.Predictions(folder, list(batches), config["vocab_size"])
    small = planned(outline.network_of(config), config, QUANTISED)
    said = gigabytes(Room(Trainable(small, DTYPE, TrainedParts(codes=a.codes)),
                          outline.network_of(config), config["vocab_size"], True), step)
    del small
    stages = Stages()
    teacher = filled(outline.network_of(config), DTYPE)
    mx.reset_peak_memory()
    kept.write(partial(judged, teacher), 1,
               lambda done, total: stages.note("predictions", done, total))
    del teacher
    gc.collect()
    mx.clear_cache()
    student = Trainable(filled(planned(outline.network_of(config), config, QUANTISED), mx.float16),
                        DTYPE, TrainedParts(codes=a.codes))
    mx.reset_peak_memory()
    Distillation(student, kept, Schedule(a.steps, a.batch_size, check_every=a.steps)).run(
        lambda done, total, loss: stages.note("training", done, total, loss))
    peaks = {stage: peak / 1e9 for stage, peak in stages.peaks.items()}
    for stage, peak in peaks.items():
        print(f"{a.measure} {stage}: peak {peak:.2f} GB, foretold {said[stage]:.2f}")
    return dict(shape=a.measure, steps=a.steps, batch_size=a.batch_size, length=a.length,
                codes=a.codes, seconds=stages.seconds, peak_gb=peaks, foretold_gb=said)


def filled(network: nn.Module, dtype: mx.Dtype) -> nn.Module:
    """The network with random weights in ``dtype`` and random codes, one array after the other."""
    for path, like in tree_flatten(network.parameters()):
        if mx.issubdtype(like.dtype, mx.floating):
            array = (mx.ones(like.shape) if path.endswith("norm.weight")
                     else mx.random.normal(like.shape) * 0.02).astype(dtype)
        else:
            array = mx.random.randint(0, 1 << 30, like.shape).astype(like.dtype)
        mx.eval(array)
        network.update(tree_unflatten([(path, array)]))
    return network


def talk(a: argparse.Namespace) -> None:
    """Conversations alone, and the first of them."""
    teacher, stages = Teacher(a.teacher, DTYPE).model, Stages()
    rows = converse(teacher, a.conversations, a.length,
                    progress=lambda done, total: stages.note("conversations", done, total))
    print(teacher.tokenizer.decode(rows[0].tolist()))
    print(f"{len(rows)} windows of {a.length} tokens in {stages.seconds['conversations']:.1f} s, "
          f"{rows.size / stages.seconds['conversations']:.0f} tokens/s")


def known_shapes() -> None:
    """GB by the formula, in bfloat16, for 2 bits and 4 replicas; the original in 16 bits."""
    print("| shape | sequences of 512 | original, predicting | block by block | codes stay "
          "| codes move |")
    print("| --- | --: | --: | --: | --: | --: |")
    for name, config in SHAPES.items():
        teacher = outline.network_of(config)
        rooms = [Room(Trainable(planned(outline.network_of(config), config, QUANTISED),
                                mx.bfloat16, TrainedParts(codes=codes)), teacher,
                      config["vocab_size"], whole=True) for codes in (0.0, 0.2)]
        for size in (1, 8):
            still, moving = (Step(size, 512, config["num_attention_heads"], moves)
                             for moves in (False, True))
            print(f"| {name} | {size} | {rooms[0].teacher_bytes(still) / 1e9:.1f} | "
                  f"{replace(rooms[0], whole=False).teacher_bytes(still) / 1e9:.1f} | "
                  f"{rooms[0].student_bytes(still) / 1e9:.1f} | "
                  f"{rooms[1].student_bytes(moving) / 1e9:.1f} |")


def main() -> None:
    options = tuning_options(__doc__)
    options.add_argument("folder", nargs="?")
    options.add_argument("--teacher")
    options.add_argument("--text")
    options.add_argument("--data", nargs="+")
    options.add_argument("--top", type=int, default=predictions.TOP,
                         help="successors that are kept of each token's predictions")
    options.add_argument("--out", default="tuning")
    options.add_argument("--shapes", action="store_true")
    options.add_argument("--measure", choices=shapes.SHAPES)
    a = options.parse_args()
    predictions.TOP = a.top
    if a.shapes:
        known_shapes()
    elif a.measure:
        with tempfile.TemporaryDirectory(prefix="mlxquant-") as scratch:
            save(a.out, **measure(a, Path(scratch)))
    elif not a.folder:
        talk(a)
    else:
        with tempfile.TemporaryDirectory(prefix="mlxquant-") as scratch:
            save(a.out, **tune(a, a.keep or Path(scratch) / "tuned"))


if __name__ == "__main__":
    main()
