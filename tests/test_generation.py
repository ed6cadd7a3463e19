"""Generation: mlx-lm's greedy output, sampling, stop strings, prompt caches, limits."""

import architectures
import mlx_lm
import pytest
from conftest import random_network, write_folder

import mlxquant
from mlxquant import PromptCache, Sampling
from mlxquant.base.errors import BadValue, TooLarge, Unsupported

CHAT = [{"role": "user", "content": "tell me"}]


def stock_greedy(model, prompt, count):
    steps = mlx_lm.stream_generate(model.network, model.tokenizer, prompt, max_tokens=count)
    return "".join(step.text for step in steps)


def test_greedy_text_equals_mlx_lm(tiny):
    ours = mlxquant.generate(tiny, "Once upon", max_tokens=40)
    assert ours.text == stock_greedy(tiny, "Once upon", 40) and ours.text


def test_greedy_text_equals_mlx_lm_on_the_real_model(smollm2_model):
    prompt = smollm2_model.tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)
    ours = mlxquant.generate(smollm2_model, CHAT, max_tokens=12)
    assert ours.text == stock_greedy(smollm2_model, prompt, 12)


def test_the_response_counts_and_times(tiny):
    response = mlxquant.generate(tiny, [5, 6, 7], max_tokens=6)
    report = response.report
    assert response.finish_reason == "length"
    assert (report.prompt_tokens, report.cached_tokens, report.generation_tokens) == (3, 0, 6)
    assert report.prompt_tps > 0 and report.generation_tps > 0 and report.ttft_s > 0
    kv_per_token = 2 * 2 * 2 * 32 * 4
    weights = tiny.weight_bytes_per_token
    assert weights < report.bytes_per_token <= weights + 9 * kv_per_token
    assert report.gb_per_s == pytest.approx(report.bytes_per_token * report.generation_tps / 1e9)
    assert report.percent_of_ceiling == pytest.approx(report.gb_per_s)  # of the fixture's 100 GB/s
    assert set(response.as_dict()) >= {
        "text", "prompt_tokens", "generation_tokens", "prompt_tps", "generation_tps", "ttft_s",
        "bytes_per_token", "gb_per_s", "ceiling_gb_per_s", "ceiling_source", "percent_of_ceiling",
        "peak_memory_gb", "finish_reason"}


def test_one_token_has_no_decode_speed(tiny):
    report = mlxquant.generate(tiny, [5, 6], max_tokens=1).report
    assert report.generation_tokens == 1 and report.generation_tps is None
    assert report.percent_of_ceiling is None and "GB/s" not in report.line()


def test_a_seed_repeats_and_another_differs(tiny):
    def sample(seed):
        return mlxquant.generate(tiny, [5, 6], max_tokens=24,
                                 sampling=Sampling(temperature=5.0, seed=seed)).text

    assert sample(1) == sample(1) != sample(2)


@pytest.mark.parametrize("narrow", [
    dict(top_k=1), dict(top_p=1e-9), dict(min_p=1.0)])
def test_each_filter_alone_can_force_the_likeliest_token(tiny, narrow):
    greedy = mlxquant.generate(tiny, [5, 6], max_tokens=8).text
    hot = Sampling(temperature=5.0, seed=3, **narrow)
    assert mlxquant.generate(tiny, [5, 6], max_tokens=8, sampling=hot).text == greedy


def test_repetition_penalty_changes_a_repeating_reply(tiny):
    plain = mlxquant.generate(tiny, [5, 6], max_tokens=30)
    penalised = mlxquant.generate(tiny, [5, 6], max_tokens=30,
                                  sampling=Sampling(repetition_penalty=50.0))
    assert plain.text != penalised.text


@pytest.mark.parametrize("wrong", [
    dict(temperature=-1), dict(top_p=1.5), dict(top_k=-1), dict(min_p=2),
    dict(repetition_penalty=0)])
def test_sampling_ranges(wrong):
    with pytest.raises(BadValue, match=f"{next(iter(wrong))} is .*allowed are"):
        Sampling(**wrong)


def test_a_stop_string_ends_the_reply_and_is_left_out(tiny):
    whole = mlxquant.generate(tiny, "Once", max_tokens=40).text
    stop = whole[10:13]
    cut = mlxquant.generate(tiny, "Once", max_tokens=40, stop=[stop])
    assert cut.text == whole[:whole.index(stop)] and cut.finish_reason == "stop"


def test_an_unfinished_stop_string_is_text_after_all(tiny):
    whole = mlxquant.generate(tiny, "Once", max_tokens=20).text
    kept = mlxquant.generate(tiny, "Once", max_tokens=20, stop=[whole[-2:] + "\0never"])
    assert kept.text == whole and kept.finish_reason == "length"


def test_a_second_turn_processes_only_what_is_new(tiny):
    cache, conversation = PromptCache(), list(CHAT)
    first = mlxquant.generate(tiny, conversation, max_tokens=10, cache=cache)
    conversation += [{"role": "assistant", "content": first.text},
                     {"role": "user", "content": "more"}]
    second = mlxquant.generate(tiny, conversation, max_tokens=10, cache=cache)
    assert second.report.cached_tokens >= first.report.prompt_tokens
    assert second.text == mlxquant.generate(tiny, conversation, max_tokens=10).text


def test_the_same_prompt_again_leaves_one_token_to_process(tiny):
    cache = PromptCache()
    first = mlxquant.generate(tiny, CHAT, max_tokens=5, cache=cache)
    second = mlxquant.generate(tiny, CHAT, max_tokens=5, cache=cache)
    assert second.report.prompt_tokens == 1 and second.text == first.text


def test_an_unrelated_prompt_with_a_used_cache_is_right(tiny):
    cache = PromptCache()
    mlxquant.generate(tiny, "something else entirely", max_tokens=5, cache=cache)
    assert mlxquant.generate(tiny, CHAT, max_tokens=9, cache=cache).text == \
        mlxquant.generate(tiny, CHAT, max_tokens=9).text


@pytest.mark.parametrize("role", ["model", "draft"])
def test_a_cache_of_another_model_is_computed_again(tiny, tmp_path, role):
    """The same tokens, other weights: even a model of the same shapes must not go on from them."""
    other = mlxquant.load(str(write_folder(tmp_path / "other", random_network(seed=3))))
    first, second = [(tiny, dict(draft=draft)) if role == "draft" else (draft, {})
                     for draft in (other, tiny)]
    cache, options = PromptCache(), dict(max_tokens=9, logprobs=0)
    mlxquant.generate(first[0], CHAT, cache=cache, max_tokens=4, **first[1])
    again = mlxquant.generate(second[0], CHAT, cache=cache, **options, **second[1])
    alone = mlxquant.generate(second[0], CHAT, **options, **second[1])
    assert again.report.cached_tokens == 0
    assert [token.logprob for token in again.scored] == [token.logprob for token in alone.scored]


@pytest.mark.parametrize("taken", range(1, 5))
def test_closing_early_keeps_the_cache_usable(tiny, taken):
    cache = PromptCache()
    chunks = mlxquant.stream_generate(tiny, CHAT, max_tokens=30, cache=cache)
    for _ in range(taken):
        next(chunks)
    chunks.close()
    held = cache.layers[0].offset
    assert held == len(cache.tokens)
    again = mlxquant.generate(tiny, CHAT, max_tokens=12, cache=cache)
    assert again.text == mlxquant.generate(tiny, CHAT, max_tokens=12).text


def test_a_sliding_window_that_wrapped_starts_afresh(tiny):
    from mlx_lm.models.cache import RotatingKVCache

    cache = PromptCache()
    cache.layers = [RotatingKVCache(max_size=8) for _ in tiny.network.layers]
    mlxquant.generate(tiny, list(range(3, 30)), max_tokens=5, cache=cache)
    fresh = mlxquant.generate(tiny, [9, 8, 7], max_tokens=5, cache=cache)
    assert fresh.report.cached_tokens == 0
    assert fresh.text == mlxquant.generate(tiny, [9, 8, 7], max_tokens=5).text


def test_a_quantised_kv_cache_is_smaller_and_close(tiny):
    full, small = PromptCache(), PromptCache()
    prompt = list(range(3, 60))
    mlxquant.generate(tiny, prompt, max_tokens=4, cache=full)
    response = mlxquant.generate(tiny, prompt, max_tokens=4, cache=small, kv_bits=8)
    assert small.layers[0].bits == 8
    assert response.text == mlxquant.generate(tiny, prompt, max_tokens=4).text
    again = mlxquant.generate(tiny, prompt, max_tokens=4, cache=small, kv_bits=8)
    assert again.report.cached_tokens == len(prompt) - 1


@pytest.mark.parametrize("kv_bits", [None, 4])
def test_keys_and_values_at_another_width_are_computed_again(tiny, kv_bits):
    cache, options = PromptCache(), dict(max_tokens=9, kv_bits=kv_bits)
    mlxquant.generate(tiny, CHAT, max_tokens=4, cache=cache, kv_bits=8)
    again = mlxquant.generate(tiny, CHAT, cache=cache, **options)
    assert again.report.cached_tokens == 0 and cache.bits == ({kv_bits} if kv_bits else set())
    assert again.text == mlxquant.generate(tiny, CHAT, **options).text


@pytest.mark.parametrize("options,error,message", [
    (dict(max_tokens=0), BadValue, "at least 1"),
    (dict(kv_bits=7), BadValue, "allowed are 2, 3, 4, 5, 6, 8"),
    (dict(stop=[""]), BadValue, "stop string is empty"),
])
def test_bad_options_are_refused(tiny, options, error, message):
    with pytest.raises(error, match=message):
        mlxquant.generate(tiny, "x", **options)


def test_an_empty_prompt_is_refused(tiny):
    with pytest.raises(BadValue, match="empty"):
        mlxquant.generate(tiny, "")


def test_a_prompt_longer_than_the_context_is_refused(tiny):
    with pytest.raises(TooLarge, match="512 tokens, the context of .* holds 512"):
        mlxquant.generate(tiny, [5] * 512)


@pytest.mark.parametrize("name", ["gpt2", "gpt_bigcode", "gptj", "lille-130m"])
def test_the_context_is_known_by_its_other_names(tmp_path, name):
    """GPT-2 would read past its table of positions."""
    config = architectures.CONFIGURATIONS[name]
    model = mlxquant.load(str(write_folder(
        tmp_path / name, architectures.network_of(name), config, size=288)))
    assert model.context_length == 512
    assert mlxquant.generate(model, [5] * 510, max_tokens=9).report.generation_tokens <= 2
    with pytest.raises(TooLarge, match="the context of .* holds 512"):
        mlxquant.generate(model, [5] * 600)


def test_a_reply_ends_where_the_context_ends(tiny):
    response = mlxquant.generate(tiny, [5] * 508, max_tokens=100)
    assert response.report.generation_tokens <= 4


def test_messages_need_a_chat_template(tiny_folder):
    model = mlxquant.load(str(tiny_folder))
    model.tokenizer.has_chat_template = False
    with pytest.raises(Unsupported, match="no chat template"):
        mlxquant.generate(model, CHAT)
