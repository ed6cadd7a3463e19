"""Windows of text: behind BOS where the tokenizer adds one, of tokens that the model has."""

import json
import math
from dataclasses import replace
from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from conftest import CONFIG, random_network, tokenizer_texts, write_folder

import mlxquant  # first: it loads the BLAS before MLX
from mlxquant.base.errors import BadCheckpoint, BadValue, MlxquantError, TooLarge
from mlxquant.model import windows
from mlxquant.quantise import calibration
from mlxquant.quantise.self_written import self_written
from mlxquant.report.by_layer import by_layer
from mlxquant.report.divergence import divergence

TEXT = "The quick brown fox jumps over the lazy dog. " * 12
BOS = 0
CONTEXT, WINDOWS = 50, 3


@pytest.fixture(scope="module")
def begins(tmp_path_factory):
    """A model whose tokenizer puts a BOS before every text, and its network's twin without."""
    config, name = CONFIG | {"tie_word_embeddings": False}, "<|endoftext|>"
    folder = tmp_path_factory.mktemp("models") / "begins"
    write_folder(folder, random_network(config), config)
    first, second = ({"Sequence": {"id": letter, "type_id": 0}} for letter in "AB")
    lead = {"SpecialToken": {"id": name, "type_id": 0}}
    processor = {"type": "TemplateProcessing", "single": [lead, first], "pair": [first, second],
                 "special_tokens": {name: {"id": name, "ids": [BOS], "tokens": [name]}}}
    for file, entries in (("tokenizer.json", {"post_processor": processor}),
                          ("tokenizer_config.json", {"bos_token": name})):
        text = json.dumps(json.loads(tokenizer_texts()[file]) | entries)
        (folder / file).write_text(text)
    return mlxquant.load(str(folder))


def test_a_window_begins_as_the_tokenizer_does(begins, tiny):
    assert windows.beginning(begins.tokenizer) == [BOS] and windows.beginning(tiny.tokenizer) == []
    for model, lead in ((begins, [BOS]), (tiny, [])):
        found = windows.first_windows(model, TEXT, CONTEXT, WINDOWS)
        tokens = model.tokenizer.encode(TEXT, add_special_tokens=False)
        for index, window in enumerate(found):
            own = tokens[index * CONTEXT:(index + 1) * CONTEXT]
            assert window.tokens.tolist() == [lead + own] and window.targets.tolist() == [own[1:]]


def test_perplexity_behind_bos_equals_a_float64_reference(begins):
    tokens = begins.tokenizer.encode(TEXT, add_special_tokens=False)
    losses = []
    for start in range(0, WINDOWS * CONTEXT, CONTEXT):
        window = [BOS, *tokens[start:start + CONTEXT]]
        logits = np.array(begins.network(mx.array([window])))[0].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        losses += [-logits[position, window[position + 1]] for position in range(1, CONTEXT)]
    result = mlxquant.evaluate(begins, TEXT, context=CONTEXT, windows=WINDOWS)
    assert result.perplexity == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)
    assert (result.tokens, result.windows, result.context, result.bos) == (3 * 49, 3, 50, True)
    same = divergence(begins, begins, TEXT, context=CONTEXT, windows=WINDOWS)
    assert same.perplexity == result.perplexity


def test_the_same_positions_are_predicted_with_and_without_bos(begins, tiny):
    bare = replace(begins, tokenizer=tiny.tokenizer)  # the same network and vocabulary
    ours, without = (mlxquant.evaluate(x, TEXT, context=CONTEXT) for x in (begins, bare))
    assert (ours.tokens, ours.windows) == (without.tokens, without.windows) and not without.bos
    assert ours.perplexity != without.perplexity
    for one, other in zip(*(windows.first_windows(x, TEXT, CONTEXT) for x in (begins, bare))):
        assert one.targets.tolist() == other.targets.tolist()
        assert one.logits(begins.network).shape == other.logits(begins.network).shape


def test_layers_are_compared_at_the_texts_positions(begins):
    seen = []
    by_layer(begins, begins, TEXT, context=CONTEXT, windows=1,
             progress=lambda *done: seen.append(done))
    assert seen == [(1, 1, 0)]


def test_a_window_with_bos_fits_the_context_exactly(begins, tiny):
    for model in (begins, tiny):
        assert mlxquant.evaluate(model, TEXT, context=512, windows=1).tokens == 511
        with pytest.raises(TooLarge, match="holds 512"):
            mlxquant.evaluate(model, TEXT, context=513)


def test_sequences_to_calibrate_and_train_on_begin_with_bos(begins, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    name = str(tmp_path / "text.txt")
    text = begins.tokenizer.encode(TEXT, add_special_tokens=False)
    starts = {tuple(text[i:i + 31]) for i in range(len(text) - 30)}
    drawn = [calibration.from_files(begins.tokenizer, [name], 5, 32, vocabulary=384),
             *calibration.held_apart(begins.tokenizer, [name], 5, 2, 32, vocabulary=384)]
    for found in drawn:
        assert found.tokens.shape[1] == 32 and (found.tokens[:, 0] == BOS).all()
        assert all(tuple(row[1:]) in starts for row in found.tokens)
    assert (self_written(begins, 3, 8).tokens[:, 0] == BOS).all()


def test_calibration_without_bos_is_as_it_was(tiny, tmp_path):
    """The rows that the results recorded so far were calibrated on."""
    (tmp_path / "text.txt").write_text(TEXT)
    name = str(tmp_path / "text.txt")
    found = calibration.from_files(tiny.tokenizer, [name], 7, 20, 3, vocabulary=384)
    random, text = np.random.default_rng(3), tiny.tokenizer.encode(TEXT, add_special_tokens=False)
    for row in found.tokens:
        start = random.integers(0, len(text) - 20 + 1)
        assert row.tolist() == text[start:start + 20]


def test_a_text_that_is_gone_over_again_and_again_is_said(tiny, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("x" * 33)
    name = str(tmp_path / "short.txt")
    calibration.from_files(tiny.tokenizer, [name], 2, 32, vocabulary=384)
    assert capsys.readouterr().err == ""
    calibration.from_files(tiny.tokenizer, [name], 128, 32, vocabulary=384)
    said = capsys.readouterr().err
    assert "33 distinct tokens for 128 sequences of 32: each is used 124 times" in said
    with pytest.raises(BadValue, match="has 33 tokens, a sample needs 34"):
        calibration.from_files(tiny.tokenizer, [name], 1, 34, vocabulary=384)


def test_texts_of_which_none_would_be_read_are_refused(tiny):
    for draw in (calibration.from_files, partial(calibration.held_apart, held=9)):
        with pytest.raises(BadValue, match="2 samples cannot be drawn from 3 texts"):
            draw(tiny.tokenizer, ["a.txt", "b.txt", "c.txt"], samples=2, length=8, vocabulary=384)


def test_tokens_beyond_the_embedding_are_refused_before_anything_runs(tiny, tmp_path):
    small = replace(tiny, network=random_network(CONFIG | {"vocab_size": 80}))
    (tmp_path / "text.txt").write_text(TEXT)
    with pytest.raises(BadCheckpoint, match="gives token .*, the model knows 80 tokens"):
        mlxquant.evaluate(small, TEXT, context=20)
    with pytest.raises(BadCheckpoint, match="knows 80 tokens"):
        calibration.from_files(tiny.tokenizer, [str(tmp_path / "text.txt")], 2, 20, vocabulary=80)
    assert self_written(small, 4, 6).tokens.max() < 80


@pytest.mark.parametrize("name, content, says", [
    ("latin.txt", b"caf\xe9 au lait", "as UTF-8 text"), ("lines.jsonl", b'{"txt": 1}\n', "'text'"),
    ("lines.jsonl", b'{"text": \n', "Expecting value")])
def test_a_file_that_is_no_text_is_refused_in_one_line(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MlxquantError, match=says) as error:
        windows.read_text(str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_the_texts_of_json_lines_are_joined(tmp_path):
    """Lines end as JSON lines do, not at each character that Unicode calls a line's end."""
    (tmp_path / "lines.jsonl").write_bytes(
        '{"text": "o\u2028n\u0085e"}\r\n\n{"text": "two"}\n'.encode())
    assert windows.read_text(str(tmp_path / "lines.jsonl")) == "o\u2028n\u0085e\n\ntwo"
