"""What the server answers, called by OpenAI's own client on this machine."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

openai = pytest.importorskip("openai", reason="OpenAI's client is not installed")

import served
import test_reply
from conftest import CONFIG, random_network, write_folder
from scripted import scripted
from served import CHAT, client_of, post, running
from test_reply import TOOLS
from test_writer import WRITTEN

import mlxquant
from mlxquant import Sampling
from mlxquant.runtime.reply import Scored
from mlxquant.server import answers

address, client, heard = served.address, served.client, served.heard  # fixtures
caller = test_reply.caller
pytestmark = pytest.mark.usefixtures("heard")


def test_a_chat_gets_the_same_reply_as_from_the_api(client, tiny):
    reply = client.chat.completions.create(model="any", messages=CHAT, max_tokens=12)
    assert reply.choices[0].message.content == mlxquant.generate(tiny, CHAT, max_tokens=12).text
    assert reply.choices[0].finish_reason == "length" and reply.usage.completion_tokens == 12


def test_a_stream_and_a_completion(client, tiny):
    stream = client.chat.completions.create(model="any", messages=CHAT, max_tokens=12, stream=True,
                                            stream_options={"include_usage": True})
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == mlxquant.generate(tiny, CHAT, max_tokens=12).text
    assert chunks[-1].usage.completion_tokens == 12 and chunks[-2].choices[0].finish_reason
    completion = client.completions.create(model="any", prompt="Once", max_tokens=8)
    assert completion.choices[0].text == mlxquant.generate(tiny, "Once", max_tokens=8).text


def test_several_at_once(client, tiny):
    prompts = [f"number {i}" for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(lambda p: client.completions.create(
            model="any", prompt=p, max_tokens=8).choices[0].text, prompts))
    assert replies == [mlxquant.generate(tiny, p, max_tokens=8).text for p in prompts]


def test_several_prompts_and_several_replies_in_one_request(client, tiny):
    alone = {p: mlxquant.generate(tiny, p, max_tokens=6).text for p in ("one", "two")}
    reply = client.completions.create(model="any", prompt=["one", "two"], max_tokens=6, n=2)
    assert [choice.text for choice in reply.choices] == [
        alone["one"], alone["one"], alone["two"], alone["two"]]
    assert reply.usage.completion_tokens == 24
    ids = client.completions.create(model="any", prompt=[[5, 6], [7]], max_tokens=2)
    assert len(ids.choices) == 2
    hot = dict(model="any", messages=CHAT, max_tokens=8, n=2, temperature=9.0, seed=-1)
    first, second = (client.chat.completions.create(**hot) for _ in range(2))
    texts = [[c.message.content for c in reply.choices] for reply in (first, second)]
    assert texts[0] == texts[1] and texts[0][0] != texts[0][1]
    stream = client.chat.completions.create(**hot | {"stream": True})
    pieces = ["", ""]
    for chunk in stream:
        pieces[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert pieces == texts[0]


def test_log_probabilities_are_those_of_the_api(client, tiny):
    expected = mlxquant.generate(tiny, CHAT, max_tokens=3, logprobs=2).scored
    reply = client.chat.completions.create(model="any", messages=CHAT, max_tokens=3,
                                           logprobs=True, top_logprobs=2)
    content = reply.choices[0].logprobs.content
    assert [token.token for token in content] == [token.text for token in expected]
    for token, other in zip(content, expected):
        assert token.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert [t.token for t in token.top_logprobs] == [t.text for t in other.likeliest]
    older = client.completions.create(model="any", prompt="Once", max_tokens=3, logprobs=1)
    columns = older.choices[0].logprobs
    assert "".join(columns.tokens) == older.choices[0].text and columns.text_offset[0] == 0
    assert list(columns.top_logprobs[0]) == [columns.tokens[0]]


def test_tokens_that_are_part_of_a_character_are_told_in_bytes(tiny_folder):
    said = "é 日"
    options = dict(model="any", max_tokens=20)
    with running(scripted(tiny_folder, [said] * 2)) as (_, address), client_of(address) as client:
        chat = client.chat.completions.create(messages=CHAT, logprobs=True, top_logprobs=3,
                                              **options).choices[0]
        older = client.completions.create(prompt="Once", logprobs=3, **options).choices[0].logprobs
    assert bytes(b for token in chat.logprobs.content for b in token.bytes) == said.encode()
    assert [token.token for token in chat.logprobs.content] == older.tokens == [
        *(f"bytes:\\x{byte:02x}" for byte in "é".encode()), " ",
        *(f"bytes:\\x{byte:02x}" for byte in "日".encode())]
    assert older.text_offset == [0, 0, 1, 2, 2, 2]
    assert [len(others) for others in older.top_logprobs] == [3] * 6


@pytest.mark.parametrize("sampling", [
    dict(repetition_penalty=2.0, presence_penalty=5.0, frequency_penalty=9.0),
    dict(logit_bias={"40": 100.0}), dict(top_k=384, temperature=1.0, seed=5),
    dict(top_p=0.0, temperature=9.0), dict(xtc_probability=0.5, temperature=1.0, seed=2**70)])
def test_sampling_is_that_of_the_api(address, tiny, sampling):
    with post(address, {"messages": CHAT, "max_tokens": 12, **sampling}) as answer:
        text = json.loads(answer.read())["choices"][0]["message"]["content"]
    bias = {int(k): v for k, v in sampling.get("logit_bias", {}).items()} or None
    expected = mlxquant.generate(tiny, CHAT, max_tokens=12,
                                 sampling=Sampling(**sampling | {"logit_bias": bias}))
    assert text == expected.text


@pytest.mark.parametrize("stop", ["How can", "\n", "?!", "?", " ", "é", "A: yes\n\n", "zz"])
def test_stop_strings_stop_as_in_the_api(tiny_folder, stop):
    """Whole, streamed, or as a completion; text held back for a stop string is not lost."""
    api = scripted(tiny_folder, WRITTEN)
    expected = [mlxquant.generate(api, CHAT, stop=stop).text for _ in WRITTEN]
    options, given = dict(model="any", stop=[stop], max_tokens=60), []
    served = scripted(tiny_folder, [reply for reply in WRITTEN for _ in range(3)])
    with running(served, prompt_caches=0) as (_, address), client_of(address) as client:
        for _ in WRITTEN:
            whole = client.chat.completions.create(messages=CHAT, **options).choices[0]
            stream = client.chat.completions.create(messages=CHAT, stream=True, **options)
            streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
            text = client.completions.create(prompt="Once upon", **options).choices[0]
            assert whole.finish_reason == text.finish_reason == "stop"
            given.append([whole.message.content or "", streamed, text.text])
    assert given == [[text] * 3 for text in expected]
    assert expected == [reply.partition(stop)[0] for reply in WRITTEN]


@pytest.mark.parametrize("at", range(0, 30, 5))
@pytest.mark.parametrize("length", [1, 2, 5])
def test_stop_strings_of_a_reply_that_no_one_wrote(client, tiny, at, length):
    whole = mlxquant.generate(tiny, "Once", max_tokens=40).text
    stop = [whole[at:at + length], "zz"]
    expected = mlxquant.generate(tiny, "Once", max_tokens=40, stop=stop)
    given = client.completions.create(model="any", prompt="Once", max_tokens=40, stop=stop)
    assert given.choices[0].text == expected.text and len(expected.text) < len(whole)


def test_a_seed_and_one_reply_beside_others_are_right(client, tiny):
    """A seeded request runs alone, in turn with those that share passes."""
    seeded = Sampling(temperature=5.0, seed=3)
    with ThreadPoolExecutor(6) as pool:
        plain = [pool.submit(client.completions.create, model="any", prompt=f"p{i}", max_tokens=20)
                 for i in range(4)]
        drawn = [pool.submit(client.completions.create, model="any", prompt="x", max_tokens=9,
                             temperature=5.0, seed=3) for _ in range(2)]
    expected = mlxquant.generate(tiny, "x", max_tokens=9, sampling=seeded).text
    assert [reply.result().choices[0].text for reply in drawn] == [expected] * 2
    assert [reply.result().choices[0].text for reply in plain] == [
        mlxquant.generate(tiny, f"p{i}", max_tokens=20).text for i in range(4)]


def test_a_conversation_goes_on_from_its_keys_and_values(client):
    first = client.chat.completions.create(model="any", messages=CHAT, max_tokens=6)
    more = [*CHAT, {"role": "assistant", "content": first.choices[0].message.content},
            {"role": "user", "content": [{"type": "text", "text": "more"}]}]
    second = client.chat.completions.create(model="any", messages=more, max_tokens=6)
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert cached >= first.usage.prompt_tokens
    again = client.chat.completions.create(model="any", messages=more, max_tokens=6)
    assert again.usage.prompt_tokens_details.cached_tokens == second.usage.prompt_tokens - 1
    assert again.choices[0].message.content == second.choices[0].message.content


def test_conversations_that_begin_alike_do_not_change_each_other(tmp_path):
    """By log-probabilities that depend on all that was said."""
    config = CONFIG | {"tie_word_embeddings": False}
    model = mlxquant.load(str(write_folder(tmp_path / "model", random_network(config), config)))
    begun = {text: [{"role": "user", "content": text}] for text in ("a fish", "a cat", "dogs" * 9)}
    with running(model) as (_, address), client_of(address) as client:
        for text in [*begun] * 3:
            reply = client.chat.completions.create(model="any", messages=begun[text], max_tokens=6,
                                                   logprobs=True)
            alone = mlxquant.generate(model, begun[text], max_tokens=6, logprobs=0)
            assert [token.logprob for token in reply.choices[0].logprobs.content] == pytest.approx(
                [token.logprob for token in alone.scored], abs=1e-4)
            begun[text] += [{"role": "assistant", "content": alone.text},
                            {"role": "user", "content": f"{text}?"}]
    assert reply.usage.prompt_tokens_details.cached_tokens > reply.usage.prompt_tokens / 2


def test_tools_are_offered_called_and_withheld(caller):
    call = json.dumps({"name": "weather", "arguments": {"city": "Oslo"}})
    reply = f"<think>Hm.</think>Look.<tool_call>{call}</tool_call><tool_call>{call}</tool_call>"
    options = dict(model="any", messages=CHAT, tools=TOOLS, max_tokens=200)
    with running(caller(*[reply] * 4)) as (_, address), client_of(address) as client:
        whole = client.chat.completions.create(**options).choices[0]
        one = client.chat.completions.create(parallel_tool_calls=False, **options).choices[0]
        none = client.chat.completions.create(tool_choice="none", **options).choices[0]
        chunks = [c.choices[0] for c in client.chat.completions.create(stream=True, **options)]
    assert whole.finish_reason == "tool_calls" and whole.message.content.endswith("Look.")
    calls = whole.message.tool_calls
    assert [json.loads(c.function.arguments) for c in calls] == [{"city": "Oslo"}] * 2
    assert len(one.message.tool_calls) == 1
    assert none.message.tool_calls is None and "Oslo" in none.message.content
    assert none.finish_reason == "stop"
    streamed = [c for chunk in chunks for c in chunk.delta.tool_calls or ()]
    assert [c.index for c in streamed] == [0, 1] and chunks[-1].finish_reason == "tool_calls"


@pytest.mark.parametrize("written", ["6", '{"city": "Oslo"}', '{"name": "weather", "argu'])
def test_what_is_no_call_reaches_the_client_as_text(caller, written):
    options = dict(model="any", messages=CHAT, tools=TOOLS, max_tokens=90)
    with running(caller(*[f"<tool_call>{written}</tool_call>"] * 2)) as (_, address), \
            client_of(address) as client:
        whole = client.chat.completions.create(**options).choices[0]
        deltas = [c.choices[0] for c in client.chat.completions.create(stream=True, **options)]
    assert whole.finish_reason == deltas[-1].finish_reason == "stop"
    assert whole.message.content == "".join(c.delta.content or "" for c in deltas) == written
    assert whole.message.tool_calls is None and not any(c.delta.tool_calls for c in deltas)


def test_each_choice_of_a_stream_tells_its_role_once(client):
    chunks = client.chat.completions.create(model="any", messages=CHAT, n=2, max_tokens=6,
                                            stream=True)
    roles = {0: [], 1: []}
    for choice in (chunk.choices[0] for chunk in chunks):
        roles[choice.index].append(choice.delta.role)
    assert all(told[0] == "assistant" and not any(told[1:]) for told in roles.values())
    assert all(len(told) > 1 for told in roles.values())


def test_reasoning_has_its_own_field(tiny_folder):
    with running(scripted(tiny_folder, ["<think>Hm.</think>Yes."] * 2)) as (_, address):
        with post(address, {"messages": CHAT}) as answer:
            message = json.loads(answer.read())["choices"][0]["message"]
        with post(address, {"prompt": "x"}, path="/v1/completions") as answer:
            text = json.loads(answer.read())["choices"][0]["text"]
    assert message == {"role": "assistant", "content": "Yes.", "reasoning": "Hm."}
    assert text == "<think>Hm.</think>Yes."


def test_a_stream_has_no_character_at_which_readers_cut_lines(tiny_folder):
    said = "one\u2028two\x85three"
    with running(scripted(tiny_folder, [said])) as (_, address), \
            post(address, {"messages": CHAT, "stream": True}) as answer:
        lines = answer.read().decode().splitlines()
    told = [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]
    assert "".join(choice["delta"].get("content", "") for choice in told) == said
    assert all(line.startswith(("data: ", ": keepalive ")) for line in lines if line)


def test_only_the_one_model_is_listed_and_served(client, tiny_folder):
    assert [model.id for model in client.models.list()] == [str(tiny_folder)]
    reply = client.completions.create(model="../../etc", prompt="Once", max_tokens=2)
    assert reply.model == str(tiny_folder)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")


def test_an_impossible_token_has_a_log_probability_that_json_can_say():
    scored = Scored(b"a", -0.5, 0, (Scored(b"a", -0.5, 0), Scored(b"b", -float("inf"), 0)))
    told = answers._columns([scored]) | answers._token(scored)
    json.dumps(told, allow_nan=False)
    assert told["top_logprobs"][1]["logprob"] == -9999.0
