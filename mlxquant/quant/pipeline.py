"""From a model folder to a quantised one, block by block.

Only one block is dense in memory at a time. Finished blocks wait in
``OUT.partial``; a killed job run again with the same settings goes on at the
block it was in and ends with the same bytes.
"""

import hashlib
import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Callable, Iterator

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from mlxquant import __version__, checkpoint
from mlxquant.errors import BadValue, MlxquantError, Unsupported
from mlxquant.layers import formats
from mlxquant.layers.dense import to_dense
from mlxquant.layers.transformed import ActivationSpec
from mlxquant.loading import load, open_lazily, open_tokenizer
from mlxquant.models import resolve
from mlxquant.quant import calibration, rotation, rtn
from mlxquant.quant.blocks import BlockResult, Context, quantise_block, rebuild
from mlxquant.quant.calibration import Calibration
from mlxquant.quant.capture import block_calls, observe
from mlxquant.quant.gptq import CORRECTION
from mlxquant.quant.spec import PLAIN_GROUPS, Overrides, Spec
from mlxquant.roofline.traffic import leaf_modules
from mlxquant.storage import new_file, write_json

PROPAGATIONS = ("float", "quantised", "corrected")
Progress = Callable[[int, int, float], None]


@dataclass(frozen=True)
class Job:
    """Everything that decides the bytes of the result.

    ``propagation`` says whose inputs a block is calibrated on: the ``float``
    model's, the ``quantised`` prefix's, or those with the target ``corrected``
    for the error already made. ``embedding_bits`` None keeps embedding and head
    as stored. ``activation`` quantises the inputs of all layers as well.
    """

    overrides: Overrides
    propagation: str = "quantised"
    embedding_bits: int | None = None
    activation: ActivationSpec | None = None
    alpha: float | None = None
    seed: int = 0

    def __post_init__(self):
        if self.propagation not in PROPAGATIONS:
            raise BadValue(f"propagation is {self.propagation!r}, allowed are {', '.join(PROPAGATIONS)}")
        methods = {self.spec.method, *(changes.get("method") for _, changes in self.overrides.rules)}
        if "smoothquant" in methods and self.activation is None:
            raise BadValue("smoothquant quantises activations too: give --activation-bits 8")

    @property
    def spec(self) -> Spec:
        return self.overrides.default


@dataclass(frozen=True)
class Outcome:
    """Where the result is, and what making it took (seconds, bytes)."""

    folder: Path
    seconds: float
    peak_memory: int


def quantize(name: str, output: str | Path, *, method: str = "gptq", bits: int | str = 4,
             group_size: int = 64, rotation: str | None = None, data: list[str] | None = None,
             samples: int = calibration.SAMPLES, sequence_length: int = calibration.SEQUENCE_LENGTH,
             symmetric: bool = False, act_order: bool = False, propagation: str = "quantised",
             overrides: tuple[tuple[str, dict], ...] = (), embedding_bits: int | None = None,
             activation: ActivationSpec | None = None, alpha: float | None = None, seed: int = 0,
             revision: str | None = None, progress: Progress = lambda *_: None) -> Outcome:
    """Quantise the model called ``name`` into the new folder ``output``.

    ``data`` are calibration texts (files or ``hf://datasets/…``); without any the
    model writes its own. Raises ``BadValue`` for an impossible combination, and
    what ``resolve`` raises. See ``Spec`` and ``Job`` for the options.
    """
    spec = Spec(bits=bits, group_size=group_size, symmetric=symmetric, method=method,
                act_order=act_order, rotation=rotation)
    job = Job(Overrides(spec, overrides), propagation, embedding_bits, activation, alpha, seed)
    folder = resolve(name, revision=revision)
    network, config = open_lazily(folder)
    _check(network, config, job)
    if data:
        tokens = calibration.from_files(open_tokenizer(folder, config), data, samples,
                                        sequence_length, seed)
    else:
        tokens = calibration.self_written(load(name, revision=revision), samples, sequence_length, seed)
    return run(folder, Path(output), job, tokens, progress)


def run(folder: Path, output: Path, job: Job, tokens: Calibration, progress: Progress) -> Outcome:
    """Quantise a resolved folder; see ``quantize``."""
    if output.exists() and (output.is_file() or any(output.iterdir())):
        raise MlxquantError(f"{output} already exists; choose another output path or remove it")
    start = time.perf_counter()
    mx.reset_peak_memory()
    network, config = open_lazily(folder)
    dtype = _stored_dtype(network)
    partial = _open_partial(output, folder, job, tokens)
    turn = None
    ends: dict[str, mx.array] = {}
    if job.spec.rotation == "fused":
        turn = rotation.orthogonal(config["hidden_size"], job.seed)
    context = Context(job.overrides, config["model_type"], dtype, job.seed,
                      CORRECTION if job.propagation == "corrected" else 0.0, job.activation, job.alpha)
    results = _blocks(network, context, job, tokens, partial, turn, start, progress)
    plain, layers, files = {}, {}, []
    for file, result in results:
        plain |= result.plain
        layers |= result.layers
        files.append(file)
    if turn is not None:
        ends, config = rotation.rotate_ends(network, config, turn)
    outside, widths = _outside(network, ends, job, dtype)
    config = _config(config, job, plain | widths, layers, tokens)

    def tensors() -> Iterator[tuple[str, mx.array]]:
        yield from outside.items()
        for file in files:
            yield from mx.load(str(file)).items()

    others = {p.name: p.read_bytes() for p in folder.iterdir()
              if p.suffix in (".json", ".jinja", ".txt", ".model", ".tiktoken")
              and p.name not in ("config.json", "model.safetensors.index.json")}
    checkpoint.write(output, config, tensors(), others)
    shutil.rmtree(partial)
    return Outcome(output, time.perf_counter() - start, mx.get_peak_memory())


def _check(network: nn.Module, config: dict, job: Job) -> None:
    """Refuse what cannot work before any calibration runs."""
    if config["model_type"] == "mlxquant":
        raise Unsupported("the model is already quantised by mlxquant; start from the original")
    if job.spec.rotation == "fused":
        rotation.check(config)
    for index, block in enumerate(network.layers):
        for path, module in leaf_modules(block):
            if isinstance(module, (SwitchLinear, QuantizedSwitchLinear)):
                raise Unsupported(f"model.layers.{index}.{path} holds a mixture's experts, which "
                                  "quantize does not cover yet")
            if isinstance(module, (nn.Linear, nn.QuantizedLinear)):
                full = f"model.layers.{index}.{path}"
                columns = module.weight.shape[1] * 32 // getattr(module, "bits", 32)
                job.overrides.spec_for(full).group_for(columns, full)


def _blocks(network: nn.Module, context: Context, job: Job, tokens: Calibration, partial: Path,
            turn: mx.array | None, start: float, progress: Progress):
    """Yield (file, result) of every block, calibrating the next on what came before."""
    batches = tokens.batches(16 if mx.default_device() == mx.gpu else 2)
    entered = [block_calls(network, batch) for batch in batches]
    calls = entered[0][1]
    hidden = [state.astype(mx.float32) for state, _ in entered]
    if turn is not None:
        hidden = [state @ turn.T for state in hidden]
    mx.eval(hidden)
    target = list(hidden) if job.propagation == "corrected" else None
    total = len(network.layers)
    for index in range(total):
        block, (args, kwargs) = network.layers[index], calls[index]
        file = partial / f"block-{index:04d}.safetensors"
        done = file.exists()
        block = to_dense(block) if turn is None else rotation.rotate_block(block, turn)

        def through(state: mx.array, block=block) -> mx.array:
            return block(state, *args, **kwargs)

        prefix = f"model.layers.{index}"
        if done and job.propagation == "quantised":  # the float block's outputs are not needed
            outputs, targets = hidden, []
        else:
            seen, outputs, targets = observe(block, through, hidden, target, idle=done)
        if done:
            result = _read_result(file, prefix)
        else:
            result = quantise_block(block, prefix, seen, context)
            _write_result(file, prefix, result)
        if job.propagation == "float":
            hidden = outputs
        else:
            target = targets or None
            quantised = to_dense(rebuild(block, result))
            hidden = [through(state, quantised) for state in hidden]
            for state in hidden:
                mx.eval(state)
        network.layers[index] = None  # the block's memory is free again
        yield file, _prefixed(result, prefix)
        progress(index + 1, total, time.perf_counter() - start)


def _prefixed(result: BlockResult, prefix: str) -> BlockResult:
    return BlockResult({}, {f"{prefix}.{p}": e for p, e in result.plain.items()},
                       {f"{prefix}.{p}": e for p, e in result.layers.items()})


def _write_result(file: Path, prefix: str, result: BlockResult) -> None:
    metadata = {"plain": json.dumps(result.plain), "layers": json.dumps(result.layers)}
    with new_file(file) as scratch:
        named = scratch.with_suffix(".safetensors")  # the only ending that MLX writes
        mx.save_safetensors(str(named), {f"{prefix}.{p}": a for p, a in result.tensors.items()}, metadata)
        named.replace(scratch)


def _read_result(file: Path, prefix: str) -> BlockResult:
    tensors, metadata = mx.load(str(file), return_metadata=True)
    return BlockResult({p.removeprefix(f"{prefix}."): a for p, a in tensors.items()},
                       json.loads(metadata["plain"]), json.loads(metadata["layers"]))


def _open_partial(output: Path, folder: Path, job: Job, tokens: Calibration) -> Path:
    """The working folder of this very job; raises where it belongs to another."""
    weights = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in checkpoint.weight_files(folder)]
    identity = hashlib.sha256(repr((weights, asdict(job), tokens.digest, __version__,
                                    mx.__version__)).encode()).hexdigest()
    partial = output.with_name(f"{output.name}.partial")
    marker = partial / "job.json"
    if partial.exists():
        known = json.loads(marker.read_text())["job"] if marker.exists() else None
        if known != identity:
            raise MlxquantError(f"{partial} holds the unfinished work of another job; "
                                "remove it or choose another output path")
        return partial
    partial.mkdir(parents=True)
    write_json(marker, {"job": identity, **_record(job, tokens)})
    return partial


def _stored_dtype(network: nn.Module) -> mx.Dtype:
    """The floating type that the source's scales or weights have."""
    for _, array in tree_flatten(network.layers[0].parameters()):
        if array.dtype in (mx.float16, mx.bfloat16):
            return array.dtype
    return mx.float16


def _outside(network: nn.Module, ends: dict[str, mx.array], job: Job,
             dtype: mx.Dtype) -> tuple[dict[str, mx.array], dict[str, dict]]:
    """Tensors outside the blocks, as stored or at the embedding's own width, and those widths."""
    modules = {path: module for path, module in network.named_modules()
               if isinstance(module, (nn.Embedding, nn.QuantizedEmbedding, nn.Linear, nn.QuantizedLinear))
               and ".layers." not in path}
    tensors = {name: array for name, array in tree_flatten(network.parameters()) if ".layers." not in name}
    tensors |= {name: array.astype(dtype) for name, array in ends.items()}
    stored = next((getattr(m, "bits", None) for m in modules.values()), None)
    bits = job.embedding_bits or (stored if ends else None)
    if not bits:
        return tensors, {path: {"group_size": m.group_size, "bits": m.bits}
                         for path, m in modules.items() if hasattr(m, "bits")}
    spec = Spec(bits=bits, group_size=32 if bits == stored else 64, method="rtn")
    widths = {}
    for path in dict.fromkeys([*modules, *(n.removesuffix(".weight") for n, a in ends.items() if a.ndim == 2)]):
        weight = ends.get(f"{path}.weight")
        weight = rotation.expanded_weight(modules[path]) if weight is None else weight
        affine = rtn.quantise(weight, None, spec, dtype)
        tensors |= {f"{path}.weight": affine.packed(), f"{path}.scales": affine.scales.astype(dtype),
                    f"{path}.biases": affine.biases.astype(dtype)}
        widths[path] = {"group_size": affine.group, "bits": bits}
    return tensors, widths


def _config(config: dict, job: Job, plain: dict[str, dict], layers: dict[str, dict],
            tokens: Calibration) -> dict:
    default = {"group_size": job.spec.group_size, "bits": job.spec.code_bits}
    if default["group_size"] not in PLAIN_GROUPS:
        default = {"group_size": 64, "bits": 4}
    quantization = {**default, **{p: e for p, e in plain.items() if e != default}}
    config = {k: v for k, v in config.items() if k not in ("quantization", "quantization_config")}
    config |= {"quantization": quantization, "quantization_config": quantization}
    config = formats.config_with(config, layers)
    return config | {"mlxquant_record": _record(job, tokens)}


def _record(job: Job, tokens: Calibration) -> dict:
    """How the checkpoint was made, for its config.json."""
    return {"version": __version__, **asdict(job.spec), "propagation": job.propagation,
            "overrides": [list(rule) for rule in job.overrides.rules],
            "activation": asdict(job.activation) if job.activation else None, "seed": job.seed,
            "calibration": {"source": tokens.source, "samples": len(tokens.tokens),
                            "sequence_length": tokens.tokens.shape[1], "digest": tokens.digest}}
