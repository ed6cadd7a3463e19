"""How long a model takes to make, and in how much memory: sizes side by side, ours and mlx-lm's.

    python benchmarks/making.py --only 1.5b 8b --ways replica gptq mlx-gptq mlx-rtn [--blocks 2]
    python benchmarks/making.py --model FOLDER|FILE.gguf --data TEXT --ways gptq mlx-gptq

Every way goes from a folder of 16 bits to a quantised folder on the same tokens, in a process of
its own, whose peaks are measured. A shape has random weights and random tokens; with ``--blocks N``
only its first N blocks are made, and what all would take is extrapolated from the pace after the
first. ``--memory 16GB`` plans as on a machine of so much: hidden states may wait on the disk.
Results are saved as they come. ``--out`` names the file in results/.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from record import Row, parser, save  # first: it loads the BLAS before MLX

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import shapes
from mlx.utils import tree_flatten
from mlx_lm.quant.gptq import gptq_quantize
from mlx_lm.utils import load_model, save_model

from mlxquant.codes.spec import Spec
from mlxquant.codes.width import Width
from mlxquant.layers import outline, traffic
from mlxquant.layers.dense import to_dense
from mlxquant.machine.memory import parse_size, peak_resident
from mlxquant.model.loading import open_lazily, open_tokenizer, vocabulary_of
from mlxquant.quantise import calibration, room
from mlxquant.quantise.assembly import blocks_of
from mlxquant.quantise.assignment import assign
from mlxquant.quantise.job import Job, Target
from mlxquant.quantise.pipeline import Run
from mlxquant.quantise.profile import WEIGHING, recording, step
from mlxquant.sources import checkpoint
from mlxquant.sources.checkpoint import KnownFolder
from mlxquant.sources.names import resolve

SHAPES = {"tiny": "tiny", "0.1b": "smollm2-135m", "0.5b": "qwen2.5-0.5b", "1.5b": "qwen2.5-1.5b",
          "8b": "llama-3.1-8b", "mixture": "qwen3-30b-a3b"}
TUNED = Job(Spec(bits=Width.TWO, method="replica", replicas=4, rotation="online"),
            propagation="corrected")
REPLICA = TUNED.changed(tune_blocks=False)
OURS = {"replica": REPLICA, "tuned": TUNED, "gptq": Job(Spec(bits=Width.FOUR, method="gptq")),
        "rtn": Job(Spec(bits=Width.FOUR, method="rtn")),
        "budget": REPLICA.changed(target=Target(bits_per_weight=2.4))}
THEIRS = ("mlx-gptq", "mlx-rtn")  # 4 bits in groups of 64, like ours


def write_random(folder: Path, config: Row) -> None:
    """A model of random weights in 16 bits, written as it is drawn."""
    mx.random.seed(0)
    network = outline.network_of(config)

    def tensors() -> Iterator[tuple[str, mx.array]]:
        for name, like in tree_flatten(network.parameters()):
            drawn = mx.random.normal(like.shape) * 0.02 if like.ndim > 1 else mx.ones(like.shape)
            yield name, drawn.astype(mx.float16)

    checkpoint.write(folder, config, tensors(), {})


def write_plain(name: str, folder: Path) -> None:
    """The model called ``name`` in 16 bits, as both sides read it."""
    source = resolve(name)
    network, config = open_lazily(source)
    network = to_dense(network)
    checkpoint.write(folder, outline.unquantised(config), (
        (path, array.astype(mx.float16)) for path, array in tree_flatten(network.parameters())),
        checkpoint.side_files(source))


def draw_tokens(folder: Path, a: argparse.Namespace) -> np.ndarray:
    """(samples, length) ids from ``--data``, or at random."""
    network, config = open_lazily(folder)
    vocabulary = vocabulary_of(network)
    if a.data:
        return calibration.from_files(open_tokenizer(folder, config), a.data, a.samples, a.length,
                                      vocabulary=vocabulary).tokens
    return np.random.default_rng(1).integers(0, vocabulary, (a.samples, a.length))


def ours(folder: Path, job: Job, tokens: np.ndarray, target: float) -> Row:
    """What ``quantize`` takes, with its profile and the time of every block."""
    ends: list[float] = []
    given = calibration.Calibration(tokens, "the benchmark's") if job.calibrated else (
        calibration.none())
    if job.target:
        job = job.changed(target=Target(bits_per_weight=target))

    def progress(done: int, total: int, seconds: float, stage: str) -> None:
        if stage == "quantising":
            ends.append(seconds)
        print(f"  {stage} {done}/{total}: {seconds:.1f} s, MLX {mx.get_active_memory() / 1e9:.2f} "
              f"GB, host {peak_resident() / 1e9:.2f} GB", file=sys.stderr, flush=True)

    with recording():
        with step(WEIGHING):
            job = assign(KnownFolder(folder), job, given, progress)
        network, config = open_lazily(folder)
        blocks = blocks_of(network)
        needs = room.needs(network, blocks, job, outline.attention_heads(config))
        run = Run(KnownFolder(folder), folder.with_name("made"), job, given, {}, asked="",
                  needs=needs)
        made = run.make(network, blocks, config, progress)
    return {"predicted_gb": needs.memory / 1e9, "on_disk_gb": needs.waiting / 1e9,
            "seconds": made.profile["seconds"]["total"], "block_ends": ends,
            "mlx_peak_gb": made.profile["peak_memory_gb"]["total"], "added_error": made.added,
            "profile": made.profile}


def theirs(folder: Path, way: str, tokens: np.ndarray) -> Row:
    """mlx-lm's GPTQ or rounding, to a folder."""
    start = time.perf_counter()
    mx.reset_peak_memory()
    network, _ = load_model(folder, lazy=True)
    if way == "mlx-gptq":
        network, _ = gptq_quantize(network, mx.array(tokens), 4, 64, 6, 64)
    else:
        nn.quantize(network, 64, 4)
    save_model(folder.with_name("made"), network)
    return {"seconds": time.perf_counter() - start, "mlx_peak_gb": mx.get_peak_memory() / 1e9}


def child(a: argparse.Namespace) -> None:
    """One process's part of the work: writing the model, or one way; its row as the last line."""
    folder = Path(a.folder)
    if a.child == "write":
        write_random(folder, config_of(a)) if a.shape else write_plain(a.model, folder)
        np.save(folder.with_name("tokens.npy"), draw_tokens(folder, a))
        return
    tokens, before = np.load(folder.with_name("tokens.npy")), peak_resident()
    if a.memory:
        mock.patch.object(room, "memory_limit", lambda: parse_size(a.memory)).start()
    row = (theirs(folder, a.child, tokens) if a.child in THEIRS else
           ours(folder, OURS[a.child].changed(samples=a.samples, length=a.length), tokens,
                a.target))
    print(json.dumps(row | {"host_peak_gb": peak_resident() / 1e9,
                            "host_before_gb": before / 1e9}))


def config_of(a: argparse.Namespace) -> Row:
    config = shapes.SHAPES[SHAPES[a.shape]]
    return config | {"num_hidden_layers": a.blocks or config["num_hidden_layers"]}


def described(a: argparse.Namespace, folder: Path) -> Row:
    """The model's row, without what was measured: weights of the body, of all blocks."""
    network, config = open_lazily(folder)
    made = len(blocks_of(network))
    whole = shapes.SHAPES[SHAPES[a.shape]]["num_hidden_layers"] if a.shape else made
    body = sum(traffic.parameters(block.module) for block in blocks_of(network))
    return {"model": a.shape or Path(a.model).name, "hidden_size": config.get("hidden_size"),
            "body_weights": body * whole / made, "blocks": whole, "made_blocks": made}


def extrapolated(row: Row) -> Row:
    """The seconds of all blocks: what was not a block's, the first, and the others at their
    mean pace; weighing in proportion. Without times of single blocks, all in proportion."""
    made, whole = row["made_blocks"], row["blocks"]
    if made == whole:
        return {"seconds_in_all": row["seconds"]}
    ends = row.get("block_ends") or []
    if len(ends) < 2:
        return {"seconds_in_all": row["seconds"] * whole / made}
    pace = (ends[-1] - ends[0]) / (len(ends) - 1)
    weighing = sum(seconds for name, seconds in row["profile"]["seconds"].items()
                   if name.startswith(WEIGHING))
    return {"seconds_in_all": row["seconds"] + (pace + weighing / made) * (whole - made)}


def line(row: Row) -> str:
    part = "" if row["made_blocks"] == row["blocks"] else (
        f" for {row['made_blocks']} of {row['blocks']} blocks, {row['seconds_in_all']:.0f} s "
        "extrapolated")
    predicted = f" (predicted {row['predicted_gb']:.2f})" if "predicted_gb" in row else ""
    steps = list(row["profile"]["seconds"].items())[1:6] if "profile" in row else []
    return (f"{row['model']} {row['way']}: {row['seconds']:.1f} s{part}, MLX peak "
            f"{row['mlx_peak_gb']:.2f} GB{predicted}, host peak {row['host_peak_gb']:.2f} GB"
            + f" ({', '.join(f'{name} {took:.1f}' for name, took in steps)})" * bool(steps))


def measure(a: argparse.Namespace, shape: str | None, rows: list[Row]) -> None:
    """Every way on one model; rows are saved as they come."""
    a.shape = shape
    base = Path(tempfile.mkdtemp(prefix="mlxquant-making-", dir=a.folder))
    given = [*sys.argv[1:], *(["--shape", shape] if shape else []), "--folder", str(base / "model")]

    def run(part: str) -> str:
        return subprocess.run([sys.executable, __file__, *given, "--child", part], check=True,
                              stdout=subprocess.PIPE, text=True).stdout

    try:
        start = time.perf_counter()
        run("write")
        model = described(a, base / "model")
        print(f"{model['model']}: {model['body_weights'] / 1e9:.2f} billion weights in "
              f"{model['blocks']} blocks, written in {time.perf_counter() - start:.0f} s",
              flush=True)
        for way in a.ways:
            try:
                row = model | {"way": way} | json.loads(run(way).splitlines()[-1])
            except subprocess.CalledProcessError as error:
                print(f"{model['model']} {way} ended with {error.returncode}", flush=True)
                continue
            finally:
                for left in base.glob("made*"):
                    shutil.rmtree(left)
            rows.append(row | extrapolated(row))
            print(line(rows[-1]), flush=True)
            save(a.out, samples=a.samples, length=a.length, random=not a.data, rows=rows)
    finally:
        shutil.rmtree(base)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--only", nargs="+", choices=SHAPES, metavar="SHAPE",
                         default=["0.1b", "0.5b", "1.5b", "8b"], help=f"Of {', '.join(SHAPES)}.")
    options.add_argument("--ways", nargs="+", choices=[*OURS, *THEIRS], metavar="WAY",
                         default=["replica", "gptq", "rtn", "mlx-gptq", "mlx-rtn"],
                         help=f"Of {', '.join([*OURS, *THEIRS])}.")
    options.add_argument("--blocks", type=int, help="Only the first so many blocks.")
    options.add_argument("--model", help="A folder or .gguf file in place of the shapes.")
    options.add_argument("--data", nargs="+", help="Calibration texts for --model.")
    options.add_argument("--samples", type=int, default=128)
    options.add_argument("--length", type=int, default=512)
    options.add_argument("--memory", help="Plan for so much; default: this machine's.")
    options.add_argument("--target", type=float, default=2.4, help="Bits per weight of a budget.")
    options.add_argument("--folder", help="Where models are written; default: a temporary folder.")
    options.add_argument("--out", default="making")
    options.add_argument("--child", help=argparse.SUPPRESS)
    options.add_argument("--shape", help=argparse.SUPPRESS)
    a = options.parse_args()
    if a.child:
        child(a)
        return
    rows: list[Row] = []
    for shape in [None] if a.model else a.only:
        measure(a, shape, rows)


if __name__ == "__main__":
    main()
