"""From a model folder to a quantised one, block by block.

Only one block is dense in memory at a time. Finished blocks wait in
``OUT.partial``; a killed job run again with the same settings goes on at the
block it was in and ends with the same bytes.
"""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from mlxquant.base.errors import BadCheckpoint, Unsupported
from mlxquant.base.storage import holds_output, refuse_existing
from mlxquant.codes.spec import Overrides, Spec
from mlxquant.codes.width import Width
from mlxquant.layers import repeated
from mlxquant.layers.dense import to_dense
from mlxquant.layers.repeated import Repeat
from mlxquant.layers.traffic import leaf_modules
from mlxquant.layers.transformed import ActivationSpec
from mlxquant.model.loading import load, open_lazily, open_tokenizer
from mlxquant.model.windows import vocabulary_of
from mlxquant.quantise import calibration, card, room, rotation
from mlxquant.quantise.assembly import config_of, gates, outside, stored_dtype, turn_of
from mlxquant.quantise.assignment import Target, assign
from mlxquant.quantise.blocks import Context, quantise_block, rebuild
from mlxquant.quantise.calibration import Calibration
from mlxquant.quantise.capture import observe
from mlxquant.quantise.gptq import CORRECTION
from mlxquant.quantise.job import Job, Outcome, Progress
from mlxquant.quantise.partial import open_partial, read_result, write_result
from mlxquant.quantise.self_written import self_written
from mlxquant.quantise.storing import BlockResult
from mlxquant.quantise.walk import dense_block, enter, float_walk, identity
from mlxquant.sources import checkpoint
from mlxquant.sources.names import resolve


@holds_output
def quantize(name: str, output: str | Path, *, method: str = "gptq", bits: int | str = 4,
             group_size: int = 64, rotation: str | None = None, data: list[str] | None = None,
             samples: int = calibration.SAMPLES, sequence_length: int = calibration.SEQUENCE_LENGTH,
             symmetric: bool = False, replicas: int = 4, replica_group: int = 0,
             act_order: bool = True, refine: int = 3, propagation: str = "quantised",
             overrides: tuple[tuple[str, dict], ...] = (), target: Target | None = None, embedding_bits: int | None = None,
             activation: ActivationSpec | None = None, alpha: float | None = None,
             repeats: tuple[Repeat, ...] = (), seed: int = 0,
             revision: str | None = None, progress: Progress = lambda *_: None,
             weighing: Progress | None = None) -> Outcome:
    """Quantise the model called ``name`` into the new folder ``output``.

    ``data`` are calibration texts (files or ``hf://datasets/…``); without any the
    model writes its own. ``target`` gives every layer the width that keeps the
    model's predictions best within a size, ``bits`` then standing only where
    nothing else is said. Blocks in ``repeats`` run more than once in the result,
    which changes nothing before it is tuned. ``progress`` gets blocks done, of how many, and seconds; ``weighing`` the
    same of the pass over all blocks that a target needs beforehand, or else ``progress`` does. Raises ``BadValue`` for
    an impossible combination, and what ``resolve`` raises. See ``Spec`` and ``Job`` for the options.
    """
    spec = Spec(bits=Width.of(bits), group_size=group_size, symmetric=symmetric, method=method,
                act_order=act_order, refine=refine, rotation=rotation, replicas=replicas,
                replica_group=replica_group)
    folder = resolve(name, revision=revision)
    job = Job(Overrides(spec, overrides), propagation, embedding_bits, activation, alpha, seed, repeats,
              card.base_of(name, folder).as_dict())
    network, config = open_lazily(folder)
    _check(network, config, job)
    refuse_existing(Path(output))
    if not job.calibrated and target is None:
        tokens, job = calibration.none(), replace(job, propagation="float")
    elif data:
        tokens = calibration.from_files(open_tokenizer(folder, config), data, samples,
                                        sequence_length, seed, vocabulary=vocabulary_of(network))
    else:
        tokens = self_written(load(name, revision=revision), samples, sequence_length, seed)
    if target is not None:
        job = assign(folder, job, tokens, target, weighing or progress)
    room.check(network, job, Path(output))
    return run(folder, Path(output), job, tokens, progress)


def run(folder: Path, output: Path, job: Job, tokens: Calibration, progress: Progress) -> Outcome:
    """Quantise a resolved folder; see ``quantize``."""
    refuse_existing(output)
    start = time.perf_counter()
    mx.reset_peak_memory()
    source = identity(folder)
    network, config = open_lazily(folder)
    partial = open_partial(output, folder, job, tokens)
    dtype = stored_dtype(network)
    turn = turn_of(config, job)
    context = Context(job.overrides, config["model_type"], dtype, job.seed,
                      CORRECTION if job.propagation == "corrected" else 0.0, job.activation, job.alpha)
    files = [partial / f"block-{index:04d}.safetensors" for index in range(len(network.layers))]
    entries: dict[str, dict] = {"plain": {}, "layers": {}, "replicas": {}, "errors": {}}
    walk = _on_float if job.propagation == "float" else _on_quantised
    with _unchanged(folder, source, partial) as check:
        for index, result in enumerate(walk(network, folder, context, tokens, files, turn)):
            for kind, known in entries.items():
                known |= {f"model.layers.{index}.{path}": entry for path, entry in getattr(result, kind).items()}
            network.layers[index] = None  # the block's memory is free again
            check()
            progress(index + 1, len(files), time.perf_counter() - start)
        del network
        # Opened anew, so that an embedding that was calculated with is not held meanwhile.
        others, widths, outer_config = outside(open_lazily(folder)[0], config, job)
        others |= gates(job, dtype)
        entries["plain"] |= widths
        config = config_of(outer_config, job, tokens, **entries)

        def tensors() -> Iterator[tuple[str, mx.array]]:
            while others:
                name = next(iter(others))
                yield name, others.pop(name)
            for file in files:
                yield from mx.load(str(file)).items()
            check()

        checkpoint.write(output, config, tensors(), checkpoint.side_files(folder),
                         finish=lambda made: card.write(made, output.name))
    shutil.rmtree(partial)
    return Outcome(output, time.perf_counter() - start, mx.get_peak_memory(),
                   config["mlxquant_record"]["output_error"], config.get("mlxquant_import"))


@contextmanager
def _unchanged(folder: Path, source: str, partial: Path) -> Iterator[Callable[[], None]]:
    """Yields what raises ``BadCheckpoint`` if the model's files are no longer those that ``source`` identifies;
    what was made of them is removed, since a new run could not go on with it."""

    def check() -> None:
        try:
            same = identity(folder) == source
        except (BadCheckpoint, OSError):
            same = False
        if not same:
            shutil.rmtree(partial, ignore_errors=True)
            raise BadCheckpoint(f"{folder} changed while it was quantised; nothing was written, start again")

    try:
        yield check
    except (RuntimeError, ValueError):  # MLX found less in a file than there was
        check()
        raise


def _check(network: nn.Module, config: dict, job: Job) -> None:
    """Refuse what cannot work before any calibration runs."""
    if config["model_type"] == "mlxquant":
        raise Unsupported("the model is already quantised by mlxquant; start from the original")
    if job.spec.rotation == "fused":
        rotation.check(config)
    repeated.check(network, job.repeats)
    for index, block in enumerate(network.layers):
        for path, module in leaf_modules(block):
            if isinstance(module, (SwitchLinear, QuantizedSwitchLinear)):
                raise Unsupported(f"model.layers.{index}.{path} holds a mixture's experts, which "
                                  "quantize does not cover yet")
            if isinstance(module, (nn.Linear, nn.QuantizedLinear)):
                full = f"model.layers.{index}.{path}"
                columns = module.weight.shape[1] * 32 // getattr(module, "bits", 32)
                job.overrides.spec_for(full).check(columns, full)


def _on_float(network: nn.Module, folder: Path, context: Context, tokens: Calibration, files: list[Path],
              turn: mx.array | None) -> Iterator[BlockResult]:
    """The result of every block, each calibrated on what the float model gives it."""
    walk = float_walk(network, folder, tokens, turn, done=lambda index: files[index].exists())
    for index, (block, seen) in enumerate(walk):
        yield _result(block, index, seen, context, files[index])


def _on_quantised(network: nn.Module, folder: Path, context: Context, tokens: Calibration, files: list[Path],
                  turn: mx.array | None) -> Iterator[BlockResult]:
    """The result of every block, each calibrated on what the quantised blocks before give it, and
    with a correction beside what the float ones would."""
    hidden, runner = enter(folder, tokens, turn)
    target = list(hidden) if context.correction else None
    for index, file in enumerate(files):
        block, seen, done = dense_block(network, index, turn), None, file.exists()
        if not done or target is not None:
            seen, _, targets = observe(block, runner(block, index), hidden, target, idle=done)
            target = targets or None
        result = _result(block, index, seen, context, file)
        quantised = runner(to_dense(rebuild(block, result)), index)
        for batch, state in enumerate(hidden):
            hidden[batch] = quantised(state)
            mx.eval(hidden[batch])
        yield result


def _result(block: nn.Module, index: int, seen, context: Context, file: Path) -> BlockResult:
    """A block's result from its file, or made and put there."""
    prefix = f"model.layers.{index}"
    if file.exists():
        return read_result(file, prefix)
    result = quantise_block(block, prefix, seen, context)
    write_result(file, prefix, result)
    return result
