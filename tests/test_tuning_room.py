"""Tuning that cannot fit is refused before anything is written, and what it needs is foretold."""

import gc

import mlx.core as mx
import pytest
from conftest import CONFIG, job, write_telling
from mlx.utils import tree_flatten

import mlxquant
from mlxquant.base.errors import TooLarge
from mlxquant.layers.blocks import held_bytes
from mlxquant.layers.dense import to_dense
from mlxquant.layers.trainable import Parts, Trainable
from mlxquant.model.loading import open_lazily
from mlxquant.tuning import room
from mlxquant.tuning.room import Room, Step
from mlxquant.tuning.settings import Schedule, Tuning


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
    return Tuning(str(folder / "source"), [str(folder / "text.txt")], Schedule(4, size, 0.05, 2),
                  length, codes=codes)


def room_of(folder, tuning):
    network, config = open_lazily(folder / "small")
    student = Trainable(network, mx.float32, Parts(codes=tuning.codes))
    return (Room(student, open_lazily(folder / "source")[0], config["vocab_size"]),
            Step.of(tuning, config))


@pytest.mark.parametrize("sizes, codes, batch, options, fits", [
    ((256, 704, 2048), 0.0, (2, 128), dict(method="replica", bits=2, replicas=2, refine=0), True),
    ((384, 1024, 512), 0.2, (1, 256), dict(method="rtn", bits=2), True),
    ((384, 1024, 512), 0.2, (1, 256), dict(method="rtn", bits=2), False),
    ((512, 1408, 256), 0.0, (2, 64), dict(method="rtn", bits=2), False),
])
def test_the_peak_is_foretold_within_a_fifth(tmp_path, sizes, codes, batch, options, fits,
                                             monkeypatch):
    monkeypatch.setattr(room, "fits_dense", lambda *_: fits)
    monkeypatch.setattr(room, "STREAMED", 512)
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
