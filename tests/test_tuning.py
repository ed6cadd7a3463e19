"""Tuning: better on held-out text, never worse, resumable to the bit, codes untouched."""

import os
import shutil
from functools import cache, partial
from pathlib import Path

import architectures
import commands
import mlx.core as mx
import numpy as np
import pytest
from conftest import CONFIG, job, replicated, write_telling

import mlxquant  # first: it loads the BLAS before MLX
from mlxquant.base.errors import BadCheckpoint, BadValue, MlxquantError, Unsupported
from mlxquant.base.storage import save_arrays
from mlxquant.codes.affine import unpack
from mlxquant.codes.spec import ReplicaShape
from mlxquant.layers.trainable import Trainable
from mlxquant.layers.transformed import ActivationSpec
from mlxquant.model.loading import open_lazily
from mlxquant.quantise import calibration
from mlxquant.tuning import room
from mlxquant.tuning.distill import Distillation, Keeping
from mlxquant.tuning.predictions import Predictions, divergence, likeliest
from mlxquant.tuning.settings import Schedule, Tuning
from mlxquant.tuning.tune import tune

SCHEDULE = Schedule(steps=60, batch_size=4, learning_rate=1e-3, check_every=20)
MADE = {
    "replica": dict(method="replica", bits=2, rotation="online"),
    "grouped replica": dict(method="replica", bits="ternary", replicas=2, replica_group=16),
    "affine": dict(method="gptq", bits=2),
    "rows": dict(method="gptq", bits=3, group_size=0, rotation="online"),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A source model with something to say, and a text."""
    config = CONFIG | {"tie_word_embeddings": False}
    folder = write_telling(tmp_path_factory.mktemp("tuning"), config)
    for name, options in MADE.items():
        mlxquant.quantize(str(folder / "source"), folder / name,
                          job(text=folder / "text.txt", **options))
    return folder


def run(places, name, output, **options):
    report = {key: options.pop(key) for key in ("progress", "writing") if key in options}
    tuning = Tuning(str(places / "source"), [str(places / "text.txt")],
                    **{"schedule": SCHEDULE, "sequence_length": 32} | options)
    return tune(str(places / name), output, tuning, **report)


@pytest.fixture(scope="module")
def tuned(places):
    """Tunes one of ``MADE`` without anything special, once: the result and its folder."""
    @cache
    def made(name):
        return run(places, name, places / f"{name} tuned"), places / f"{name} tuned"

    return made


def tensors(folder):
    return mx.load(str(folder / "model.safetensors"))


@pytest.mark.parametrize("name", MADE)
def test_it_predicts_more_like_the_teacher_and_keeps_its_codes(places, tuned, name):
    result, folder = tuned(name)
    assert result.divergence_after < 0.8 * result.divergence_before
    before, after = tensors(places / name), tensors(folder)
    assert before.keys() == after.keys()
    for path, array in before.items():
        assert after[path].dtype == array.dtype
        if path.endswith((".codes", ".rotation_signs", ".weight")) and array.ndim == 2:
            assert mx.array_equal(array, after[path])


@pytest.mark.parametrize("name, stored", [
    ("replica", ".codes"), ("affine", ".weight"),
    pytest.param("rows", ".codes", marks=pytest.mark.slow)])
def test_codes_move_where_they_are_let_to(places, tuned, tmp_path, name, stored):
    still, _ = tuned(name)
    result = run(places, name, tmp_path / "out", codes=0.15)
    assert result.divergence_before == pytest.approx(still.divergence_before, rel=1e-4)
    assert result.divergence_after < result.divergence_before
    before, after = tensors(places / name), tensors(tmp_path / "out")
    moved = [not mx.array_equal(array, after[path]) for path, array in before.items()
             if path.endswith(stored) and array.dtype in (mx.uint32, mx.uint8)]
    assert any(moved) and before.keys() == after.keys()
    teacher, ours = (mlxquant.load(str(path)) for path in (places / "source", tmp_path / "out"))
    _, held = calibration.held_apart(teacher.tokenizer, [str(places / "text.txt")],
                                     SCHEDULE.steps * SCHEDULE.batch_size, 32, 32, vocabulary=384)
    logits, wanted = (model.network(mx.array(held.tokens)).reshape(-1, 384)
                      for model in (ours, teacher))
    stored = divergence(logits, likeliest(wanted)).item() / held.tokens.size
    assert stored == pytest.approx(result.divergence_after, rel=0.02)  # as it was measured


@pytest.mark.parametrize("steps", [60, 400])
def test_chance_carries_what_is_trained_as_far_as_is_said(steps, tmp_path):
    """Codes are given their step by it. MLX's Adam without bias correction goes some three
    times as far in 300 steps."""
    schedule = Schedule(steps=steps, learning_rate=2e-3)
    mx.random.seed(0)
    network = replicated(CONFIG, ReplicaShape(2, 1))
    predictions = Predictions(tmp_path, [np.zeros((1, 4), int)] * (steps + 1), 384)
    save_arrays(predictions.file(steps), likeliest(mx.zeros((4, 384)))._asdict(), {})
    training = Distillation(Trainable(network, mx.float32), predictions, schedule)
    optimizer, moved = training.state.optimizer, {"u": mx.zeros(4000)}
    optimizer.init(moved)
    for _ in range(steps):
        moved = optimizer.apply_gradients({"u": mx.random.normal((4000,))}, moved)
        mx.eval(moved, optimizer.state)
    assert mx.std(moved["u"]).item() == pytest.approx(schedule.drift, rel=0.15)


@pytest.mark.parametrize(("steps", "codes", "says"), [
    (200, 0.2, "--steps 267, or --codes 0.173"), (300, 0.2, None), (267, 0.2, None),
    (200, 0.173, None), (200, 0.0, None)])
def test_codes_that_go_too_far_in_a_step_are_told_of(steps, codes, says):
    for rate in (5e-4, 2e-3):  # on which it does not depend
        hasty = Tuning("teacher", ["text"], Schedule(steps, learning_rate=rate), codes=codes).hasty
        assert hasty is None if says is None else says in hasty


def test_a_resumed_run_equals_an_uninterrupted_one(places, tuned, tmp_path):
    _, whole = tuned("replica")

    def stop(step, steps, loss):
        if step == 22:  # two steps after the last check
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(places, "replica", tmp_path / "stopped", progress=stop)
    assert not (tmp_path / "stopped").exists()
    with pytest.raises(MlxquantError, match="unfinished work of another job"):
        run(places, "replica", tmp_path / "stopped", seed=1)
    config = places / "source" / "config.json"  # the teacher's
    before = config.read_text()
    config.write_text(before.replace('"rope_theta": 10000.0', '"rope_theta": 5000.0'))
    assert config.read_text() != before
    with pytest.raises(MlxquantError, match="unfinished work of another job"):
        run(places, "replica", tmp_path / "stopped")
    config.write_text(before)
    text = places / "text.txt"  # of which the end is held out
    before = text.read_text()
    text.write_text(before[:-500] + before[:500])
    with pytest.raises(MlxquantError, match="unfinished work of another job"):
        run(places, "replica", tmp_path / "stopped")
    text.write_text(before)
    state = tmp_path / "stopped.partial" / "training.safetensors"
    kept = state.read_bytes()
    arrays, metadata = mx.load(str(state), return_metadata=True)
    lost = next(path for path in arrays if path.startswith("moved."))
    mx.save_safetensors(str(state), {path: array for path, array in arrays.items()
                                     if path != lost}, metadata)
    with pytest.raises(MlxquantError, match=f"another version, without {lost}; remove"):
        run(places, "replica", tmp_path / "stopped")
    state.write_bytes(kept)
    seen = []
    run(places, "replica", tmp_path / "stopped", progress=lambda step, *_: seen.append(step))
    assert seen == list(range(21, 61)) and not (tmp_path / "stopped.partial").exists()
    for file in ("model.safetensors", "config.json"):
        assert (whole / file).read_bytes() == (tmp_path / "stopped" / file).read_bytes()


def test_states_are_kept_where_writing_them_is_a_tenth_of_the_time(monkeypatch):
    now = 0.0
    monkeypatch.setattr("mlxquant.tuning.distill.time.perf_counter", lambda: now)
    small, large = Keeping(10**8), Keeping(20 * 10**9)
    assert small.due and not large.due

    def save():
        nonlocal now
        now += 40.0  # twice as long as foretold

    now = 201.0  # ten times the 20 seconds of 20 GB
    assert large.due
    large.write(save)
    now += 399.0
    assert small.due and not large.due
    now += 2.0
    assert large.due


def test_a_run_goes_on_at_the_last_state_that_was_worth_keeping(places, tuned, tmp_path,
                                                                monkeypatch):
    _, whole = tuned("replica")
    due = iter([True, False])  # at the checks of steps 20 and 40
    monkeypatch.setattr(Keeping, "due", property(lambda _: next(due)))

    def stop(step, steps, loss):
        if step == 45:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(places, "replica", tmp_path / "stopped", progress=stop)
    monkeypatch.undo()
    seen = []
    run(places, "replica", tmp_path / "stopped", progress=lambda step, *_: seen.append(step))
    assert seen == list(range(21, 61))
    assert ((whole / "model.safetensors").read_bytes()
            == (tmp_path / "stopped" / "model.safetensors").read_bytes())


def test_an_original_larger_than_memory_predicts_the_same(places, tmp_path, monkeypatch):
    def predictions(name, fits):
        monkeypatch.setattr(room, "fits_dense", lambda *_: fits)
        with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
            killed.setattr(Distillation, "run", lambda *_: throw())
            run(places, "replica", tmp_path / name)
        files = (tmp_path / f"{name}.partial").glob("predictions-*")
        return {file.name: mx.load(str(file)) for file in files}

    def throw():
        raise KeyboardInterrupt

    monkeypatch.setattr(room, "STREAMED", 300)  # two batches of 4 × 32 at once
    whole, streamed = predictions("whole", True), predictions("streamed", False)
    assert len(whole) == SCHEDULE.steps + 8 and whole.keys() == streamed.keys()
    for name, arrays in whole.items():
        for key, array in arrays.items():
            assert mx.allclose(array, streamed[name][key], 1e-3, 1e-5), (name, key)


@pytest.mark.parametrize("option, name, asked_for", [
    ("conversations", "converse", [(5, 32)]), ("written", "self_written", [(5, 32, (20, 4))])])
def test_what_the_teacher_writes_is_made_once_and_trained_on(
        places, tmp_path, monkeypatch, capsys, option, name, asked_for):
    asked, told = [], []

    def converse(model, samples, length, seed, progress):
        asked.append((samples, length))
        progress(samples, samples)
        return np.full((samples, length), 7)

    def self_written(model, samples, length, seed, batch, starts, progress):
        rows = converse(model, samples, length, seed, progress)
        asked[-1] += (starts.shape,)
        return calibration.Calibration(rows, "")

    monkeypatch.setattr(f"mlxquant.tuning.tune.{name}", locals()[name])
    few = Schedule(steps=5, batch_size=4, check_every=5)
    options = {"schedule": few, option: 5}

    def stop(step, steps, loss):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(places, "replica", tmp_path / "out", progress=stop,
            writing=lambda *done: told.append(done), **options)
    run(places, "replica", tmp_path / "out", **options)
    hinted = "--conversations 2048 keeps it nearer" in capsys.readouterr().err
    assert hinted == (option != "conversations")
    run(places, "replica", tmp_path / "without", schedule=few)
    assert asked == asked_for
    assert told[0] == (5, 5, {"written": "continuations"}.get(option, option))
    assert told[1:] == [(4 * done, 52, "predictions") for done in range(1, 14)]
    with_them, without = tensors(tmp_path / "out"), tensors(tmp_path / "without")
    assert any(not mx.array_equal(array, without[path]) for path, array in with_them.items())


def test_ternary_codes_stay_ternary(places, tmp_path):
    """In training block by block and in tuning, which reads config.json's record."""
    source, text = places / "source", places / "text.txt"
    mlxquant.quantize(str(source), tmp_path / "blocks", job(
        text, 4, 32, bits="ternary", refine=0, tune_blocks=True, tune_steps=24))
    tune(str(tmp_path / "blocks"), tmp_path / "tuned", Tuning(
        str(source), [str(text)], Schedule(60, 2, 1e-3, 20), 32, codes=0.15))
    found = [{path: unpack(array, 2, 64) for path, array in tensors(tmp_path / name).items()
              if array.dtype == mx.uint32} for name in ("blocks", "tuned")]
    assert [max(codes.max().item() for codes in folder.values()) for folder in found] == [2, 2]
    assert any((codes != found[1][path]).any() for path, codes in found[0].items())


def test_what_training_spoils_is_not_written(places, tmp_path):
    result = run(places, "affine", tmp_path / "out", schedule=Schedule(4, 4, 0.9, 1))
    assert result.divergence_after <= result.divergence_before
    if result.divergence_after == result.divergence_before:
        before, after = tensors(places / "affine"), tensors(tmp_path / "out")
        assert all(mx.array_equal(array, after[path]) for path, array in before.items())


@pytest.mark.parametrize("name", MADE)
def test_gradients_are_those_of_finite_differences(places, name):
    network, _ = open_lazily(places / name)
    student, tokens = Trainable(network, mx.float32), mx.array(np.arange(3, 40)[None])
    wanted = mx.random.normal((1, 37, network.args.vocab_size), key=mx.random.key(1))

    def loss(moved):  # not the divergence: so near its minimum that float32 has no digits left
        return (student.install(student.values(moved))(tokens) * wanted).sum()

    moved = student.start()
    gradients = mx.grad(loss)(moved)
    key = mx.random.key(0)
    for path in [p for p in moved if ".0." in p]:
        direction = mx.random.normal(moved[path].shape, key=key)
        step = 0.2 / mx.linalg.norm(direction).item()
        up, down = (loss(moved | {path: sign * step * direction}).item() for sign in (1, -1))
        slope = (gradients[path] * direction).sum().item()
        scale = mx.linalg.norm(gradients[path]).item()
        assert (up - down) / (2 * step) == pytest.approx(slope, abs=0.02 * scale), path


@pytest.mark.parametrize("name, moment", [("affine", "progress"), ("source", "writing")])
def test_models_that_change_meanwhile_are_not_mixed(places, tmp_path, name, moment):
    for folder in ("affine", "source"):
        shutil.copytree(places / folder, tmp_path / folder)
    shutil.copy(places / "text.txt", tmp_path)
    with pytest.raises(BadCheckpoint, match=f"{name} changed while it was read"):
        run(tmp_path, "affine", tmp_path / "out", schedule=Schedule(2, 1, check_every=1),
            **{moment: lambda *_: os.utime(tmp_path / name / "model.safetensors", ns=(1, 1))})
    assert {p.name for p in tmp_path.iterdir()} == {"affine", "source", "text.txt"}


def test_what_cannot_be_tuned_is_refused(places, tmp_path):
    with pytest.raises(Unsupported, match="nothing to tune"):
        run(places, "source", tmp_path / "out")
    with pytest.raises(BadValue, match="steps is 0, at least 1 is needed"):
        Schedule(steps=0)
    for codes in (-0.1, 0.6):
        with pytest.raises(BadValue, match="allowed are 0 to 0.5"):
            run(places, "affine", tmp_path / "out", codes=codes)
    with pytest.raises(BadValue, match="a sample needs 100000"):
        run(places, "affine", tmp_path / "out", sequence_length=100_000)
    source = architectures.write("qwen2_vl", tmp_path / "names")
    with pytest.raises(Unsupported, match="holds language_model.* under another name"):
        mlxquant.quantize(str(source), tmp_path / "made", job(None, 1, 8, method="rtn", bits=4))
        stored = {path.removeprefix("language_model."): array
                  for path, array in tensors(tmp_path / "made").items()}
        mx.save_safetensors(str(tmp_path / "made" / "model.safetensors"), stored)
        (tmp_path / "made" / "model.safetensors.index.json").unlink()
        tune(str(tmp_path / "made"), tmp_path / "out",
             Tuning(str(source), [str(places / "text.txt")], sequence_length=8))
    mlxquant.quantize(str(places / "source"), tmp_path / "w8a8",
                      job(places / "text.txt", 4, 32, method="smoothquant", bits=8,
                          activation=ActivationSpec()))
    with pytest.raises(Unsupported, match="rounds activations"):
        tune(str(tmp_path / "w8a8"), tmp_path / "out",
             Tuning(str(places / "source"), [str(places / "text.txt")]))


def deepen(compiled: Path, folder: Path) -> None:
    """Print how often MLX had called its compiler, by the lines of ``compiled``, after each model.

    Another fused operation at the end, of a captured number: each draws its own.
    """
    def count() -> int:
        return compiled.read_text().count("-shared")

    mx.random.seed(int.from_bytes(os.urandom(4)))
    norms = mx.random.normal((3, 16, CONFIG["hidden_size"]))
    factor = mx.random.uniform()
    mx.eval(norms, factor)  # no number is captured before it is known
    for layers in (2, 3):
        config = CONFIG | {"num_hidden_layers": layers}
        network = replicated(config, ReplicaShape(2, 1))
        for number, module in enumerate(m for p, m in network.named_modules() if "norm" in p):
            module.weight = norms[layers - 1, number]
        tokens = np.random.default_rng(0).integers(0, 384, (4, 8))
        predictions = Predictions(folder / str(layers), [tokens[2:], tokens[:2]], 384)
        for index in range(2):
            save_arrays(predictions.file(index), likeliest(mx.zeros((16, 384)))._asdict(), {})
        Distillation(Trainable(network, mx.float32), predictions, Schedule(1, 2)).run()
        print(count())
    mx.eval(mx.compile(lambda x: mx.exp(x) * factor)(mx.ones(8)))
    print(count())


@pytest.mark.skipif(mx.default_device() == mx.gpu, reason="counts compilations for the CPU")
def test_a_deeper_model_compiles_no_further_kernels(tmp_path):
    """MLX writes a captured array of one element into a kernel's source: a model has one a norm."""
    compiler, compiled = tmp_path / "g++", tmp_path / "compiled"
    compiled.touch()
    compiler.write_text(f'#!/bin/sh\necho "$@" >> {compiled}\nexec {shutil.which("g++")} "$@"\n')
    compiler.chmod(0o755)
    done = commands.run(program=partial(deepen, compiled, tmp_path),
                        PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert done.returncode == 0, done.stderr
    two, three, other = map(int, done.stdout.split())
    assert two == three == other - 1
