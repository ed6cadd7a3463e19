"""Guessing ahead: the same greedy text, fewer passes, caches that stay right."""

import architectures
import mlx.core as mx
import pytest
from conftest import CONFIG, random_network, write_folder
from mlx_lm.models.cache import make_prompt_cache

import mlxquant
from mlxquant import PromptCache, Sampling
from mlxquant.base.errors import BadValue, Unsupported
from mlxquant.layers import prompt_step, traffic
from mlxquant.runtime.loop import Loop, _as_wide, _Occurrences

REPEATING = [5, 6, 7, 8, 9, 10] * 6


@pytest.fixture(scope="module")
def draft(tmp_path_factory):
    """Another random model: it guesses wrong nearly always."""
    folder = tmp_path_factory.mktemp("draft") / "other"
    return mlxquant.load(str(write_folder(folder, random_network(seed=7))))


@pytest.mark.parametrize("prompt", [REPEATING, [5, 6, 7], "Once upon a time"])
@pytest.mark.parametrize("how", ["lookup", "other model", "itself"])
def test_greedy_text_is_unchanged(tiny, draft, prompt, how):
    options = {"lookup": dict(lookup=5), "other model": dict(draft=draft),
               "itself": dict(draft=tiny)}[how]
    plain = mlxquant.generate(tiny, prompt, max_tokens=40)
    guessed = mlxquant.generate(tiny, prompt, max_tokens=40, **options)
    assert (guessed.text, guessed.finish_reason) == (plain.text, plain.finish_reason)
    assert guessed.report.generation_tokens == plain.report.generation_tokens
    assert plain.report.guessed_tokens is None and "guessed" not in plain.report.line()
    assert f"{guessed.report.guessed_tokens} guessed right" in guessed.report.line()


def test_a_model_that_guesses_itself_is_always_right(tiny):
    report = mlxquant.generate(tiny, REPEATING, max_tokens=30, draft=tiny, draft_tokens=4).report
    assert report.guessed_tokens == 24  # four of every five
    weights = tiny.weight_bytes_per_token
    assert report.bytes_per_token == pytest.approx(5 * weights * 5 / 29, rel=0.2)


def test_look_up_reads_the_weights_less_often(tiny, monkeypatch):
    """A model made to repeat its prompt: most tokens then come from the text."""
    passes = []
    original = type(tiny.network).__call__

    def parrot(self, inputs, cache=None, **options):
        original(self, inputs, cache=cache, **options)
        passes.append(inputs.shape[1])
        following = (inputs - 5 + 1) % 6 + 5
        return 30.0 * (mx.arange(CONFIG["vocab_size"]) == following[..., None])

    monkeypatch.setattr(type(tiny.network), "__call__", parrot)
    response = mlxquant.generate(tiny, REPEATING, max_tokens=30, lookup=5)
    assert response.report.guessed_tokens == 25 and len(passes) == 1 + 5
    plain = mlxquant.generate(tiny, REPEATING, max_tokens=30)
    assert response.text == plain.text
    assert response.report.bytes_per_token < plain.report.bytes_per_token / 4


def test_a_pass_over_several_tokens_reads_more_of_a_mixtures_experts(tmp_path):
    mixture = mlxquant.load(str(architectures.write("qwen3_moe", tmp_path / "m")))
    report = mlxquant.generate(mixture, REPEATING, max_tokens=20, draft=mixture,
                               draft_tokens=4).report
    one, five = (traffic.weight_bytes(mixture.network, batch=n) for n in (1, 5))
    assert report.guessed_tokens == 16  # so there are 4 passes, the first the prompt's
    assert report.bytes_per_token == pytest.approx((five + 4 * one) * 3 / 19, rel=0.06) and (
        five > 1.4 * one)


@pytest.mark.parametrize("options", [dict(lookup=4), dict(lookup=4, kv_bits=8), "draft"])
@pytest.mark.parametrize("taken", [1, 3, 100])
def test_the_cache_stays_right(tiny, draft, options, taken):
    options = dict(draft=draft) if options == "draft" else options
    cache = PromptCache()
    chunks = mlxquant.stream_generate(tiny, REPEATING, max_tokens=20, cache=cache, **options)
    for _, _chunk in zip(range(taken), chunks):
        pass
    chunks.close()
    assert {layer.offset for layer in cache.layers + cache.draft_layers} == {len(cache.tokens)}
    following = REPEATING + [40, 41]
    again = mlxquant.generate(tiny, following, max_tokens=12, cache=cache, **options)
    assert again.report.cached_tokens > 0
    alone = mlxquant.generate(tiny, following, max_tokens=12, kv_bits=options.get("kv_bits"))
    assert again.text == alone.text


def test_a_cache_made_without_a_draft_serves_one(tiny, draft):
    cache = PromptCache()
    mlxquant.generate(tiny, REPEATING, max_tokens=5, cache=cache)
    with_draft = mlxquant.generate(tiny, REPEATING, max_tokens=9, cache=cache, draft=draft)
    without = mlxquant.generate(tiny, REPEATING, max_tokens=9, cache=cache)
    assert with_draft.text == without.text and without.report.cached_tokens == len(REPEATING) - 1


def test_penalties_see_the_same_text(tiny):
    penalised = Sampling(repetition_penalty=1.3)
    plain = mlxquant.generate(tiny, REPEATING, max_tokens=30, sampling=penalised)
    ours = mlxquant.generate(tiny, REPEATING, max_tokens=30, sampling=penalised, lookup=5)
    assert ours.text == plain.text


def test_stop_strings_and_seeds_work(tiny):
    whole = mlxquant.generate(tiny, REPEATING, max_tokens=40).text
    cut = mlxquant.generate(tiny, REPEATING, max_tokens=40, lookup=5, stop=[whole[10:13]])
    assert cut.text == whole[:whole.index(whole[10:13])] and cut.stopped_by == whole[10:13]
    hot = dict(max_tokens=20, lookup=5, sampling=Sampling(temperature=2.0, seed=4))
    first, second = (mlxquant.generate(tiny, REPEATING, **hot).text for _ in range(2))
    assert first == second


def test_occurrences():
    found = _Occurrences([1, 2, 3, 4, 1, 2])
    assert found.continuation(9) == [3, 4, 1, 2]  # two tokens match
    found.append(3)
    assert found.continuation(2) == [4, 1]
    found.append(9)
    assert found.continuation(5) == [] and _Occurrences([1]).continuation(5) == []


@pytest.mark.parametrize("options,message", [
    (dict(lookup=-1), "lookup is -1, allowed are 0 to 64"),
    (dict(draft_tokens=0), "draft_tokens is 0, allowed are 1 to 64"),
])
def test_ranges(options, message):
    with pytest.raises(BadValue, match=message):
        Loop(**options)


def test_what_excludes_each_other(tiny, tmp_path):
    with pytest.raises(BadValue, match="exclude each other"):
        mlxquant.generate(tiny, "x", draft=tiny, lookup=3)
    with pytest.raises(BadValue, match="kv_bits and a draft model"):
        mlxquant.generate(tiny, "x", draft=tiny, kv_bits=8)
    other = mlxquant.load(str(write_folder(tmp_path / "other")))
    other.tokens["a"], other.tokens["b"] = other.tokens["b"], other.tokens["a"]
    with pytest.raises(BadValue, match="has other tokens than .*; a draft needs the same tokeni"):
        mlxquant.generate(tiny, "x", draft=other)


@pytest.mark.parametrize("rows", [384, 400, 512])
def test_embeddings_of_one_tokenizer_may_be_padded_differently(draft, tmp_path, rows):
    """A draft that lacks the prompt's last token, or has rows that the model lacks."""
    config = CONFIG | {"vocab_size": 400}
    model = mlxquant.load(str(write_folder(tmp_path / "model", random_network(config), config)))
    config = config | {"vocab_size": rows}
    other = mlxquant.load(str(write_folder(
        tmp_path / "draft", random_network(config, seed=7), config, size=384)))
    hot = Sampling(temperature=9.0, seed=1, top_k=390, repetition_penalty=1.1,
                   logit_bias={399: 9.0}, xtc_probability=0.1)
    for sampling in (Sampling(), hot):
        options = dict(max_tokens=20, sampling=sampling)
        guessed = mlxquant.generate(model, [5, 6, 399], draft=other, **options)
        assert guessed.report.generation_tokens == 20
        if sampling is not hot:
            assert guessed.text == mlxquant.generate(model, [5, 6, 399], **options).text
    steps = _as_wide(other, 400)(mx.array([[399, 5]]), cache=make_prompt_cache(other.network))
    assert steps.shape == (1, 2, 400)
    assert mx.isfinite(steps[..., :min(rows, 400)]).all()


def test_reading_a_prompt_is_told_with_a_draft_too(tiny, draft):
    """The server's keepalives, a client that leaves and Ctrl-C in a chat depend on it."""
    told, cache = [], PromptCache()
    options = dict(max_tokens=3, draft=draft, cache=cache)
    mlxquant.generate(tiny, REPEATING, progress=lambda *a: told.append(a), **options)
    assert told == [(0, 36), (35, 36), (36, 36)]
    with pytest.raises(ZeroDivisionError):
        mlxquant.generate(tiny, [9, 8, 7], progress=lambda done, total: 1 / 0, **options)
    assert mlxquant.generate(tiny, [9, 8, 7], **options).report.generation_tokens == 3


@pytest.mark.parametrize("options", [{}, {"lookup": 2}, {"draft": True}, {"kv_bits": 8}])
def test_a_prompt_is_read_in_steps_whose_scores_fit(tiny, draft, monkeypatch, options):
    """Four heads, 300 tokens and numbers of four bytes: steps of 128 reach, but do not pass it."""
    options = {name: draft if name == "draft" else value for name, value in options.items()}
    prompt, told = REPEATING * 8 + [7] * 12, list[int]()
    plain = mlxquant.generate(tiny, prompt, max_tokens=8, **options).text
    monkeypatch.setattr(prompt_step, "MOST_SCORES", 4 * 4 * 128 * 300)
    small = mlxquant.generate(tiny, prompt, max_tokens=8, **options,
                              progress=lambda done, total: told.append(done))
    assert told[:4] == [0, 128, 256, 299] and told[-1] == 300
    assert small.text == plain or "kv_bits" in options  # more of it is read behind rounded keys


@pytest.mark.parametrize("name", ["gemma3_text", "mamba"])
def test_what_cannot_take_tokens_back_is_refused(tiny, tmp_path, name):
    odd = mlxquant.load(str(write_folder(tmp_path / name, architectures.network_of(name),
                                         architectures.CONFIGURATIONS[name], size=288)))
    odd.tokens.clear()  # a part of any other's
    for model, options in ((odd, dict(lookup=3)), (odd, dict(draft=tiny)), (tiny, dict(draft=odd))):
        with pytest.raises(Unsupported, match=f"{name} keeps a .* cannot take tokens back"):
            mlxquant.stream_generate(model, [5, 6], **options)
