"""Tuning that cannot fit is refused before anything is written, and what it needs is foretold."""

import gc
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import pytest
from conftest import CONFIG, job, random_network, write_folder, write_telling
from mlx.utils import tree_flatten

import mlxquant
from mlxquant.base.errors import TooLarge
from mlxquant.layers.blocks import held_bytes
from mlxquant.layers.by_block import judged
from mlxquant.layers.dense import lazily_dense, to_dense
from mlxquant.layers.trainable import Trainable, TrainedParts
from mlxquant.model.loading import open_lazily
from mlxquant.tuning import room
from mlxquant.tuning.predictions import likeliest
from mlxquant.tuning.room import Room, Step
from mlxquant.tuning.settings import Schedule, Tuning
from mlxquant.tuning.teacher import Teacher


def made(tmp_path, hidden, inner, vocabulary, **options):
    """A text, and a random model with its quantised form."""
    config = CONFIG | {
        "hidden_size": hidden, "intermediate_size": inner, "vocab_size": vocabulary,
        "num_hidden_layers": 3, "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64, "head_dim": 64}
    write_telling(tmp_path, config | {"tie_word_embeddings": False})
    mlxquant.quantize(str(tmp_path / "source"), tmp_path / "small",
                      job(tmp_path / "text.txt", 4, 32, **options))
    return tmp_path


def asked(folder, codes=0.0, size=2, length=128):
    return Tuning(str(folder / "source"), [str(folder / "text.txt")], Schedule(2, size, 0.05, 2),
                  length, codes=codes)


def room_of(folder, tuning):
    network, config = open_lazily(folder / "small")
    student = Trainable(network, mx.float32, TrainedParts(codes=tuning.codes))
    teacher = Teacher(tuning.teacher, mx.float32)
    return (Room(student, teacher.network, config["vocab_size"], teacher.whole),
            Step.of(tuning, config))


@pytest.mark.parametrize("sizes, codes, batch, options", [
    ((256, 704, 2048), 0.0, (2, 128), dict(method="replica", bits=2, replicas=2, refine=0)),
    ((384, 1024, 512), 0.2, (1, 256), dict(method="rtn", bits=2)),
])
def test_the_peak_is_foretold_within_a_fifth(tmp_path, monkeypatch, sizes, codes, batch, options):
    monkeypatch.setattr("mlxquant.tuning.tune.HELD_OUT", 8)
    folder = made(tmp_path, *sizes, **options)
    tuning = asked(folder, codes, *batch)
    what, step = room_of(folder, tuning)
    said = {"predictions": what.teacher_bytes(step), "training": what.student_bytes(step)}
    del what
    gc.collect()  # what earlier tests left
    held, peaks = mx.get_active_memory(), {}

    def note(stage):
        peaks[stage] = max(peaks.get(stage, 0), mx.get_peak_memory() - held)
        mx.reset_peak_memory()

    mlxquant.tune(str(folder / "small"), folder / "tuned", tuning,
                  progress=lambda *_: note("training"),
                  writing=lambda done, total, kind: note(kind))
    for stage, peak in peaks.items():
        assert said[stage] == pytest.approx(peak, rel=0.2), stage


@pytest.mark.parametrize("stored", [mx.float32, mx.bfloat16, 5])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("hidden, inner, vocabulary", [(768, 3072, 256), (512, 1408, 8192)])
def test_an_original_read_block_by_block_takes_what_is_foretold(
        tmp_path, hidden, inner, vocabulary, dtype, stored):
    config = CONFIG | {
        "hidden_size": hidden, "intermediate_size": inner, "vocab_size": vocabulary,
        "num_hidden_layers": 3, "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64, "head_dim": 64, "tie_word_embeddings": False}
    network = random_network(config)
    if isinstance(stored, int):
        nn.quantize(network, 64, stored)
        config |= {"quantization": {"group_size": 64, "bits": stored}}
    else:
        network.set_dtype(stored)
    folder = write_folder(tmp_path / "source", network, config)
    del network
    student = SimpleNamespace(dtype=dtype)
    step = Step(1, 64, hidden // 64, False)
    said = Room(student, open_lazily(folder)[0], vocabulary, False)._predicting(step)
    gc.collect()
    mx.clear_cache()
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    network = lazily_dense(open_lazily(folder)[0], dtype)
    for found in judged(network, mx.zeros((1, 64), mx.int32), lambda y, _: likeliest(y), once=True):
        mx.eval(found)
    assert said == pytest.approx(mx.get_peak_memory() - held, rel=0.2)


def test_as_many_tokens_are_predicted_together_as_fit(tmp_path, monkeypatch):
    folder = made(tmp_path, 64, 128, 384, method="rtn", bits=2)
    monkeypatch.setattr(room, "fits_dense", lambda *_: False)
    what, step = room_of(folder, asked(folder, 0.0, 2, 128))
    assert what.at_once(step) == room.STREAMED
    least = what._predicting(step)
    monkeypatch.setattr(room, "memory_limit", lambda: 3 * least)
    assert 256 < what.at_once(step) < room.STREAMED and what.teacher_bytes(step) <= 3 * least
    monkeypatch.setattr(room, "memory_limit", lambda: 1)
    assert what.at_once(step) == 256 and what.teacher_bytes(step) == least


@pytest.mark.parametrize("options", [dict(method="rtn", bits=4),
                                     dict(method="replica", bits=2, replicas=2, rotation="online",
                                          refine=0)])
def test_an_original_is_expanded_in_16_bits(tmp_path, options):
    folder = made(tmp_path, 64, 128, 384, **options)
    networks = [open_lazily(folder / "small")[0] for _ in range(2)]
    small, whole = to_dense(networks[0], mx.bfloat16), to_dense(networks[1])
    assert room.dense_bytes(open_lazily(folder / "small")[0], mx.bfloat16) == held_bytes(small)
    for (path, rounded), (_, array) in zip(*(tree_flatten(n.parameters()) for n in (small, whole))):
        assert mx.array_equal(rounded, array.astype(mx.bfloat16)), path


def test_a_refusal_names_what_would_fit(tmp_path, monkeypatch):
    folder = made(tmp_path, 64, 128, 384, method="rtn", bits=2)
    tuning = asked(folder, 0.2, 8, 256)
    what, step = room_of(folder, tuning)
    whole = what.student_bytes(step)
    assert whole > what.teacher_bytes(step)

    def refused(limit):
        monkeypatch.setattr(room, "memory_limit", lambda: limit)
        with pytest.raises(TooLarge) as error:
            mlxquant.tune(str(folder / "small"), folder / "tuned", tuning)
        assert not list(folder.glob("tuned*"))
        return str(error.value)

    assert "needs 0.0" in (said := refused(0.9 * whole))
    assert "--batch-size 4 or --sequence-length 128 would fit" in said
    assert "no option would fit" in refused(1000)
    monkeypatch.setattr(room, "memory_limit", lambda: 2 * whole)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(TooLarge, match="tuning into tuned needs 0.01 GB on the disk"):
        mlxquant.tune(str(folder / "small"), folder / "tuned", tuning)


def test_codes_that_stay_are_named_where_that_would_do(tmp_path, monkeypatch):
    folder = made(tmp_path, 256, 704, 384, method="rtn", bits=2)
    tuning = asked(folder, 0.2, 1, 32)
    what, step = room_of(folder, tuning)
    monkeypatch.setattr(room, "memory_limit", lambda: 0.8 * what.student_bytes(step))
    with pytest.raises(TooLarge, match="; --codes 0 would fit"):
        what.check(tuning, CONFIG, folder / "tuned")
