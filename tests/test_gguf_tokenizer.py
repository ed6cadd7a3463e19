"""Tokenizers from GGUF metadata alone: SentencePiece as the original, splits, special tokens."""

import io
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from conftest import SPECIAL, TEMPLATE, alphabet
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlxquant.base.errors import BadCheckpoint, Unsupported
from mlxquant.sources.gguf import tokenizer
from mlxquant.sources.gguf.reader import GGUFModel
from mlxquant.sources.gguf.splitters import SPLITTERS

TEXTS = ["Hello there, General Kenobi!", "  two  spaces   and\nnew\tlines ", "naïve Zoë 日本語 🙂",
         "x = a[1] + 42;",
         "", " ", "the theory of the thing"]


def model(fields: dict) -> GGUFModel:
    metadata = {f"tokenizer.ggml.{key}": value for key, value in fields.items()}
    return GGUFModel(Path("m.gguf"), metadata | {"general.architecture": "llama",
                                                 "llama.context_length": 512,
                                                 "tokenizer.chat_template": TEMPLATE}, {})


def load(folder: Path, fields: dict) -> PreTrainedTokenizerFast:
    for name, text in tokenizer.files(model(fields)).items():
        (folder / name).write_text(text)
    return PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.fixture(scope="module", params=[True, False], ids=["prefixed", "bare"])
def original(request) -> sentencepiece.SentencePieceProcessor:
    """A SentencePiece model as Llama's (or, without a prefix, Gemma's), trained on our source."""
    text = Path(tokenizer.__file__).read_text() + Path(__file__).read_text() + " ".join(TEXTS) * 20
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()), model_writer=written, model_type="bpe",
        vocab_size=700,
        byte_fallback=True, add_dummy_prefix=request.param, remove_extra_whitespaces=False,
        normalization_rule_name="identity", user_defined_symbols=["<tool>"], minloglevel=2)
    return sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())


def piece_fields(original) -> dict:
    """What llama.cpp's converter writes of a SentencePiece model."""
    count, types = original.vocab_size(), []
    for n in range(count):
        types.append(2 if original.is_unknown(n) else 3 if original.is_control(n)
                     else 6 if original.is_byte(n)
                     else 4 if original.id_to_piece(n) == "<tool>" else 1)
    prefixed = original.encode("a", out_type=str)[0].startswith("▁")
    return {"model": "llama", "tokens": [original.id_to_piece(n) for n in range(count)],
            "scores": np.array([original.get_score(n) for n in range(count)], np.float32),
            "token_type": np.array(types, np.int32), "bos_token_id": 1, "eos_token_id": 2,
            "unknown_token_id": 0,
            "add_space_prefix": prefixed}


def test_sentencepiece_tokens_are_the_originals(original, tmp_path):
    made = load(tmp_path, piece_fields(original))
    for text in [*TEXTS, *Path(tokenizer.__file__).read_text().splitlines()]:
        ids = made.encode(text)
        assert ids[0] == 1  # BOS, as llama.cpp adds it to this kind
        assert ids[1:] == original.encode(text), text
        assert made.decode(ids, skip_special_tokens=True) == original.decode(ids[1:])


def test_added_tokens_are_found_whole(original, tmp_path):
    made = load(tmp_path, piece_fields(original))
    ids = made.encode("a<tool>b</s>", add_special_tokens=False)
    assert original.piece_to_id("<tool>") in ids and ids[-1] == 2


def byte_fields(**changes) -> dict:
    types = np.array([3] * 3 + [1] * (len(alphabet()) - 3), np.int32)
    return {"model": "gpt2", "pre": "gpt-2", "tokens": alphabet(), "token_type": types,
            "merges": [],
            "eos_token_id": 2} | changes


def test_qwens_tokens_are_those_of_its_own_class(tmp_path):
    """transformers makes Qwen 2's of vocabulary and merges, with its own split and normal form."""
    from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

    ours = load(tmp_path, byte_fields(pre="qwen2"))
    theirs = Qwen2Tokenizer(vocab={word: n for n, word in enumerate(alphabet())}, merges=[])
    for made in ours, theirs:  # no merges: every piece is told apart by its bytes alone
        made.pieces = [made.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
                       for text in QWEN_TEXTS]
    assert ours.pieces == theirs.pieces
    assert [ours.encode(t) for t in QWEN_TEXTS] == [theirs.encode(t) for t in QWEN_TEXTS]


def test_a_missing_splitting_rule_is_said(tmp_path, capsys):
    fields = byte_fields()
    del fields["pre"]
    load(tmp_path, fields)
    assert "tokenizer.ggml.pre" in capsys.readouterr().err


QWEN_TEXTS = ["don't DON'T I'll we'Ve", "x=1234567890, 3.14e-10", "  two\t\ttabs \n\n\n lines\r\n",
              "e\u0301 cafe\u0301 \u1112\u1161\u11ab A\u030a \u212b", "日本語 中文 한국어 ไทย ١٢٣",
              "🇩🇪👨‍👩‍👧🏽 हिन्दी Ⅷ ½ ﬁ", "ſ'ſ \u212a 's 'S", "a\u00a0b\u2003c\u200bd\x00\x7f",
              "!!!???...\n\n---\n"]
SAMPLE = "I'VE 12345 Ünïcode's camelCase\r\n\n  x+=1 你好"


@pytest.mark.parametrize("kind,pieces", [
    ("gpt-2", "I|'|VE| 12345| Ünïcode|'s| camelCase|\r\n\n | x|+=|1| 你好"),
    ("smollm", "I|'|VE| |1|2|3|4|5| Ünïcode|'s| camelCase|\r\n\n | x|+=|1| 你好"),
    ("llama-bpe", "I|'VE| |123|45| Ünïcode|'s| camelCase|\r\n\n| | x|+=|1| 你好"),
    ("qwen2", "I|'VE| |1|2|3|4|5| Ünïcode|'s| camelCase|\r\n\n| | x|+=|1| 你好"),
    ("tekken", "I|'VE| |1|2|3|4|5| Ünïcode|'s| camel|Case|\r\n\n| | x|+=|1| 你好"),
    ("gpt-4o", "I'VE| |123|45| Ünïcode's| camel|Case|\r\n\n| | x|+=|1| 你好"),
    ("deepseek-v3", "I|'VE| |123|45| Ünïcode|'s| camelCase|\r\n\n| | x|+=|1| |你好"),
])
def test_splitting_rules(kind, pieces):
    whole = SPLITTERS[kind].build().pre_tokenize_str(SAMPLE)
    assert "|".join(SAMPLE[begin:end] for _, (begin, end) in whole) == pieces


def test_gpt2s_rule_is_that_of_the_library():
    theirs = pre_tokenizers.ByteLevel(add_prefix_space=False)
    ours = SPLITTERS["gpt-2"].build()
    for text in [SAMPLE, *TEXTS, Path(__file__).read_text()]:
        assert ours.pre_tokenize_str(text) == theirs.pre_tokenize_str(text)


def test_whole_words_come_before_merges(tmp_path):
    tokens = [*alphabet()[:-1], "abc"]
    plain = load(tmp_path, byte_fields(tokens=tokens))
    assert len(plain.encode("abc")) == 3
    assert load(tmp_path, byte_fields(tokens=tokens,
                                      pre="llama-bpe")).encode("abc") == [len(tokens) - 1]


@pytest.mark.parametrize("changes,ends", [
    ({"add_bos_token": True, "bos_token_id": 0}, ([0], [])), ({"add_eos_token": True}, ([], [2])),
    ({"pre": "llama-bpe", "bos_token_id": 0}, ([0], [])),
    ({"pre": "llama-bpe", "bos_token_id": 0, "add_bos_token": False}, ([], []))])
def test_texts_begin_and_end_as_the_file_says(tmp_path, changes, ends):
    made = load(tmp_path, byte_fields(**changes))
    bare = made.encode("hi", add_special_tokens=False)
    assert made.encode("hi") == [*ends[0], *bare, *ends[1]]


def test_every_token_that_ends_a_turn_is_a_stop():
    assert tokenizer.stops(model(byte_fields(bos_token_id=1))) == {"bos_token_id": 1,
                                                                   "eos_token_id": 2}
    several = tokenizer.stops(model(byte_fields(eos_token_id=0, eot_token_id=5)))
    assert several == {"eos_token_id": [0, 5, SPECIAL.index("<|im_end|>")]}


@pytest.mark.parametrize("changes,error,message", [
    ({"model": "t5"}, Unsupported, "tokenizer 't5'; supported: gpt2, llama"),
    ({"pre": "kimi-k2"}, Unsupported, "splitting rule 'kimi-k2'"),
    ({"tokens": ["a", "a"]}, BadCheckpoint, "a token is there twice"),
    ({"tokens": ["a", 3]}, BadCheckpoint, "tokens is no list of strings"),
    ({"tokens": ["a" * 2000]}, BadCheckpoint, "more than 1024 characters"),
    ({"merges": ["zz qq"]}, BadCheckpoint, "inconsistent"),
    ({"eos_token_id": 10**6}, BadCheckpoint, "eos_token_id 1000000 is outside the vocabulary"),
    ({"token_type": np.zeros(3, np.int32)}, BadCheckpoint, "has no number for each"),
    ({"model": "llama"}, BadCheckpoint, "scores has no number for each"),
])
def test_what_is_wrong_is_named(changes, error, message):
    with pytest.raises(error, match=message):
        tokenizer.files(model(byte_fields(**changes)))
