"""From a quantised folder to a tuned one: scales trained on the original's predictions."""

import gc
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxquant.base.errors import BadValue, Unsupported
from mlxquant.base.storage import holds_output, refuse_existing, save_arrays, working_folder
from mlxquant.codes.spec import Spec
from mlxquant.layers.trainable import Trainable, TrainedParts
from mlxquant.model import loading
from mlxquant.quantise import card
from mlxquant.quantise.calibration import Calibration, held_apart
from mlxquant.quantise.conversations import converse
from mlxquant.quantise.job import Job
from mlxquant.quantise.self_written import at_once, self_written
from mlxquant.quantise.walk import identity
from mlxquant.sources import checkpoint
from mlxquant.sources.checkpoint import KnownFolder
from mlxquant.sources.names import resolve
from mlxquant.tuning.distill import Distillation, Report
from mlxquant.tuning.predictions import Predictions
from mlxquant.tuning.room import Room, Step
from mlxquant.tuning.settings import HELD_OUT, Tuning
from mlxquant.tuning.teacher import Teacher

Told = Callable[[int, int], None]
Writing = Callable[[int, int, str], None]


@dataclass(frozen=True)
class TuningResult:
    """Where the result is; divergence on held-out sequences before and after (nats per token);
    seconds, without those of earlier parts of a resumed run, and peak memory in bytes."""

    folder: Path
    divergence_before: float
    divergence_after: float
    seconds: float
    peak_memory: int


@holds_output
def tune(name: str, output: str | Path, tuning: Tuning, *, progress: Report = lambda *_: None,
         writing: Writing = lambda *_: None) -> TuningResult:
    """Tune the quantised model called ``name`` into the new folder ``output``.

    The computation is in bfloat16 on a GPU and in float32 on a CPU; what is trained is float32
    either way. The original predicts first, whole in memory or, where it does not fit, block by
    block; it is gone before the model is tuned. A killed run, repeated, goes on at the last state
    that was kept (``distill.Keeping``). ``progress`` gets (steps done, steps, loss), ``writing``
    (what the teacher has written, of how many, of which kind). Raises ``BadValue`` for texts too
    short or another vocabulary, ``TooLarge`` where memory or disk do not suffice, ``Unsupported``
    for a model without scales to train or, where ``tuning`` asks for conversations, without a chat
    template.
    """
    output, source = Path(output), KnownFolder(resolve(name))
    refuse_existing(output)
    start, schedule = time.perf_counter(), tuning.schedule
    mx.reset_peak_memory()
    dtype = mx.bfloat16 if mx.default_device() == mx.gpu else mx.float32
    network, config = loading.open_lazily(source.folder)
    teacher = Teacher(tuning.teacher, dtype)
    vocabulary, theirs = loading.vocabulary_of(network), loading.vocabulary_of(teacher.network)
    if vocabulary != theirs:
        raise BadValue(f"{teacher.name} has {theirs} tokens and {name} {vocabulary}; "
                       "a teacher needs the same vocabulary")
    tokenizer = loading.open_tokenizer(source.folder, config)
    if tokenizer.has_chat_template and not tuning.conversations:
        print("texts alone teach a chat model little of how to talk: --conversations 2048 keeps it "
              "nearer to its original there", file=sys.stderr)
    if tuning.hasty:
        print(tuning.hasty, file=sys.stderr)
    texts, held_out = held_apart(
        tokenizer, list(tuning.data), schedule.steps * schedule.batch_size, HELD_OUT,
        tuning.sequence_length, tuning.seed, vocabulary=vocabulary)
    record = tuning.record(texts.source, dtype)
    job = identity(source.folder, identity(teacher.folder), record, texts.digest, held_out.digest)
    # What cannot be trained or does not fit is refused here, before anything is written.
    student = Trainable(network, dtype, TrainedParts(tuning.norms, tuning.code_unit,
                                                     specs=_asked(network, config)))
    _require_names(student, source.folder)
    room = Room(student, teacher.network, vocabulary, teacher.whole)
    room.check(tuning, config, output)
    unfinished = working_folder(output, {"job": job}, record)
    source.made = teacher.source.made = unfinished
    with teacher.source.reading():
        texts = _with_written(texts, teacher, tuning, unfinished, writing)
        predictions = Predictions(unfinished, [batch for part in (texts, held_out) for batch
                                               in part.rows(schedule.batch_size)], vocabulary)
        _predict(predictions, teacher, room.at_once(Step.of(tuning, config)), writing)
    del teacher
    gc.collect()  # its layers refer to each other
    mx.clear_cache()
    training = Distillation(student, predictions, schedule)
    with source.reading():
        state = training.run(progress, unfinished / "training.safetensors")
    before, after = state.first_loss, state.best_loss
    record |= {"divergence_before": before, "divergence_after": after}
    config |= {"mlxquant_record": config.get("mlxquant_record", {}) | {"tuned": record}}
    checkpoint.write(output, config, _tensors(source, student.tensors(state.best)),
                     checkpoint.side_files(source.folder),
                     finish=lambda made: card.write(made, output.name))
    shutil.rmtree(unfinished)
    return TuningResult(output, before, after, time.perf_counter() - start, mx.get_peak_memory())


def _require_names(student: Trainable, folder: Path) -> None:
    """Raise ``Unsupported`` where mlx-lm renames what the folder stores: the trained arrays would
    not be found again in its files."""
    held = checkpoint.validate(folder)
    if lost := [path for path in student.base if path in student.stored and path not in held]:
        raise Unsupported(f"{folder} holds {lost[0]} under another name; tune a folder that "
                          "mlxquant quantize or mlx_lm.convert has made")


def _asked(network: nn.Module, config: dict[str, Any]) -> dict[str, Spec]:
    """What ``quantize`` was asked to make of layers, by path, where config.json has its record."""
    record = config.get("mlxquant_record", {})
    try:
        job = Job(Spec(**{field.name: record[field.name] for field in fields(Spec)}),
                  tuple((glob, changes) for glob, changes in record["overrides"]))
        return {path: job.ruled(path) or job.spec for path, _ in network.named_modules()}
    except (KeyError, TypeError, ValueError, BadValue):  # of another version, or none
        return {}


def _with_written(texts: Calibration, teacher: Teacher, tuning: Tuning, unfinished: Path,
                  writing: Writing) -> Calibration:
    """The texts, with a part of the sequences replaced by ones that the teacher writes."""

    length = tuning.sequence_length

    def mixed(kind: str, share: float, write: Callable[[Told], np.ndarray]) -> Calibration:
        file = unfinished / f"{kind}.safetensors"
        if not file.exists():  # nor has an earlier part of the run left it
            rows = write(lambda done, total: writing(done, total, kind))
            save_arrays(file, {"tokens": mx.array(rows)}, {})
        return texts.mixed_with(np.array(mx.load(str(file))["tokens"]), share,
                                f"windows of {kind} by the teacher", tuning.seed)

    if tuning.written:  # the first eighth is from the texts
        texts = mixed("continuations", 1 / 2, lambda told: self_written(
            teacher.model, tuning.written, length, tuning.seed, at_once(teacher.model, length),
            starts=texts.tokens[:, :max(1, length // 8)], progress=told).tokens)
    if tuning.conversations:
        texts = mixed("conversations", 1 / (len(tuning.data) + 1), lambda told: converse(
            teacher.model, tuning.conversations, length, tuning.seed, progress=told))
    return texts


def _predict(predictions: Predictions, teacher: Teacher, at_once: int, writing: Writing) -> None:
    """Write the predictions that are missing, of the teacher as it was when it was opened."""
    if predictions.missing:
        print(f"the teacher's predictions take {predictions.bytes / 1e9:.2f} GB in "
              f"{predictions.folder} until the model is tuned", file=sys.stderr)
        predictions.write(teacher.judged, at_once,
                          lambda done, total: writing(done, total, "predictions"))
        teacher.source.check()


def _tensors(source: KnownFolder, tuned: dict[str, mx.array]) -> Iterator[tuple[str, mx.array]]:
    """The folder's tensors, trained ones in place of the old."""
    for file in checkpoint.weight_files(source.folder):
        for path, array in mx.load(str(file)).items():
            yield path, tuned.get(path, array)
    source.check()
