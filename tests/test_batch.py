"""Several prompts at once: the replies of each alone, counts, refusals."""

import pytest
from mlx_lm.models.cache import ArraysCache

import mlxquant
from mlxquant import Sampling
from mlxquant.base.errors import BadValue, TooLarge, Unsupported

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
