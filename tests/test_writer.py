"""From tokens to text: first spaces, broken characters, stop strings; alike in every way in."""

from itertools import pairwise

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import scripted
from test_prompt import sentencepiece

import mlxquant
from mlxquant import PromptCache, Sampling
from mlxquant.base.errors import MlxquantError, Unsupported
from mlxquant.runtime.writer import Detokenizer, StopStrings, spell


def stopped(stops, pieces):
    strings, text = StopStrings(stops), ""
    for piece in pieces:
        safe, found = strings.feed(piece)
        text += safe
        if found:
            return text, found
    return text + strings.finish(), None


@settings(deadline=None)
@given(st.text("ab\n", max_size=12), st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
       st.lists(st.integers(0, 12), max_size=4))
def test_a_stop_string_is_found_in_whatever_pieces(text, stops, cuts):
    marks = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in pairwise(marks)]
    shown, found = stopped(stops, pieces)
    assert (shown, found) == stopped(stops, list(text))
    assert text.startswith(shown + (found or ""))
    assert not any(stop in shown for stop in stops)
    assert (found is None) == (not any(stop in text for stop in stops))


WRITTEN = ["Hello! How can I assist you today?", "Q: no\nA: yes\n\nQ:", " leading",
           "née — ünïcode 日本"]


@pytest.mark.parametrize("reply", WRITTEN)
@pytest.mark.parametrize("stop", ["How can", "\n", "?!", "?", " ", "é", "本", "A: yes\n\n", "zz"])
def test_stop_strings_stop_alike_for_one_and_for_many(tiny_folder, reply, stop):
    expected = reply[:reply.index(stop)] if stop in reply else reply
    chat = [{"role": "user", "content": "hello"}]
    one = mlxquant.generate(scripted(tiny_folder, [reply]), chat, stop=stop)
    assert one.text == expected and one.finish_reason == "stop"
    assert one.stopped_by == (stop if stop in reply else None)


def test_a_batch_stops_as_a_single_prompt_does(tiny):
    prompts = ["Once upon", "x", [5, 6, 7]]
    whole = [mlxquant.generate(tiny, prompt, max_tokens=30).text for prompt in prompts]
    for stop in {text[at:at + 2] for text in whole for at in (0, 5, 11)}:
        alone = [mlxquant.generate(tiny, p, max_tokens=30, stop=stop).text for p in prompts]
        batch = mlxquant.batch_generate(tiny, prompts, max_tokens=30, stop=stop)
        assert list(batch.texts) == alone and any(len(t) < len(w) for t, w in zip(alone, whole))


def text_of(tokenizer, tokens, before=()):
    detokenizer = Detokenizer(tokenizer, before)
    return "".join([*map(detokenizer.add, tokens), detokenizer.finish()])


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(3, 258), max_size=30))
def test_pieces_together_are_what_the_tokenizer_decodes(tiny, tokens):
    assert text_of(tiny.tokenizer, tokens) == tiny.tokenizer.decode(tokens)
    assert "\ufffd" not in text_of(tiny.tokenizer, tiny.tokenizer.encode("日本é"))


def test_raw_text_goes_on_with_its_space():
    tokenizer = sentencepiece(bos=True)
    once, upon, a = (tokenizer.convert_tokens_to_ids(word) for word in ("▁Once", "▁upon", "▁a"))
    assert text_of(tokenizer, [a, upon], before=[1, once, upon]) == " a upon"
    assert text_of(tokenizer, [a, upon]) == "a upon"  # a reply of its own, as in a chat
    assert text_of(tokenizer, [a, upon], before=[1]) == "a upon"
    split = [3 + byte for byte in "é".encode()]
    assert text_of(tokenizer, split[1:], before=[once, split[0]]) == "é"


def test_a_token_is_spelled_in_bytes_with_its_space(tiny):
    written = " née — 日本 �😀"
    tokens = tiny.tokenizer.encode(written, add_special_tokens=False)
    assert b"".join(spell(tiny.tokenizer, token) for token in tokens) == written.encode()
    tokenizer = sentencepiece(bos=True)
    words = ["▁Once", "▁", "a", "<0xC3>", "<0xA9>", "<0x0A>", "</s>"]
    assert [spell(tokenizer, tokenizer.convert_tokens_to_ids(word)) for word in words] == [
        b" Once", b" ", b"a", b"\xc3", b"\xa9", b"\n", b"</s>"]


def test_the_first_space_is_kept_by_all(tiny_folder):
    raw = mlxquant.generate(scripted(tiny_folder, [" in a land"]), "Once upon a time")
    assert raw.text == " in a land"


def test_penalties_count_what_is_in_the_cache(tiny):
    """Whether a prompt was read now, before, or beside others changes nothing."""
    prompt, cache = [5, 6, 7, 8, 9] * 4, PromptCache()
    penalised = Sampling(repetition_penalty=2.0, frequency_penalty=9.0, presence_penalty=5.0)
    options = dict(max_tokens=20, sampling=penalised)
    fresh = mlxquant.generate(tiny, prompt, **options).text
    assert fresh != mlxquant.generate(tiny, prompt, max_tokens=20).text
    mlxquant.generate(tiny, prompt, max_tokens=2, cache=cache)
    again = mlxquant.generate(tiny, prompt, cache=cache, **options)
    assert again.report.cached_tokens > 10 and again.text == fresh
    assert mlxquant.batch_generate(tiny, [prompt, "x"], **options).texts[0] == fresh
    assert mlxquant.generate(tiny, prompt, draft=tiny, **options).text == fresh
    assert mlxquant.generate(tiny, prompt, lookup=4, **options).text == fresh


def test_a_bias_bans_and_forces_tokens(tiny):
    plain = mlxquant.generate(tiny, "x", max_tokens=1, logprobs=0).scored[0].text
    token = tiny.tokenizer.encode(plain, add_special_tokens=False)[0]
    banned = Sampling(logit_bias={token: -float("inf")})
    assert mlxquant.generate(tiny, "x", max_tokens=1, sampling=banned).text != plain
    forced = Sampling(logit_bias={token: 1000.0})
    assert mlxquant.generate(tiny, "x", max_tokens=3, sampling=forced).text == 3 * plain


@pytest.mark.parametrize("options", [{}, {"lookup": 3}, {"draft": True}, {"temp": 1.0}])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_not_finite_are_an_error(tiny, monkeypatch, options, value):
    original = type(tiny.network).__call__

    def broken(self, inputs, cache=None, **more):
        logits = original(self, inputs, cache=cache, **more)
        spoilt = mx.arange(logits.shape[-1]) == 7 if value > 0 else mx.array(True)
        return mx.where(spoilt, value, logits)

    monkeypatch.setattr(type(tiny.network), "__call__", broken)
    options = {"draft": tiny} if options.get("draft") else options
    if "temp" in options:
        options = {"sampling": Sampling(temperature=1.0, seed=0)}
    with pytest.raises(MlxquantError, match="not finite after 3 tokens"):
        mlxquant.generate(tiny, [5, 6, 7], max_tokens=9, **options)
    if options.keys() <= {"sampling"}:
        with pytest.raises(MlxquantError, match="not finite after 3 tokens"):
            mlxquant.batch_generate(tiny, [[5, 6, 7]], max_tokens=9, **options)


def test_log_probabilities(tiny):
    plain = mlxquant.generate(tiny, "Once", max_tokens=6)
    for options in ({}, {"lookup": 4}, {"draft": tiny}):
        reply = mlxquant.generate(tiny, "Once", max_tokens=6, logprobs=3, **options)
        assert reply.text == plain.text and len(reply.scored) == 6
        for token in reply.scored:
            ranked = [other.logprob for other in token.likeliest]
            assert ranked == sorted(ranked, reverse=True)
            assert ranked[0] == pytest.approx(token.logprob, abs=1e-5)
            assert token.likeliest[0].spelled == token.spelled
    assert plain.scored == ()
    assert mlxquant.generate(tiny, "Once", max_tokens=2, logprobs=0).scored[0].likeliest == ()


def test_kv_bits_that_the_cache_cannot_do_are_said_at_once(tiny, tmp_path):
    from conftest import CONFIG, random_network, write_folder
    from mlx_lm.models.cache import RotatingKVCache

    config = CONFIG | {"head_dim": 24}
    odd = mlxquant.load(str(write_folder(tmp_path / "odd", random_network(config), config)))
    used = PromptCache()
    mlxquant.generate(odd, "x", max_tokens=2, cache=used)
    for cache in (None, used):
        with pytest.raises(Unsupported, match="8 bits in groups of 32: .*; leave kv_bits out"):
            mlxquant.stream_generate(odd, "x", kv_bits=8, cache=cache)
    window = mlxquant.load(tiny.name)
    window.network.make_cache = lambda: [RotatingKVCache(8) for _ in window.network.layers]
    with pytest.raises(Unsupported, match="cannot keep its keys and values at 4 bits"):
        mlxquant.stream_generate(window, "x", kv_bits=4)
