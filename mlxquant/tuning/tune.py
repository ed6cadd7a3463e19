"""From a quantised folder to a tuned one: scales trained on the original's predictions."""

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxquant.base.errors import BadValue
from mlxquant.base.storage import holds_output, refuse_existing, save_arrays, working_folder
from mlxquant.layers.trainable import Parts, Trainable
from mlxquant.model.loading import LanguageModel, load, open_lazily, open_tokenizer, vocabulary_of
from mlxquant.quantise import card
from mlxquant.quantise.calibration import Calibration, held_apart
from mlxquant.quantise.conversations import converse
from mlxquant.quantise.self_written import at_once, self_written
from mlxquant.quantise.walk import identity
from mlxquant.sources import checkpoint
from mlxquant.sources.names import resolve
from mlxquant.tuning.distill import Distillation, Report
from mlxquant.tuning.settings import Tuning

HELD_OUT = 32
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
    either way. A killed run, repeated, goes on at its last check. ``progress`` gets (steps done,
    steps, loss), ``writing`` (sequences that the teacher has written, of how many, of which kind).
    Raises ``BadValue`` for texts too short or another vocabulary, ``Unsupported`` for a model
    without scales to train or, where ``tuning`` asks for conversations, without a chat template.
    """
    output, folder = Path(output), resolve(name)
    refuse_existing(output)
    start, schedule = time.perf_counter(), tuning.schedule
    mx.reset_peak_memory()
    dtype = mx.bfloat16 if mx.default_device() == mx.gpu else mx.float32
    network, config = open_lazily(folder)
    teacher = load(tuning.teacher, dense=True)
    vocabulary = _common_vocabulary(name, network, teacher)
    texts, held_out = held_apart(
        open_tokenizer(folder, config), list(tuning.data), schedule.steps * schedule.batch_size,
        HELD_OUT, tuning.sequence_length, tuning.seed, vocabulary=vocabulary)
    record = tuning.record(texts.source, dtype)
    job = identity(folder, identity(teacher.folder), record, texts.digest)
    # What cannot be trained is refused here, before anything is written.
    student = Trainable(network, dtype, Parts(tuning.norms, tuning.codes / schedule.drift))
    unfinished = working_folder(output, job, record)
    teacher.network.apply(lambda a: a.astype(dtype))
    tokens = _with_written(texts, teacher, tuning, unfinished, writing).tokens
    training = Distillation(student, teacher.network, tokens, held_out.tokens, schedule)
    state = training.run(progress, unfinished / "state.safetensors")
    before, after = state.first_loss, state.best_loss
    record |= {"divergence_before": before, "divergence_after": after}
    config |= {"mlxquant_record": config.get("mlxquant_record", {}) | {"tuned": record}}
    checkpoint.write(output, config, _tensors(folder, student.tensors(state.best)),
                     checkpoint.side_files(folder),
                     finish=lambda made: card.write(made, output.name))
    shutil.rmtree(unfinished)
    return TuningResult(output, before, after, time.perf_counter() - start, mx.get_peak_memory())


def _common_vocabulary(name: str, network: nn.Module, teacher: LanguageModel) -> int:
    ours, theirs = vocabulary_of(network), teacher.vocabulary
    if ours != theirs:
        raise BadValue(f"{teacher.name} has {theirs} tokens and {name} {ours}; "
                       "a teacher needs the same vocabulary")
    return ours


def _with_written(texts: Calibration, teacher: LanguageModel, tuning: Tuning, unfinished: Path,
                  writing: Writing) -> Calibration:
    """The texts, a part of them replaced by what the teacher is asked to write."""

    def mixed(kind: str, share: float, write: Callable[[Told], np.ndarray]) -> Calibration:
        rows = _kept(unfinished / f"{kind}.safetensors",
                     lambda: write(lambda done, total: writing(done, total, kind)))
        return texts.mixed_with(rows, share, f"windows of {kind} by the teacher", tuning.seed)

    if tuning.written:
        texts = mixed("continuations", 1 / 2,
                      lambda told: _continuations(teacher, texts, tuning, told))
    if tuning.conversations:
        texts = mixed("conversations", 1 / (len(tuning.data) + 1), lambda told: converse(
            teacher, tuning.conversations, tuning.sequence_length, tuning.seed, progress=told))
    return texts


def _continuations(teacher: LanguageModel, texts: Calibration, tuning: Tuning,
                   progress: Told) -> np.ndarray:
    """Sequences of which the first eighth is from the texts and the rest as the teacher goes on."""
    length = tuning.sequence_length
    return self_written(teacher, tuning.written, length, tuning.seed, at_once(teacher, length),
                        starts=texts.tokens[:, :max(1, length // 8)], progress=progress).tokens


def _kept(file: Path, make: Callable[[], np.ndarray]) -> np.ndarray:
    """What ``make`` makes, from ``file`` if an earlier part of the run has left it there."""
    if not file.exists():
        save_arrays(file, {"tokens": mx.array(make())}, {})
    return np.array(mx.load(str(file))["tokens"])


def _tensors(folder: Path, tuned: dict[str, mx.array]) -> Iterator[tuple[str, mx.array]]:
    """The folder's tensors, trained ones in place of the old."""
    for file in checkpoint.weight_files(folder):
        for path, array in mx.load(str(file)).items():
            yield path, tuned.get(path, array)
