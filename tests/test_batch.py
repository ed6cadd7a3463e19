"""Several prompts at once: the replies of each alone, counts, refusals."""

import copy

import mlx.core as mx
import pytest
from architectures import write
from mlx.utils import tree_flatten
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, QuantizedKVCache, RotatingKVCache

import mlxquant
from mlxquant import PromptCache, Sampling
from mlxquant.base.errors import BadValue, TooLarge, Unsupported
from mlxquant.layers import traffic
from mlxquant.layers.in_place import InPlaceCache
from mlxquant.runtime.batch import Batch
from mlxquant.runtime.prompt import Request
from mlxquant.runtime.prompt_cache import PromptCaches

PROMPTS = ["Once upon", [5, 6, 7, 8], [{"role": "user", "content": "tell me"}], "x"]


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_every_prompt_gets_the_reply_it_gets_alone(tiny, batch_size):
    batch = mlxquant.batch_generate(tiny, PROMPTS, max_tokens=12, batch_size=batch_size)
    alone = [mlxquant.generate(tiny, prompt, max_tokens=12) for prompt in PROMPTS]
    assert batch.texts == tuple(reply.text for reply in alone) == batch.answers
    assert batch.finish_reasons == ("length",) * 4
    assert batch.report.generation_tokens == 48
    assert batch.report.prompt_tokens == sum(reply.report.prompt_tokens for reply in alone)


def test_a_batch_reads_fewer_bytes_for_a_token(tiny):
    batch = mlxquant.batch_generate(tiny, PROMPTS, max_tokens=12)
    weights = tiny.weight_bytes_per_token
    assert weights / 4 < batch.report.bytes_per_token < weights / 2


def test_what_a_batch_reads_is_counted_pass_by_pass(tiny, tmp_path):
    """Alone as ``generate`` counts it; of a mixture, more experts than one prompt chooses."""
    alone = mlxquant.generate(tiny, [5, 6, 7, 8], max_tokens=100).report.bytes_per_token
    one = mlxquant.batch_generate(tiny, [[5, 6, 7, 8]], max_tokens=100).report.bytes_per_token
    assert one == pytest.approx(alone, rel=0.005)
    mixture = mlxquant.load(str(write("qwen3_moe", tmp_path / "m")))
    read = [traffic.weight_bytes(mixture.network, batch=rows) for rows in (1, 4)]
    many = mlxquant.batch_generate(mixture, [[5, 6], [7], [8, 9], [4]], max_tokens=8).report
    kv = many.bytes_per_token - read[1] / 4
    assert 0 < kv < 0.05 * read[0]


def test_progress_options_and_seeds(tiny):
    told = []
    sampling = Sampling(temperature=30.0, seed=3)
    first = mlxquant.batch_generate(tiny, PROMPTS, max_tokens=9, sampling=sampling,
                                    progress=lambda done, total: told.append((done, total)))
    assert told == [(i, 4) for i in range(1, 5)]
    again = mlxquant.batch_generate(tiny, PROMPTS, max_tokens=9, sampling=sampling)
    assert first.texts == again.texts


@pytest.mark.parametrize("prompts,options,error,message", [
    ([], {}, BadValue, "no prompt"), (["x"], dict(max_tokens=0), BadValue, "max_tokens is 0"),
    (["x"], dict(batch_size=0), BadValue, "batch_size is 0"),
    ([[5] * 600], {}, TooLarge, "holds 512")])
def test_what_is_refused(tiny, prompts, options, error, message):
    with pytest.raises(error, match=message):
        mlxquant.batch_generate(tiny, prompts, **options)


def test_a_state_that_cannot_be_put_side_by_side_is_refused(tiny, monkeypatch):
    class Alone(ArraysCache):
        merge = property()  # hasattr says no

    monkeypatch.setattr("mlxquant.runtime.batch.make_prompt_cache", lambda network: [Alone(1)])
    with pytest.raises(Unsupported, match="side by side"):
        mlxquant.batch_generate(tiny, ["x"])


def begin(batch, model, prompt, tokens):
    return batch.add(Request.of(model, prompt, max_tokens=tokens))


def run(batch, events, steps=1000):
    """Up to so many passes; their events by rows."""
    while batch and steps:
        for event in batch.step():
            events.setdefault(event.row, []).append(event)
        steps -= 1


def text_of(events):
    return "".join(event.chunk.text for event in events if event.chunk)


def test_a_row_by_itself_takes_tokens_as_a_single_prompt_does(watched):
    model, single, taken = watched
    alone = mlxquant.generate(model, "Once upon", max_tokens=20).text
    needed = sum(taken)
    taken.clear()
    batch, events = Batch(model), {}
    row = begin(batch, model, "Once upon", 20)
    run(batch, events)
    assert text_of(events[row]) == alone and all(single)
    assert sum(taken) == pytest.approx(needed) and needed >= 20


@pytest.mark.parametrize("first, second", [
    ("Once upon", "x"), ([5], [7]), ([5], [9] * 300), ([9] * 300, [7])], ids=lambda p: len(p))
def test_rows_that_join_and_leave_change_no_reply(watched, first, second):
    model, single, taken = watched
    long, short, late = ((first, 60), (second, 7), ("late", 9))
    alone = [mlxquant.generate(model, prompt, max_tokens=count).text
             for prompt, count in (long, short, late)]
    batch, events = Batch(model), {}
    lone = begin(batch, model, *long)
    run(batch, events, 8)
    joined, gone = begin(batch, model, *short), begin(batch, model, "gone", 40)
    run(batch, events, 4)
    batch.remove(gone)
    single.clear(), taken.clear()
    run(batch, events, 3)
    assert single == [False] * 3 and not taken  # together
    run(batch, events, 10)
    single.clear(), taken.clear()
    run(batch, events, 3)
    assert single == [True] * 3 and sum(taken) == pytest.approx(3)  # by itself again
    last = begin(batch, model, *late)
    run(batch, events)
    assert [text_of(events[row]) for row in (lone, joined, last)] == alone


def test_two_rows_that_begin_and_leave_at_once(watched):
    model, *_ = watched
    batch, events = Batch(model), {}
    pair = [begin(batch, model, prompt, 5) for prompt in ("a", "bcd")]
    run(batch, events, 3)
    batch.remove(pair[0])
    batch.remove(pair[1])
    again = begin(batch, model, "bcd", 5)
    run(batch, events)
    assert text_of(events[again]) == mlxquant.generate(model, "bcd", max_tokens=5).text


def test_what_a_row_by_itself_leaves_behind_goes_on(watched):
    """Its keys and values are its own, though others write where they were."""
    model, *_ = watched
    batch, events = Batch(model), {}
    row = begin(batch, model, [5, 6, 7], 6)
    run(batch, events)
    kept = events[row][-1].cache
    longer = [*kept.tokens, 8, 9]
    alone = mlxquant.generate(model, longer, max_tokens=12).text
    for _ in range(2):
        copied = copy.deepcopy(kept)
        row = batch.add(Request.of(model, longer, max_tokens=12), copied)
        run(batch, events)
        assert text_of(events[row]) == alone and events[row][0].progress[1] == 2


def test_a_prompt_that_is_kept_stays_what_it_is_as_others_join(tiny_folder):
    model, kept = mlxquant.load(str(tiny_folder)), []
    model.network.make_cache = lambda: [KVCache(), RotatingKVCache(8)]  # no reply is cut back
    batch = Batch(model, keep=kept.append)
    begin(batch, model, [5] * 20, 6)
    while not kept:
        batch.step()
    begin(batch, model, [6] * 30, 6)
    batch.step()
    assert len(kept[0].tokens) == kept[0].layers[0].offset == 19


def arrays(cache):
    return [array for _, array in tree_flatten([layer.state for layer in cache.layers])
            if isinstance(array, mx.array)]


@pytest.mark.parametrize("make", [
    KVCache, InPlaceCache, lambda: QuantizedKVCache(32, 4), lambda: RotatingKVCache(8),
    lambda: ArraysCache(2), lambda: CacheList(KVCache(), RotatingKVCache(8))],
    ids=["plain", "in place", "quantised", "window", "state", "list"])
def test_what_is_kept_is_not_changed_by_a_conversation_that_begins_alike(make):
    kept, told = PromptCache([5, 6, 7], [make()]), mx.random.normal((1, 2, 3, 32))
    for layer in getattr(kept.layers[0], "caches", kept.layers):
        if isinstance(layer, ArraysCache):
            layer[0], layer[1] = told, told + 1
        else:
            layer.update_and_fetch(told, told + 1)
    before, caches = [array.tolist() for array in arrays(kept)], PromptCaches(3)
    caches.keep(kept)
    for array in arrays(caches.nearest([5, 6, 7, 8])):
        array[..., :2, :] = 9  # as a layer writes that was cut back
    assert [array.tolist() for array in arrays(caches.nearest([5, 6, 7, 9]))] == before
