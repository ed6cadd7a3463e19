"""The conversation by transcript: through a pipe, with a model that says what is written here."""

import pytest
import scripted as scripts
from mlx_lm.models.cache import RotatingKVCache
from scripted import contents, scripted

from mlxquant.base.errors import TooLarge
from mlxquant.chat import repl, terminal
from mlxquant.chat.conversation import Conversation
from mlxquant.chat.repl import handle
from mlxquant.chat.session import Session
from mlxquant.chat.terminal import is_open, unquoted
from mlxquant.runtime.loop import Loop

talk = scripts.talk  # a fixture
GREETING = "<think>Be nice.</think>\n\nHello **you**."


def test_a_piped_conversation_answers_each_line_and_ends(talk):
    out, err, conversation = talk("hello", "", "again")
    assert out == "One.\nTwo.\n" and contents(conversation) == ["hello", "One.", "again", "Two."]
    assert err.count("tokens/s") >= 2


def test_a_turn_does_not_process_the_conversation_again(talk):
    _, _, conversation = talk("hello there, how are you today?", "again")
    assert conversation.last_report.cached_tokens > conversation.last_report.prompt_tokens


def test_a_turn_is_put_through_the_template_once(tiny_folder, monkeypatch):
    model, encoded = scripted(tiny_folder, ["One.", "Two."]), []
    template = model.tokenizer.apply_chat_template
    monkeypatch.setattr(type(model.tokenizer), "apply_chat_template",
                        lambda _, messages, **how: encoded.append(1) or template(messages, **how))
    conversation = Conversation(model)
    for text in ("hello", "again"):
        list(conversation.reply(text))
    assert contents(conversation) == ["hello", "One.", "again", "Two."] and len(encoded) == 2


def test_reasoning_is_folded_or_shown_and_kept(talk):
    out, err, conversation = talk("hi", "/show thoughts", replies=[GREETING])
    assert out == "Hello **you**.\n" and "thought, 2 words" in err and err.count("Be nice.") == 1
    assert contents(conversation)[1] == GREETING
    out, err, _ = talk("/set thoughts shown", "hi", replies=[GREETING])
    assert out == "Hello **you**.\n" and "Be nice." in err and "thought, 2" not in err


def test_several_lines_and_files_make_one_message(talk, tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("a\nb\n")
    _, err, conversation = talk('"""first', "", 'second"""', f"/read {file}", "what is this?",
                                "/read nowhere", f"/read {tmp_path}")
    assert contents(conversation)[0] == "first\n\nsecond"
    assert contents(conversation)[2] == "notes.txt:\n```\na\nb\n```\n\nwhat is this?"
    assert "(notes.txt, 2 lines, goes with the next message)" in err
    assert "error: cannot read nowhere: No such file" in err
    assert f"error: cannot read {tmp_path}: Is a dir" in err


def test_binary_and_large_files_are_refused(talk, tmp_path):
    (tmp_path / "b").write_bytes(b"\xff\xfe\x00")
    with open(tmp_path / "large", "wb") as file:
        file.truncate(5 << 20)
    _, err, _ = talk(f"/read {tmp_path}/b", f"/read {tmp_path}/large")
    assert "is not text in UTF-8" in err and "has 5 MB, allowed are 4" in err


def test_help_names_every_command_of_the_table(talk):
    from mlxquant.chat.commands import TABLE

    _, err, _ = talk("/help")
    assert all(command.usage in err and command.help in err for command in TABLE.values())
    assert set(TABLE) == {"/help", "/set", "/show", "/system", "/clear", "/retry", "/undo",
                          "/edit", "/save", "/load", "/read", "/stats", "/bench", "/model", "/exit"}


def test_settings_change_during_the_conversation(talk):
    _, err, conversation = talk(
        "/set temperature 0.5", "/set top_k=7", "/set seed 3", "/set seed none",
        "/set max_tokens 9", "/set lookup 4", "/show", "/set", "/set heat 3", "/set top_p 2",
        "/set top_k x",
        "/set max_tokens 0", "/set lookup 1000", "/set thoughts maybe", "/set logit_bias {}")
    sampling = conversation.sampling
    assert (sampling.temperature, sampling.top_k, sampling.seed) == (0.5, 7, None)
    assert (conversation.max_tokens, conversation.loop.lookup) == (9, 4)
    for expected in ("temperature 0.5 · top_p 1.0 · top_k 7", "(seed is None)",
                     "error: top_p is 2.0, allowed are 0 to 1",
                     "error: top_k is 'x', allowed is a whole number",
                     "error: max_tokens is 0, at least 1", "error: lookup is 1000, allowed are",
                     "error: thoughts is 'maybe', allowed are folded"):
        assert expected in err
    assert err.count("error: /set NAME VALUE") == 3


def test_system_clear_stats_and_unknown_commands(talk):
    out, err, conversation = talk("/stats", "/system", "/system Be brief.", "/system", "hi",
                                  "/clear", "/nonsense")
    assert out == "One.\n" and conversation.messages == [] and conversation.system == "Be brief."
    for expected in ("no reply yet", "0/512 tokens", "(no system prompt)", "(system prompt set",
                     "Be brief.", "(conversation cleared)", "no command /nonsense"):
        assert expected in err


def test_the_system_prompt_reaches_the_model(talk):
    _, _, with_system = talk("hello", system="Be brief.")
    _, _, without = talk("hello")
    assert with_system.last_report.prompt_tokens > without.last_report.prompt_tokens


def test_retry_undo_and_edit(talk):
    _, _, conversation = talk("a", "/retry")
    assert contents(conversation) == ["a", "Two."]
    _, err, conversation = talk("a", "b", "/undo")
    assert contents(conversation) == ["a", "One."] and "(taken back: b)" in err
    _, _, conversation = talk("a", "/edit c")
    assert contents(conversation) == ["c", "Two."]
    _, err, _ = talk("/undo", "/retry", "/edit b")
    assert err.count("error: nothing has been said yet") == 3


def test_asking_again_keeps_the_old_exchange_where_it_cannot_be_asked(talk):
    _, err, conversation = talk("a", "/edit " + "x" * 600)
    assert contents(conversation) == ["a", "One."] and "error: the message has" in err


def test_edit_alone_begins_the_next_prompt(tiny_folder, monkeypatch):
    session = Session(Conversation(scripted(tiny_folder, ["One.", "Two."])))
    handle(session, "a question")
    monkeypatch.setattr(terminal, "has_editor", lambda: True)
    handle(session, "/edit")
    assert contents(session.conversation) == ["a question", "One."]  # until the other is sent
    handle(session, repl.read(session, lambda start: f"{start},\nchanged"))
    assert contents(session.conversation) == ["a question,\nchanged", "Two."]
    assert repl.read(session, lambda start: start) == ""


def test_files_stay_with_a_message_that_is_edited_or_taken_back(talk, tmp_path):
    for name in "ab":
        (tmp_path / name).write_text(name)
    first, second = (f"{name}:\n```\n{name}\n```\n\n" for name in "ab")
    _, _, conversation = talk(f"/read {tmp_path}/a", "sum up", "/edit in a line", "/retry",
                              f"/read {tmp_path}/b", "/edit both")
    assert contents(conversation)[0] == f"{first}{second}both"
    _, err, conversation = talk(f"/read {tmp_path}/a", "sum up", "/undo", "again", "next")
    assert contents(conversation)[::2] == [f"{first}again", "next"]
    assert "(taken back: sum up)" in err and "(what was read goes with the next message" in err


def test_edit_alone_takes_nothing_back_where_nobody_can_change_it(talk):
    _, err, conversation = talk("a", "/edit")
    assert contents(conversation) == ["a", "One."] and "error: /edit needs a text" in err


def test_bench_leaves_the_conversation_alone(talk):
    _, err, conversation = talk("a", "/bench", "b", replies=["One.", "Bench.", "Two."])
    assert contents(conversation) == ["a", "One.", "b", "Two."] and err.count("tokens/s") >= 3
    assert conversation.last_report.cached_tokens > 0


def test_exit_leaves_at_once(talk):
    assert talk("/exit", "never asked")[2].messages == []


def test_another_model_goes_on_with_the_conversation(talk, tiny_folder):
    out, err, conversation = talk("a", f"/model {tiny_folder}", "b", "/model")
    assert out == "One.\nFrom another.\n" and contents(conversation)[::2] == ["a", "b"]
    assert conversation.last_report.cached_tokens == 0 and "the conversation goes on" in err


def test_a_model_that_cannot_be_loaded_leaves_the_one_there_was(talk, tiny_folder):
    calls = []

    def load(name):
        calls.append(name)
        if len(calls) == 1:
            raise TooLarge("too large")
        return scripted(name, ["Still here."])

    out, err, _ = talk("a", "/model no-such", f"/model {tiny_folder}", "b", load=load)
    assert "error: no model named 'no-such'" in err and "error: too large" in err
    assert out == "One.\nStill here.\n" and len(calls) == 2


def test_a_draft_is_left_behind_with_its_model_and_not_without_a_word(talk, tiny_folder, tiny):
    drafted, failing = Loop(draft=tiny), [TooLarge("too large")]

    def load(name):
        if failing:
            raise failing.pop()
        return scripted(name)

    _, err, conversation = talk(f"/model {tiny_folder}", load=load, loop=drafted)
    assert "error: too large" in err and "without" not in err and conversation.loop is drafted
    _, err, conversation = talk(f"/model {tiny_folder}", load=load, loop=drafted)
    assert f"(without the draft model {tiny.name}," in err and conversation.loop == Loop()


@pytest.mark.parametrize("option", [{"kv_bits": 8}, {"lookup": 4}])
def test_what_another_model_cannot_do_is_left_out_with_a_word(talk, tiny_folder, option):
    def load(name):
        model = scripted(name, ["From another."])
        model.network.make_cache = lambda: [RotatingKVCache(64) for _ in model.network.layers]
        return model

    _, err, conversation = talk("a", f"/model {tiny_folder}", "b", load=load, loop=Loop(**option))
    assert contents(conversation)[::2] == ["a", "b"] and conversation.loop == Loop()
    assert f"(without {next(iter(option))}: {tiny_folder}" in " ".join(err.split())


def test_a_full_context_forgets_whole_turns_and_says_so(talk):
    system = "S" * 40
    lines = [f"{i} " + "x" * 60 for i in range(6)]
    out, err, conversation = talk(*lines, replies=[f"Reply {i}." for i in range(6)],
                                  system=system, max_tokens=100)
    assert out == "".join(f"Reply {i}.\n" for i in range(6))
    assert "the context is full: the model no longer sees the oldest" in err
    assert len(conversation.messages) == 12
    assert conversation.forgotten % 2 == 0 < conversation.forgotten
    seen = conversation.model.tokenizer.decode(conversation.cache.tokens)
    assert seen.startswith("<|im_start|>system\n" + system)
    assert "0 xxx" not in seen and "5 xxx" in seen
    assert seen.count("<|im_start|>user") == seen.count("<|im_start|>assistant")


def test_a_message_longer_than_the_context_is_refused_and_loses_nothing(talk, tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("a")
    _, err, conversation = talk("before", f"/read {file}", "x" * 600, "short", f"/read {file}",
                                "/read", "after")
    assert "error: the message has" in err and "the context of" in err
    assert contents(conversation)[::2] == [
        "before", "notes.txt:\n```\na\n```\n\nshort", "after"] and conversation.forgotten == 0
    assert conversation.last_report.cached_tokens > 0


@pytest.mark.parametrize("text,whole,opened", [
    ('"""a', "a", True), ('"""a\nb"""', "a\nb", False), ('"""', "", True),
    ("plain ", "plain", False),
    ('""""""', "", False), ('say """x"""', 'say """x"""', False)])
def test_quotes_around_several_lines(text, whole, opened):
    assert unquoted(text) == whole and is_open(text) is opened
