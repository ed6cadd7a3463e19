"""``mlxquant bench`` with its result kept, and random models of a known shape.

    python benchmarks/bench.py MODEL … [-p 512] [-n 128] [-r 5] [-d 0 …] [-b 1 …] [--replicas]
        [--out NAME]
    python benchmarks/bench.py --table

A MODEL is what ``mlxquant bench`` takes, or SHAPE:FORM, random weights of a shape of ``shapes.py``:
llama-3.1-8b:16, :8, :4, … (affine, groups of 64) or :2-k4 and :2-k8-g16 (replicas). Every record is
saved as soon as it is there in ``results/bench-NAME.json``, with what ``mlxquant probe`` measured
(``--replicas``: the free replicas too). ``--table`` prints the Markdown of all that are kept and
draws the roofline of each.
"""

import re
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from record import RESULTS, parser, read, save  # first: it loads the BLAS before MLX

# isort: split
import mlx.core as mx
from shapes import SHAPES

import mlxquant
from mlxquant.codes.spec import Spec
from mlxquant.codes.width import Width
from mlxquant.layers import outline
from mlxquant.layers.dense import to_dense
from mlxquant.layers.pack import pack
from mlxquant.machine import chips
from mlxquant.machine.system import device
from mlxquant.model.loading import LanguageModel, load, open_lazily
from mlxquant.quantise.job import Job
from mlxquant.quantise.rehearsal import planned
from mlxquant.report import bench_output
from mlxquant.report.bench import Record
from mlxquant.runtime import probe
from mlxquant.sources.names import DEFAULT_MODEL, resolve


class Vocabulary:
    """All that is needed of a tokenizer here: how many tokens there are."""

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size


def open_model(name: str, as_mlx_lm: bool = False) -> LanguageModel:
    """A model by name, or SHAPE:FORM with random weights; ``as_mlx_lm`` leaves the network as
    mlx-lm runs it."""
    known, _, form = name.partition(":")
    if not form or known not in SHAPES:
        return as_stored(name) if as_mlx_lm else load(name)
    config = SHAPES[known]
    found = re.fullmatch(r"(\d+|ternary)(?:-k(\d+)(?:-g(\d+))?)?", form)
    if found is None:
        raise SystemExit(f"{name}: write for example {known}:4 or {known}:2-k4")
    mx.random.seed(0)
    spec: Spec | None = None
    if found[2]:
        spec = Spec(Width.of(found[1]), method="replica", rotation="online",
                    replicas=int(found[2]), replica_group=int(found[3] or 0))
    elif found[1] != "16":
        spec = Spec(Width.of(found[1]), method="rtn")
    network = outline.network_of(config)
    if spec is not None:
        network = planned(network, config, Job(spec, embedding_bits=8))
    if not as_mlx_lm:
        network = to_dense(network) if device() == "cpu" else pack(network)  # as ``load`` does
    mx.eval(network.parameters())
    mx.clear_cache()
    return LanguageModel(name, Path(), network, Vocabulary(config["vocab_size"]), config)


def as_stored(name: str) -> LanguageModel:
    """A model by name, its network as mlx-lm runs it."""
    folder = resolve(name)
    network, config = open_lazily(folder)
    mx.eval(network.parameters())
    return LanguageModel(name, folder, network, Vocabulary(config["vocab_size"]), config)


def table() -> str:
    """The Markdown of every result that is kept."""
    parts = []
    for path in sorted(RESULTS.glob("bench-*.json")):
        result = read(path.stem)
        records = [Record(**row) for row in result["records"]]
        draw(path.stem, records, result["probe"])
        parts.append(f"{bench_output.markdown(records)}\n\n"
                     f"Measured {result['date']}: `{result['command']}`")
    return "\n\n".join(parts)


def draw(name: str, records: list[Record], measured: dict[str, Any]) -> None:
    chip = chips.of(records[0].chip, records[0].gpu_cores)
    bench_output.plot(records, chip, measured["product_tflops"], RESULTS / f"{name}.png")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("models", nargs="*", default=[DEFAULT_MODEL])
    options.add_argument("-p", type=int, default=512)
    options.add_argument("-n", type=int, default=128)
    options.add_argument("-r", type=int, default=5)
    options.add_argument("-d", type=int, nargs="+", default=[0])
    options.add_argument("-b", type=int, nargs="+", default=[1])
    options.add_argument("--replicas", action="store_true")
    options.add_argument("--out", default="cpu")
    options.add_argument("--table", action="store_true")
    arguments = options.parse_args()
    if arguments.table:
        print(table())
        return

    def tell(done: int, total: int, value: float) -> None:
        print(f"replicas, widths {done}/{total}: {value:.1f} µs", flush=True)

    measured = probe.measured(refresh=True, replicas=arguments.replicas, progress=tell)
    print(f"reads {measured.ceiling.gb_per_s:.1f} GB/s: {measured.readers}", flush=True)

    def keep(records: list[Record]) -> None:
        save(f"bench-{arguments.out}", probe=asdict(measured),
             records=[asdict(record) for record in records])
        last = records[-1]
        print(f"{last.model} {last.test}: {last.tps_mean:.2f} tokens/s, {last.gb_per_s:.1f} GB/s, "
              f"{last.percent_of_probe:.0f} % of measured", flush=True)

    records = mlxquant.bench(
        [partial(open_model, name) for name in arguments.models], prompt=arguments.p,
        generated=arguments.n, repetitions=arguments.r, depths=arguments.d,
        batches=arguments.b, on_record=keep)
    print(bench_output.markdown(records))


if __name__ == "__main__":
    main()
