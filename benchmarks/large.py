"""Quantise a model of random weights that is too big to hold, and say how much memory that took.

    python benchmarks/large.py --shape 8b --method rtn [--blocks 32] [--folder DIR]

The checkpoint is written shard by shard (one random block, again and again, in float16), quantised
in a process of its own, whose peak resident memory is the result, and removed. Calibration is a
handful of short sequences: time and memory of one block do not depend on what the numbers are.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from record import parser, save  # first: it loads the BLAS before MLX

# isort: split
import mlx.core as mx
import numpy as np
import shapes

from mlxquant.base import tensor_file
from mlxquant.base.storage import require_space, write_json
from mlxquant.codes.spec import Spec
from mlxquant.model.loading import open_lazily
from mlxquant.quantise import calibration, room
from mlxquant.quantise.assembly import blocks_of
from mlxquant.quantise.job import Job
from mlxquant.quantise.pipeline import Run
from mlxquant.sources.checkpoint import folder_bytes

SHAPES = {"tiny": "tiny", "1b": "llama-3.2-1b", "8b": "llama-3.1-8b"}


def write_model(folder: Path, config: dict) -> None:
    width, inner = config["hidden_size"], config["intermediate_size"]
    keys = width // config["num_attention_heads"] * config["num_key_value_heads"]
    random = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> mx.array:
        drawn = random.standard_normal((rows, columns), np.float32)
        return mx.array(drawn * 0.02).astype(mx.float16)

    linears = {"self_attn.q_proj": (width, width), "self_attn.k_proj": (keys, width),
               "self_attn.v_proj": (keys, width), "self_attn.o_proj": (width, width),
               "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width),
               "mlp.down_proj": (width, inner)}
    block = {f"{path}.weight": matrix(*shape) for path, shape in linears.items()}
    block |= {f"{norm}.weight": mx.ones(width, mx.float16)
              for norm in ("input_layernorm", "post_attention_layernorm")}
    folder.mkdir(parents=True)
    for index in range(config["num_hidden_layers"]):
        tensor_file.write(
            folder / f"model-block-{index:03d}.safetensors",
            {f"model.layers.{index}.{path}": array for path, array in block.items()},
            {"format": "mlx"})
    ends = {"model.embed_tokens.weight": matrix(config["vocab_size"], width),
            "model.norm.weight": mx.ones(width, mx.float16)}
    if not config["tie_word_embeddings"]:
        ends["lm_head.weight"] = ends["model.embed_tokens.weight"]
    tensor_file.write(folder / "model-ends.safetensors", ends, {"format": "mlx"})
    write_json(folder / "config.json", config)


def quantise(folder: Path, method: str, bits: int, samples: int, length: int) -> dict:
    """Quantise the model in ``folder``: its peak memory in GB (10⁹ bytes), and time."""
    job = Job(Spec(bits=bits, method=method),
              propagation="float" if method == "rtn" else "quantised")
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    drawn = np.random.default_rng(1).integers(0, vocabulary, (samples, length))
    tokens = calibration.Calibration(drawn, "random")
    network, config = open_lazily(folder)
    blocks = blocks_of(network)
    before = peak_rss_gb()
    block = room.working_bytes(blocks[0].module)
    times, start = [], time.perf_counter()

    def progress(done: int, total: int, seconds: float, stage: str) -> None:
        times.append(seconds)
        print(f"block {done} of {total}: {seconds:.0f} s, peak {peak_rss_gb():.2f} GB",
              file=sys.stderr, flush=True)

    outcome = Run(folder, folder.with_name("out"), job, tokens, {}).make(network, blocks, config,
                                                                         progress)
    return {"peak_rss_gb": peak_rss_gb(), "rss_before_gb": before,
            "block_and_moments_gb": block / 1e9, "mlx_peak_gb": outcome.peak_memory / 1e9,
            "seconds": time.perf_counter() - start,
            "seconds_a_block": (times[-1] - times[0]) / max(1, len(times) - 1),
            "output_error": outcome.added}


def peak_rss_gb() -> float:
    """The most memory this process has held, in GB (10⁹ bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--shape", choices=SHAPES, default="1b")
    options.add_argument("--method", default="rtn")
    options.add_argument("--bits", type=int, default=4)
    options.add_argument("--blocks", type=int, help="Fewer than the shape has.")
    options.add_argument("--samples", type=int, default=4)
    options.add_argument("--length", type=int, default=32)
    options.add_argument("--folder", type=Path, help="Default: a temporary one.")
    options.add_argument("--only", choices=["write", "quantise"], help=argparse.SUPPRESS)
    a = options.parse_args()
    shape = shapes.SHAPES[SHAPES[a.shape]]
    config = shape | {"num_hidden_layers": a.blocks or shape["num_hidden_layers"]}
    if a.only == "write":  # each in its own process: one that starts another hands it its peak
        write_model(a.folder, config)
        return
    if a.only:
        print(json.dumps(quantise(a.folder, a.method, a.bits, a.samples, a.length)))
        return
    base = Path(tempfile.mkdtemp(prefix="mlxquant-large-", dir=a.folder))
    try:
        width, inner = config["hidden_size"], config["intermediate_size"]
        weights = config["num_hidden_layers"] * (2.5 * width ** 2 + 3 * width * inner)
        require_space(base, int(4 * weights), "the model and its quantised copy")
        folder = base / "model"
        start = time.perf_counter()
        command = [sys.executable, __file__, *sys.argv[1:], "--folder", str(folder), "--only"]
        subprocess.run([*command, "write"], check=True)
        size = folder_bytes(folder)
        print(f"wrote {size / 1e9:.1f} GB in {time.perf_counter() - start:.0f} s",
              file=sys.stderr, flush=True)
        made = json.loads(subprocess.run([*command, "quantise"], check=True,
                                         stdout=subprocess.PIPE).stdout)
        made["output_gb"] = folder_bytes(base / "out") / 1e9
    finally:
        shutil.rmtree(base)
    blocks = config["num_hidden_layers"]
    print(f"{a.shape}, {blocks} blocks, {a.method}: {size / 1e9:.1f} GB of weights, "
          f"peak {made['peak_rss_gb']:.2f} GB, {made['seconds']:.0f} s")
    name = f"large-{a.shape}-{a.method}" + (f"-{blocks}-blocks" if a.blocks else "")
    print(save(name, shape=a.shape, blocks=blocks, method=a.method, bits=a.bits,
               samples=a.samples, length=a.length, source_gb=size / 1e9, **made))


if __name__ == "__main__":
    main()
