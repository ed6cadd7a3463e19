"""The parts of a reply: answer, reasoning, tool calls, whatever pieces they come in."""

import json

import pytest
from scripted import scripted

import mlxquant
from mlxquant.base.errors import Unsupported
from mlxquant.runtime.reply import ReplyPart, ReplySplitter

TOOLS = [{"type": "function", "function": {
    "name": "weather", "parameters": {"type": "object",
                                      "properties": {"city": {"type": "string"}}}}}]
CHAT = [{"role": "user", "content": "Is it raining in Oslo?"}]


def split(tokenizer, text, size):
    splitter = ReplySplitter(tokenizer)
    parts = [p for start in range(0, len(text), size)
             for p in splitter.feed(text[start:start + size])]
    parts += splitter.finish()
    joined = []
    for part in parts:
        if joined and joined[-1].kind == part.kind:
            part = ReplyPart(part.kind, joined.pop().text + part.text)
        joined.append(part)
    return [(part.kind, part.text) for part in joined if part.text]


@pytest.mark.parametrize("size", [1, 3, 100])
def test_pieces_of_any_size_give_the_same_parts(tiny, size):
    found = split(tiny.tokenizer, "<think>a < b</think>So <b>", size)
    assert found == [("thought", "a < b"), ("answer", "So <b>")]
    assert split(tiny.tokenizer, "no reasoning <thi", size) == [("answer", "no reasoning <thi")]
    assert split(tiny.tokenizer, "<think>cut", size) == [("thought", "cut")]


@pytest.fixture
def caller(tiny_folder):
    """A model whose template and tokenizer know tools, in the JSON form of Qwen and others."""
    def make(*replies):
        model = scripted(tiny_folder, replies)
        tokenizer = model.tokenizer
        from mlx_lm.tool_parsers import json_tools

        tokenizer._tool_parser = json_tools.parse_tool_call
        tokenizer._tool_call_start, tokenizer._tool_call_end = "<tool_call>", "</tool_call>"
        tokenizer._tokenizer.chat_template = (
            "{% if tools %}Tools: {{ tools | tojson }}\n{% endif %}"
                                              + tokenizer._tokenizer.chat_template)
        return model

    return make


def test_tool_calls_are_found_and_parsed(caller):
    call = json.dumps({"name": "weather", "arguments": {"city": "Oslo"}})
    again = json.dumps({"name": "weather", "arguments": {"city": "Bergen"}})
    model = caller(f"Let me look.<tool_call>{call}</tool_call><tool_call>{again}</tool_call>")
    reply = mlxquant.generate(model, CHAT, tools=TOOLS, max_tokens=200)
    assert reply.answer == "Let me look."
    assert reply.finish_reason == "stop" and "<tool_call>" in reply.text
    assert [call["arguments"]["city"] for call in reply.tool_calls] == ["Oslo", "Bergen"]
    # the template has told the model of them
    assert reply.report.prompt_tokens > len(json.dumps(TOOLS))


@pytest.mark.parametrize("written", [
    "6", '["weather", "Oslo"]', "null", '{"city": "Oslo"}', '{"name": null}', '{"name": ""}',
    '[{"name": "weather"}, 6]', '{"name": "weather", "arguments": {"city": Oslo}}', "{1: 2}", "\n",
    '{"name": "weather", "arguments": {"city": "\\ud800"}}'])
def test_what_is_no_call_is_part_of_the_answer(caller, written):
    reply = mlxquant.generate(caller(f"Look. <tool_call>{written}</tool_call>!"), CHAT, tools=TOOLS)
    assert reply.tool_calls == () and reply.answer == f"Look. {written}!"


def test_a_call_that_was_cut_off_is_none(caller):
    call, tools = '{"name": "weather"}', dict(tools=TOOLS, max_tokens=len('<tool_call>{"name": '))
    reply = mlxquant.generate(caller(f"<tool_call>{call}"), CHAT, **tools)
    assert (reply.tool_calls, reply.answer, reply.finish_reason) == ((), '{"name": ', "length")
    tools["max_tokens"] = len(f"<tool_call>{call}")
    assert mlxquant.generate(caller(f"<tool_call>{call}."), CHAT, **tools).tool_calls == ()
    tools["max_tokens"] += len("</tool_call>")
    assert mlxquant.generate(caller(f"<tool_call>{call}</tool_call>."), CHAT, **tools).tool_calls


def test_without_tools_what_looks_like_a_call_is_text_in_a_batch_too(caller):
    reply = mlxquant.batch_generate(caller("a<tool_call>6</tool_call>"), [CHAT])
    assert reply.answers == ("a6",)


def test_tools_need_a_template_with_a_place_for_them(tiny, caller):
    with pytest.raises(Unsupported, match="no place for tools"):
        mlxquant.generate(tiny, CHAT, tools=TOOLS)
    with pytest.raises(Unsupported, match="tools need a list of chat messages"):
        mlxquant.generate(caller("x"), "raw text", tools=TOOLS)


def test_reasoning_is_kept_apart(tiny_folder):
    reply = mlxquant.generate(scripted(tiny_folder, ["<think>Hm.</think>Yes."]), CHAT)
    assert (reply.answer, reply.thoughts, reply.text) == ("Yes.", "Hm.", "<think>Hm.</think>Yes.")


def test_the_stop_string_that_ended_a_reply_is_named(tiny_folder):
    reply = mlxquant.generate(scripted(tiny_folder, ["one two three"]), CHAT, stop=["three", "two"])
    assert (reply.text, reply.finish_reason, reply.stopped_by) == ("one ", "stop", "two")
    reply = mlxquant.generate(scripted(tiny_folder, ["one"]), CHAT, stop=["two"])
    assert (reply.finish_reason, reply.stopped_by) == ("stop", None)


def test_progress_over_the_prompt_is_told(tiny):
    told = []
    mlxquant.generate(tiny, list(range(3, 40)), max_tokens=2,
                      progress=lambda *step: told.append(step))
    assert told[0] == (0, 37) and told[-1] == (37, 37)
