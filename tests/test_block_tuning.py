"""Blocks trained one by one: nearer to the original, never worse, the same in every run."""

import json
from functools import cache

import commands
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from architectures import write
from conftest import CONFIG, job, random_network, write_folder
from typer.testing import CliRunner

import mlxquant  # first: it loads the BLAS before MLX
from mlxquant.base.errors import BadValue, TooLarge
from mlxquant.cli import app
from mlxquant.codes.packing import unpack_codes
from mlxquant.codes.width import Width
from mlxquant.layers.head import foreseen
from mlxquant.layers.transformed import ActivationSpec
from mlxquant.model.loading import load, open_lazily
from mlxquant.quantise import aims, block_tuning, room
from mlxquant.quantise.assembly import blocks_of
from mlxquant.quantise.calibration import from_files
from mlxquant.quantise.job import Job
from mlxquant.quantise.walk import Halt, batch_size
from mlxquant.report.divergence import position_kl

TOKENS = mx.array([[5, 80, 200, 7, 99, 31, 16, 250, 44]])
KINDS = {
    "replicas": dict(method="replica", bits=2, rotation="online", refine=0),
    "grouped replicas": dict(method="replica", bits="ternary", replicas=2, replica_group=16,
                             propagation="corrected", refine=0),
    "groups": dict(method="gptq", bits=2, refine=0),
    "rows": dict(method="gptq", bits=3, group_size=0, rotation="online", refine=0),
    "awq": dict(method="awq", bits=2, propagation="float"),
    "rounded": dict(method="rtn", bits=2),
}


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A model that is not as sure of what follows as one whose head is its random embedding."""
    config = CONFIG | {"tie_word_embeddings": False}
    network = random_network(config)
    network.lm_head.weight = 0.3 * mx.random.normal(network.lm_head.weight.shape)
    folder = tmp_path_factory.mktemp("models")
    write_folder(folder / "tiny", network, config)
    nn.quantize(network, 32, 4)
    write_folder(folder / "tiny in 4 bits", network, config | {
        "quantization": {"group_size": 32, "bits": 4}})
    return folder / "tiny"


def quantise(source, output, text, progress=lambda *_: None, **options):
    asked = {"tune_blocks": True, "tune_steps": 24, "samples": 8, "length": 64} | options
    return mlxquant.quantize(str(source), output, job(text, **asked), progress=progress)


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_folder, text):
    """The folder and the result of one of ``KINDS``, trained or not, without anything special: each
    made once."""
    @cache
    def make(kind, tuned=True):
        folder = tmp_path_factory.mktemp("made") / ("tuned" if tuned else "plain")
        return folder, quantise(tiny_folder, folder, text, tune_blocks=tuned, **KINDS[kind])

    return make


def record(folder):
    return json.loads((folder / "config.json").read_text())["mlxquant_record"]


def distance(folder, source):
    tokens = mx.array([load(str(source)).tokenizer.encode("a cat sat on the mat and the cat ran")])
    logits, wanted = (load(str(f)).network(tokens) for f in (folder, source))
    return (mx.square(logits - wanted).mean() / mx.square(wanted).mean()).item()


def kl(folder, source, tokens):
    """The mean divergence of a made folder's predictions of ``tokens`` (windows, length)."""
    p, q = (load(str(f)).network(mx.array(tokens)) for f in (source, folder))
    return position_kl(p.astype(mx.float32), q.astype(mx.float32)).mean().item()


def same(folder, other):
    return all((folder / file).read_bytes() == (other / file).read_bytes()
               for file in ("model.safetensors", "config.json"))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer_comes_nearer_to_the_original(tiny_folder, made, kind):
    (tuned, result), (plain, _) = made(kind), made(kind, tuned=False)
    gains = record(tuned)["tuned_blocks"]
    assert list(gains) == ["model.layers.0", "model.layers.1"] and gains == result.tuned
    assert all(gain["after"] < 0.95 * gain["before"] for gain in gains.values())
    assert distance(tuned, tiny_folder) < distance(plain, tiny_folder)
    assert "tuned_blocks" not in record(plain)
    sizes = [mlxquant.inspect(str(folder)).bytes_per_token for folder in (tuned, plain)]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("name, options", [
    ("tiny", KINDS["replicas"]), ("tiny", KINDS["groups"] | dict(rotation="fused")),
    ("tiny in 4 bits", KINDS["groups"]),
    ("gemma2", KINDS["rounded"] | dict(group_size=32)),
    *(pytest.param(name, KINDS["rounded"] | dict(group_size=32), marks=pytest.mark.slow)
      for name in ("cohere2", "deepseek_v3"))])
def test_the_last_blocks_error_is_the_divergence_of_the_model(tmp_path, tiny_folder, text, name,
                                                              options):
    """Behind tied heads, untied and quantised, scaled and capped logits, rotated hidden states."""
    source = tiny_folder.parent / name if "tiny" in name else write(name, tmp_path / "source")
    made = quantise(source, tmp_path / "out", text, **options)
    error = list(made.tuned.values())[-1]
    assert error["nats"] and error["after"] < error["before"]
    tokenizer = load(str(source)).tokenizer
    held_out = from_files(tokenizer, [text], 8, 64, 0, vocabulary=288).tokens[-batch_size():]
    assert kl(tmp_path / "out", source, held_out) == pytest.approx(error["after"], rel=0.1)


@pytest.mark.parametrize("kind", ["replicas", "groups", "rounded"])
def test_the_last_block_trained_on_predictions_predicts_better(tmp_path, tiny_folder, text, made,
                                                               monkeypatch, kind):
    predictions, _ = made(kind)
    monkeypatch.setattr(room, "foreseen", lambda *_: {})
    outputs = quantise(tiny_folder, tmp_path / "outputs", text, **KINDS[kind])
    assert not any("nats" in error for error in outputs.tuned.values())
    words = np.random.default_rng(1).choice(["the", "cat", "sat", "on", "a", "mat"], 400)
    other = load(str(tiny_folder)).tokenizer.encode(" ".join(words))[:256]
    found = [kl(folder, tiny_folder, [other]) for folder in (predictions, tmp_path / "outputs")]
    assert found[0] < found[1]


@pytest.mark.parametrize("found", ["no number", "an error in a compiled step"])
def test_predictions_that_cannot_be_trained_for_leave_it_at_outputs(
        tmp_path, tiny_folder, text, monkeypatch, found):
    training, error, calls = block_tuning.Training, aims.PredictionLoss.error, []

    def failing(*given):
        calls.append(given)
        if found == "no number":
            return mx.array(float("nan"))
        if len(calls) > 1:  # the first is for what is held out
            raise ValueError("no derivative")
        return error(*given)

    monkeypatch.setattr(block_tuning, "Training", lambda *given, **_: training(*given))
    monkeypatch.setattr(aims.PredictionLoss, "error", failing)
    made = quantise(tiny_folder, tmp_path / "out", text, **KINDS["groups"])
    assert not any("nats" in error for error in made.tuned.values())
    assert all(error["after"] < error["before"] for error in made.tuned.values()) and not made.notes


def test_codes_end_in_other_cells(tmp_path, tiny_folder, text, made):
    quantise(tiny_folder, tmp_path / "tuned", text, **KINDS["replicas"] | {"tune_steps": 100})
    tuned, plain = (mx.load(str(folder / "model.safetensors"))
                    for folder in (tmp_path / "tuned", made("replicas", tuned=False)[0]))
    assert tuned.keys() == plain.keys()
    codes = [path for path in plain if path.endswith(".codes")]
    # Of the first block: what later ones are calibrated on differs.
    changed = [mx.not_equal(*(unpack_codes(found[path], Width.of(2), 16 * found[path].shape[1])
                              for found in (tuned, plain))) for path in codes if ".0." in path]
    moved = sum(each.sum().item() for each in changed) / sum(each.size for each in changed)
    told = record(tmp_path / "tuned")["tuned_blocks"]["model.layers.0"]["moved"]
    assert told == pytest.approx(moved) and moved > 0
    assert all(tuned[path].dtype == plain[path].dtype for path in plain)


def test_mirrored_levels_stay_mirrored(tmp_path, tiny_folder, text):
    made = quantise(tiny_folder, tmp_path / "out", text, bits=2, symmetric=True, refine=0,
                    tune_steps=8, samples=4)
    assert all(found["after"] < found["before"] for found in made.tuned.values())
    found = mx.load(str(tmp_path / "out" / "model.safetensors"))
    for path in [path for path in found if path.endswith(".scales")]:
        biases = found[path.replace("scales", "biases")]
        assert mx.allclose(biases, -1.5 * found[path], rtol=4e-3), path


def test_training_that_spoils_a_block_leaves_it_as_it_was(tmp_path, tiny_folder, text, made,
                                                          monkeypatch):
    plain, _ = made("groups", tuned=False)
    monkeypatch.setattr(block_tuning, "RATE", 30.0)
    spoilt = quantise(tiny_folder, tmp_path / "tuned", text, **KINDS["groups"])
    assert all(gain["after"] == gain["before"] for gain in spoilt.tuned.values())
    assert spoilt.notes[0].startswith("2 of 2 blocks left untuned, model.layers.0 the first: "
                                      "training brought it no nearer")
    files = [(folder / "model.safetensors").read_bytes() for folder in (tmp_path / "tuned", plain)]
    assert files[0] == files[1]


def test_a_stopped_run_ends_with_the_bytes_of_a_whole_one(tmp_path, tiny_folder, text, made):
    whole, seen = made("grouped replicas")[0], []

    def stop(done, total, value, stage):
        seen.append(stage)
        if stage == "tuning" and "quantising" in seen:  # amid the second block
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantise(tiny_folder, tmp_path / "again", text, progress=stop, **KINDS["grouped replicas"])
    assert not (tmp_path / "again").exists()
    resumed = []
    quantise(tiny_folder, tmp_path / "again", text, **KINDS["grouped replicas"],
             progress=lambda done, total, value, stage: resumed.append(stage))
    assert resumed[0] == "quantising" and resumed.count("tuning") == 18
    assert same(whole, tmp_path / "again")


@pytest.mark.parametrize("kind", ["replicas", "groups"])
def test_a_compiled_step_trains_as_a_plain_one_does(tmp_path, tiny_folder, text, monkeypatch, kind):
    """On any device, also without what computes matrices anew: each call's arrays are handed to a
    compiled step and not the first one's, and as many codes move."""
    training, checkpoint = block_tuning.Training, mx.checkpoint

    def errors(compiled, kept):
        name = f"{compiled}-{kept}"
        monkeypatch.setattr(block_tuning, "Training", lambda *given, **_: training(
            *given, compiled=compiled))
        monkeypatch.setattr(mx, "checkpoint", (lambda step: step) if kept else checkpoint)
        options = KINDS[kind] | dict(tune_steps=48, length=32, samples=16)
        return quantise(tiny_folder, tmp_path / name, text, **options).tuned.values()

    plain = errors(compiled=False, kept=True)
    assert all(block["moved"] > 0 for block in plain)
    for found, wanted in zip(errors(compiled=True, kept=False), plain):
        assert found == pytest.approx(wanted, rel=0.05)


@pytest.mark.parametrize("name, options", [
    ("qwen3_moe", KINDS["replicas"]), ("gpt_oss", KINDS["groups"] | dict(group_size=32)),
    ("gemma3n", KINDS["replicas"]), ("rwkv7", KINDS["replicas"]),
    *(pytest.param(name, KINDS["groups"] | dict(group_size=32), marks=pytest.mark.slow)
      for name in ("phixtral", "deepseek_v3")),
])
def test_blocks_of_any_signature_are_trained(tmp_path, text, name, options):
    source = write(name, tmp_path / "source")
    made = quantise(source, tmp_path / "tuned", text, tune_steps=8, length=32, **options)
    assert len(made.tuned) == 4
    # These two give more at the end than a hidden state a token.
    network, _ = open_lazily(source)
    assert bool(foreseen(network, blocks_of(network))) == (name not in ("gemma3n", "rwkv7"))
    assert any(gain["after"] < gain["before"] for gain in made.tuned.values())
    assert mx.isfinite(load(str(tmp_path / "tuned")).network(TOKENS)).all()


def test_a_block_that_cannot_be_trained_is_noted_and_made(tmp_path, tiny_folder, text):
    made = quantise(tiny_folder, tmp_path / "out", text, method="smoothquant", bits=8,
                    activation=ActivationSpec())
    assert not made.tuned and len(made.notes) == 1
    assert made.notes[0].startswith("2 of 2 blocks left untuned, model.layers.0 the first: ")
    assert "rounds activations" in made.notes[0] and record(tmp_path / "out")["notes"]


def test_a_block_whose_error_is_no_number_does_not_end_the_job(tmp_path, tiny_folder, text,
                                                               monkeypatch):
    for aim in (aims.OutputLoss, aims.PredictionLoss):
        monkeypatch.setattr(aim, "error", lambda *_: mx.array(float("nan")))
    made = quantise(tiny_folder, tmp_path / "out", text, **KINDS["groups"])
    assert not made.tuned and "its error is not a finite number" in made.notes[0]


def test_a_token_that_dwarfs_all_others_cannot_be_given_up_for_them():
    """SmolLM2's block 11 makes the first token of a text 170 times as large as the rest."""
    wanted = mx.concatenate([mx.full((1, 1, 8), 170.0), mx.ones((1, 511, 8))], axis=1)
    call = aims.BlockCall(Halt(nn.Identity(), lambda x: x, (wanted,), {}), wanted)
    without, coarse = mx.ones_like(wanted), mx.where(wanted > 1, wanted, 0.8)
    assert aims.OUTPUTS.error(call, wanted, wanted).item() == 0
    assert aims.OUTPUTS.error(call, without, wanted) > 10 * aims.OUTPUTS.error(
        call, coarse, wanted)


@pytest.mark.parametrize("error, said", [
    (RuntimeError("[malloc] Unable to allocate 9 bytes.\nAsked for 9."), "[malloc] Unable"),
    (MemoryError(), "MemoryError")])
def test_a_block_for_which_memory_runs_out_is_told_of_at_once(tmp_path, tiny_folder, text,
                                                              monkeypatch, error, said):
    """On standard error while it works, and with the result."""
    steps = []

    def short(self, *data):
        steps.append(data)
        if len(steps) > 4:  # in the second block
            raise error
        return 0.0

    monkeypatch.setattr(block_tuning.Training, "step", short)
    cleared, clear = [], mx.clear_cache
    monkeypatch.setattr(mx, "clear_cache", lambda: cleared.append(len(steps)) or clear())
    done = CliRunner().invoke(app, [
        "quantize", str(tiny_folder), "-o", str(tmp_path / "out"), "--bits", "2", "--data", text,
        "--samples", "4", "--sequence-length", "32", "--tune-steps", "4"])
    assert done.exit_code == 0 and 5 in cleared, done.output
    assert f"model.layers.1 is left untuned: {said}" in done.stderr
    assert f"1 of 2 blocks left untuned, model.layers.1 the first: {said}" in done.stdout
    assert "1 of 2 blocks left untuned, model.layers.0 the first: training brought" in done.stdout


def test_blocks_are_left_untuned_where_memory_is_short(tmp_path, tiny_folder, text, monkeypatch):
    asked = dict(bits=2, samples=2, length=64, tune_blocks=None, tune_steps=1, refine=0)
    network, _ = open_lazily(tiny_folder)
    needed = room.needs(network, blocks_of(network), job(text, **asked | {"length": 32}), 4)
    monkeypatch.setattr(room, "memory_limit", lambda: needed.memory)
    made = quantise(tiny_folder, tmp_path / "out", text, **asked)
    assert not made.tuned and len(made.notes) == 1
    assert made.notes[0].startswith("2 of 2 blocks left untuned, model.layers.0 the first: training"
                                    " takes 0.00 GB of memory, 0.00 GB may be used; --sequence-")
    assert made.notes[0].endswith("length 32 would fit")


def test_which_blocks_are_trained_is_settled_when_a_job_begins(tmp_path, tiny_folder, text,
                                                               monkeypatch):
    def stop(done, total, seconds, stage):
        if stage == "quantising":
            raise KeyboardInterrupt

    asked = dict(bits=2, samples=2, length=64, tune_blocks=None, tune_steps=1, refine=0)
    network, _ = open_lazily(tiny_folder)
    short = room.needs(network, blocks_of(network), job(text, **asked | {"length": 32}), 4).memory
    for begun, other in ((short, 1e12), (1e12, short)):
        out = tmp_path / str(begun)
        monkeypatch.setattr(room, "memory_limit", lambda limit=begun: limit)
        with pytest.raises(KeyboardInterrupt):
            quantise(tiny_folder, out, text, progress=stop, **asked)
        monkeypatch.setattr(room, "memory_limit", lambda limit=other: limit)
        if other == short:
            with pytest.raises(TooLarge, match="layers.0 cannot be trained in the memory that is"):
                quantise(tiny_folder, out, text, **asked)
        else:
            assert not quantise(tiny_folder, out, text, **asked).tuned


@pytest.mark.parametrize("options, tuned", [
    (dict(bits=3), True), (dict(bits=4), False), (dict(bits=2, method="rtn"), False),
    (dict(bits=2, tune_blocks=False), False), (dict(bits=4, tune_blocks=True), True)])
def test_by_default_blocks_below_4_bits_are_trained(tmp_path, tiny_folder, text, options, tuned):
    asked = {"tune_blocks": None, "tune_steps": 1} | options
    made = quantise(tiny_folder, tmp_path / "out", text, samples=2, length=16, refine=0, **asked)
    assert bool(made.tuned) is tuned


def test_the_command_says_what_it_gained(tmp_path, tiny_folder, text):
    options = ["--bits", "2", "--data", text, "--samples", "8", "--sequence-length", "64"]
    done = commands.run("quantize", str(tiny_folder), "-o", str(tmp_path / "out"), *options,
                        "--tune-steps", "24")
    assert "tuned: the outputs of 1 blocks are off the original's by " in done.stdout
    assert " before; the last block's predictions by 0.00" in done.stdout
    assert "tuned: the outputs of 1 blocks" in commands.run("inspect", str(tmp_path / "out")).stdout
    with pytest.raises(BadValue, match="tune_steps is 0"):
        Job().changed(tune_steps=0)


@pytest.mark.parametrize("steps, least", [(32, 0.1), (640, 0.3)])
def test_rates_fall_to_nothing_and_long_training_has_more_small_ones(steps, least):
    rate = block_tuning._falling(0.5, steps)
    rates = [rate(mx.array(step)).item() for step in range(steps + 1)]
    assert rates[0] == pytest.approx(0.5) and rates[-1] == pytest.approx(0, abs=1e-7)
    assert rates == sorted(rates, reverse=True)
    assert least < np.mean(np.array(rates) < 0.05) < least + 0.2
