"""From a quantised folder to a tuned one: the same codes, scales trained on the original's predictions."""

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlxquant.base.errors import BadValue
from mlxquant.base.storage import holds_output, refuse_existing, save_arrays, working_folder
from mlxquant.base.version import __version__
from mlxquant.model.loading import LanguageModel, load, open_lazily, open_tokenizer
from mlxquant.model.windows import vocabulary_of
from mlxquant.quantise import calibration, card
from mlxquant.quantise.conversations import converse
from mlxquant.quantise.self_written import at_once, self_written
from mlxquant.quantise.walk import identity
from mlxquant.sources import checkpoint
from mlxquant.sources.names import resolve
from mlxquant.tuning.distill import Distillation, Report, Schedule
from mlxquant.tuning.trainable import Trainable

HELD_OUT = 32
_STATE = "state.safetensors"


@dataclass(frozen=True)
class Tuned:
    """Where the result is; divergence on held-out sequences before and after (nats per token);
    seconds, those of earlier parts of a resumed run apart, and peak memory in bytes."""

    folder: Path
    divergence_before: float
    divergence_after: float
    seconds: float
    peak_memory: int


@holds_output
def tune(name: str, output: str | Path, *, teacher: str, data: list[str], schedule: Schedule = Schedule(),
         sequence_length: int = calibration.SEQUENCE_LENGTH, norms: bool = True, codes: float = 0.0,
         written: int = 0, conversations: int = 0, seed: int = 0, dtype: mx.Dtype | None = None,
         progress: Report = lambda *_: None, writing: Callable[[int, int, str], None] = lambda *_: None) -> Tuned:
    """Tune the quantised model called ``name`` towards ``teacher`` into the new folder ``output``.

    ``data`` are texts as for ``quantize``. ``written`` adds so many windows in which the teacher goes on from what
    the texts begin, drawn as often as all texts together; ``conversations`` so many in which it talks to itself
    (``quantise/conversations.py``), drawn as often as each text. ``writing`` is told how many of them there are, how many
    there will be, and of which kind. ``codes`` above 0 lets the codes move too (``unpacked.py``): it is how many levels
    chance alone would carry one (``Schedule.drift``), so that what changes is what was pulled more steadily than that.
    At 0.2 the next level, half a level away, is two and a half standard deviations off (``benchmarks/LOG.md``).
    ``dtype`` is that of the computation: bfloat16 on a GPU and float32 on a CPU unless given;
    what is trained is float32 either way. A killed run, repeated, goes on at its last check. Raises ``BadValue`` for ``codes``
    that would all change, texts too short or another vocabulary, ``Unsupported`` for a model without scales to train or, asked to converse, without a
    chat template.
    """
    if not 0 <= codes <= 0.5:
        raise BadValue(f"codes is {codes}, allowed is 0 to 0.5: half a level is the way to the next")
    output, folder = Path(output), resolve(name)
    refuse_existing(output)
    start = time.perf_counter()
    mx.reset_peak_memory()
    dtype = dtype or (mx.bfloat16 if mx.default_device() == mx.gpu else mx.float32)
    network, config = open_lazily(folder)
    original = load(teacher, dense=True)
    if original.config.get("vocab_size") != config.get("vocab_size"):
        raise BadValue(f"{teacher} has {original.config.get('vocab_size')} tokens and {name} "
                       f"{config.get('vocab_size')}; a teacher needs the same vocabulary")
    count = schedule.steps * schedule.batch_size
    texts, held_out = calibration.held_apart(open_tokenizer(folder, config), data, count, HELD_OUT,
                                             sequence_length, seed, vocabulary=vocabulary_of(network))
    settings = {"schedule": schedule.as_dict(), "norms": norms, "codes": codes, "seed": seed,
                "written": written, "conversations": conversations,
                "teacher": Path(teacher).name, "data": texts.source, "sequence_length": sequence_length,
                "dtype": str(dtype).removeprefix("mlx.core.")}
    job = identity(folder, identity(resolve(teacher)), settings, texts.digest, __version__)
    student = Trainable(network, dtype, norms, codes / schedule.drift)  # refuses before anything is written
    unfinished = working_folder(output, job, settings)
    original.network.apply(lambda a: a.astype(dtype))

    def with_teachers(kind: str, share: float, write: Callable[..., np.ndarray]) -> calibration.Calibration:
        rows = _kept(unfinished / f"{kind}.safetensors", lambda: write(progress=lambda *done: writing(*done, kind)))
        return texts.mixed_with(rows, share, f"windows of {kind} by the teacher", seed)

    if written:
        texts = with_teachers("continuations", 1 / 2, partial(_continuations, original, texts, written, seed))
    if conversations:
        texts = with_teachers("conversations", 1 / (len(data) + 1),
                              partial(converse, original, conversations, sequence_length, seed))
    training = Distillation(student, original.network, texts.tokens, held_out.tokens, schedule)
    state_file = unfinished / _STATE
    if state_file.exists():
        training.restore(state_file)
    state = training.run(progress, save=lambda: training.save(state_file))
    record = config.get("mlxquant_record", {}) | {"tuned": settings | {
        "divergence_before": state.first_loss, "divergence_after": state.best_loss}}
    checkpoint.write(output, config | {"mlxquant_record": record},
                     _tensors(folder, student.tensors(state.best)), checkpoint.side_files(folder),
                     finish=lambda made: card.write(made, output.name))
    shutil.rmtree(unfinished)
    return Tuned(output, state.first_loss, state.best_loss, time.perf_counter() - start, mx.get_peak_memory())


def _tensors(folder: Path, tuned: dict[str, mx.array]) -> Iterator[tuple[str, mx.array]]:
    """The folder's tensors, trained ones in place of the old."""
    for file in checkpoint.weight_files(folder):
        for path, array in mx.load(str(file)).items():
            yield path, tuned.get(path, array)


def _continuations(teacher: LanguageModel, texts: calibration.Calibration, count: int, seed: int,
                   progress: Callable[[int, int], None]) -> np.ndarray:
    """``count`` windows of which the first eighth is from the texts and the rest as the teacher goes on."""
    length = texts.tokens.shape[1]
    return self_written(teacher, count, length, seed, at_once(teacher, length),
                        starts=texts.tokens[:, :max(1, length // 8)], progress=progress).tokens


def _kept(file: Path, make: Callable[[], np.ndarray]) -> np.ndarray:
    """What ``make`` makes, from ``file`` if an earlier part of the run has left it there."""
    if not file.exists():
        save_arrays(file, {"tokens": mx.array(make())}, {})
    return np.array(mx.load(str(file))["tokens"])
