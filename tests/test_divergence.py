"""Divergence from a reference and the error by layer, against independent float64 computations."""

import json
import math
from dataclasses import fields, replace

import mlx.core as mx
import numpy as np
import pytest
from commands import run as command
from conftest import CONFIG, random_network, write_folder
from mlx.utils import tree_map

import mlxquant
from mlxquant.base.errors import BadValue, TooLarge
from mlxquant.report.by_layer import by_layer, plot
from mlxquant.report.divergence import Divergence, divergence

TEXT = "The quick brown fox jumps over the lazy dog. " * 12
CONTEXT, WINDOWS = 50, 3


def teacher_network(config: dict = CONFIG):
    """With small embeddings: those of ``random_network`` make it certain of every next token."""
    network = random_network(config)
    network.model.embed_tokens.weight = 0.1 * network.model.embed_tokens.weight
    return network


def noisy(weight: mx.array) -> mx.array:
    if weight.ndim == 1:
        return weight
    return weight + 0.1 * weight.std() * mx.random.normal(weight.shape)


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("models") / "teacher", teacher_network())


@pytest.fixture(scope="module")
def teacher(teacher_folder):
    return mlxquant.load(str(teacher_folder))


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """The teacher with noise on its matrices, standing for a quantised model."""
    network = teacher_network()
    network.update(tree_map(noisy, network.parameters()))
    return mlxquant.load(str(write_folder(tmp_path_factory.mktemp("models") / "student", network)))


def windows(model) -> list[mx.array]:
    tokens = model.tokenizer.encode(TEXT, add_special_tokens=False)
    return [mx.array([tokens[i * CONTEXT:(i + 1) * CONTEXT]]) for i in range(WINDOWS)]


def log_probabilities(model, window: mx.array) -> np.ndarray:
    logits = np.array(model.network(window))[0, :-1].astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def test_divergence_equals_a_float64_reference(teacher, student):
    kl, agree, losses = [], [], [[], []]
    for window in windows(teacher):
        p, q = log_probabilities(teacher, window), log_probabilities(student, window)
        kl.append((np.exp(p) * (p - q)).sum(axis=-1))
        agree.append(p.argmax(axis=-1) == q.argmax(axis=-1))
        for loss, x in zip(losses, (p, q)):
            loss.append(-x[np.arange(CONTEXT - 1), np.array(window)[0, 1:]])
    result = divergence(student, teacher, TEXT, context=CONTEXT, windows=WINDOWS)
    assert result.kl_mean == pytest.approx(np.mean(kl), rel=1e-4) and result.kl_mean > 1e-3
    assert result.kl_p99 == pytest.approx(np.percentile(kl, 99), rel=1e-4)
    deviations = np.mean(kl, axis=1) - np.mean(kl)
    assert result.kl_stderr == pytest.approx(
        math.sqrt((deviations ** 2).sum() / (WINDOWS - 1) / WINDOWS), rel=1e-3)
    assert result.top1_agreement == pytest.approx(np.mean(agree)) and result.top1_agreement < 1
    perplexities = [math.exp(np.mean(loss)) for loss in losses]
    assert [result.reference_perplexity, result.perplexity] == pytest.approx(perplexities, rel=1e-4)
    assert result.perplexity_ratio == pytest.approx(perplexities[1] / perplexities[0], rel=1e-4)
    assert 0 <= result.kl_noise_floor < 1e-5 < result.kl_mean


def test_what_evaluate_reports_stays_the_same(teacher, student):
    plain = mlxquant.evaluate(student, TEXT, context=CONTEXT, windows=WINDOWS)
    result = divergence(student, teacher, TEXT, context=CONTEXT, windows=WINDOWS)
    assert [getattr(result, f.name) for f in fields(plain)] == [getattr(plain, f.name)
                                                                for f in fields(plain)]


def test_a_model_does_not_diverge_from_itself(teacher):
    seen = []
    result = divergence(teacher, teacher, TEXT, context=CONTEXT, windows=2,
                        progress=lambda *state: seen.append(state))
    assert (result.kl_mean, result.kl_p99, result.kl_stderr) == (0, 0, 0)
    assert (result.top1_agreement, result.perplexity_ratio) == (1, 1)
    assert seen == [(1, 2, 0), (2, 2, 0)]


def test_one_window_has_no_standard_error_and_two_tokens_suffice(teacher, student):
    result = divergence(student, teacher, TEXT, context=2, windows=1)
    assert result.kl_stderr is None and result.tokens == 1 and result.kl_mean > 0
    assert "±" not in result.line()


def test_the_noise_floor_rises_with_coarser_rounding(teacher):
    network = teacher_network()
    network.set_dtype(mx.bfloat16)
    fine, coarse = (divergence(model, model, TEXT, context=20, windows=1).kl_noise_floor
                    for model in (teacher, replace(teacher, network=network)))
    assert 0 < fine < 1e-5 < coarse < 1e-2


def test_models_that_do_not_belong_together_are_refused(teacher):
    config = {**CONFIG, "vocab_size": 390}
    wide = replace(teacher, name="wide", network=teacher_network(config))
    config = {**CONFIG, "num_hidden_layers": 3}
    deep = replace(teacher, name="deep", network=teacher_network(config))
    short = replace(teacher, name="short", config={**CONFIG, "max_position_embeddings": 10})

    class Swapped:
        encode = teacher.tokenizer.encode

        def get_vocab(self):
            return {**teacher.tokenizer.get_vocab(), "a": 70, "b": 69}

    other = replace(teacher, name="other", tokenizer=Swapped())
    for measure in (divergence, by_layer):
        with pytest.raises(BadValue, match="^the vocabulary of wide has 390 entries, .* 384;"):
            measure(wide, teacher, TEXT, context=CONTEXT)
        with pytest.raises(BadValue, match="tokenizers of other and .* different ids"):
            measure(other, teacher, TEXT, context=CONTEXT)
        with pytest.raises(TooLarge, match="short holds 10"):
            measure(teacher, short, TEXT, context=CONTEXT)
    with pytest.raises(BadValue, match="^deep has 3 blocks of width 64, .* has 2 of width 64"):
        by_layer(deep, teacher, TEXT, context=CONTEXT)


def block_outputs(model, window: mx.array) -> list[np.ndarray]:
    """Hidden states by going through the blocks by hand."""
    body, states = model.network.model, []
    h = body.embed_tokens(window[:, :-1])
    for block in body.layers:
        h = block(h, "causal", None)
        states.append(np.array(h)[0].astype(np.float64))
    return states


def test_layer_errors_equal_a_float64_reference(teacher, student):
    result = by_layer(student, teacher, TEXT, context=CONTEXT, windows=WINDOWS)
    pairs = [list(zip(block_outputs(student, window), block_outputs(teacher, window)))
             for window in windows(teacher)]
    assert [layer.layer for layer in result] == [0, 1]
    for index, layer in enumerate(result):
        h_q, h = (np.concatenate(x) for x in zip(*(pair[index] for pair in pairs)))
        error = np.linalg.norm(h_q - h) / np.linalg.norm(h)
        assert layer.relative_error == pytest.approx(error, rel=1e-4) and error > 0.01
        ratios = np.linalg.norm(h_q - h, axis=1) / np.linalg.norm(h, axis=1)
        assert layer.position_error == pytest.approx(ratios.mean(), rel=1e-4)
        for state, kurtosis, largest in (
                (h_q, layer.kurtosis, layer.largest_channels),
                (h, layer.reference_kurtosis, layer.reference_largest_channels)):
            centred = state - state.mean(axis=1, keepdims=True)
            moments = (centred ** 4).mean(axis=1) / (centred ** 2).mean(axis=1) ** 2
            assert kurtosis == pytest.approx(moments.mean(), rel=1e-4)
            peaks = np.abs(state).max(axis=0)
            assert [c.index for c in largest] == list(np.argsort(-peaks)[:3])
            assert [c.max_abs for c in largest] == pytest.approx(np.sort(peaks)[:-4:-1], rel=1e-5)


def test_a_model_has_no_layer_error_against_itself(teacher):
    layers = by_layer(teacher, teacher, TEXT, context=CONTEXT, windows=1)
    assert [(layer.relative_error, layer.position_error) for layer in layers] == [(0, 0)] * 2
    assert all(layer.kurtosis == layer.reference_kurtosis > 1 for layer in layers)


def test_one_huge_channel_does_not_overflow(teacher):
    """Massive activations: 1e10 to the fourth power is beyond float32."""
    network = teacher_network()
    network.model.embed_tokens.weight[:, 5] = 1e10
    layers = by_layer(replace(teacher, network=network), teacher, TEXT, context=CONTEXT, windows=1)
    assert layers[0].largest_channels[0].index == 5
    assert layers[0].kurtosis == pytest.approx(62, abs=1.5)  # n − 2 + 1/(n − 1) at most, n = 64


@pytest.mark.parametrize("name,start", [("error.png", b"\x89PNG"), ("error.svg", b"<?xml")])
def test_a_plot_is_written(teacher, student, tmp_path, name, start):
    plot(by_layer(student, teacher, TEXT, context=CONTEXT, windows=1), tmp_path / name)
    content = (tmp_path / name).read_bytes()
    assert content.startswith(start) and len(content) > 10_000


@pytest.fixture(scope="module")
def evaluate_command(student, teacher_folder, tmp_path_factory):
    """Runs ``mlxquant evaluate`` of the student against the teacher."""
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text(TEXT)

    def run(*options):
        return command("evaluate", student.folder, "--text", text, "--context", CONTEXT,
                       "--windows", 2, *options)

    run.reference = ("--reference", teacher_folder)
    return run


def test_command_line_divergence(evaluate_command):
    result = evaluate_command(*evaluate_command.reference, "--json")
    value = json.loads(result.stdout)
    assert set(value) == {f.name for f in fields(Divergence)} >= {
        "perplexity", "tokens", "context", "windows", "bits_per_weight", "file_bytes", "kl_mean",
        "kl_p99", "kl_stderr", "kl_noise_floor", "top1_agreement", "reference_perplexity",
        "perplexity_ratio"}
    assert value["tokens"] == 98 and value["kl_mean"] > value["kl_noise_floor"]


def test_command_line_by_layer(evaluate_command, tmp_path):
    options = (*evaluate_command.reference, "--by-layer")
    result = evaluate_command(*options, "--plot", tmp_path / "error.png", "--json")
    value = json.loads(result.stdout)
    assert [layer["layer"] for layer in value] == [0, 1]
    assert set(value[0]) == {
        "layer", "relative_error", "position_error", "kurtosis", "reference_kurtosis",
        "largest_channels", "reference_largest_channels"}
    assert set(value[0]["largest_channels"][0]) == {"index", "max_abs"}
    assert (tmp_path / "error.png").stat().st_size > 10_000
    table = evaluate_command(*options).stdout
    assert f"{100 * value[1]['relative_error']:.2f} %" in table and "…" not in table


@pytest.mark.parametrize("options,code,message", [
    (("--by-layer",), 2, "error: --by-layer needs --reference"),
    (("--reference", "x", "--plot", "a.png"), 2, "error: --plot needs --by-layer"),
    (("--reference", "x", "--by-layer", "--plot", "a.gif"), 2, "must end in .png or .svg"),
    (("--reference", "x", "--by-layer", "--plot", "/no/a.png"), 1, "error: no such folder: /no"),
])
def test_bad_options_end_in_one_line(evaluate_command, options, code, message):
    result = evaluate_command(*options)
    assert result.returncode == code and message in result.stderr
    assert result.stdout == "" and result.stderr.count("\n") == 1
