"""Saved conversations: what comes back, what is refused, keys and values that fit."""

import json

import mlx.core as mx
import pytest
from conftest import CONFIG, random_network, write_folder
from scripted import scripted

import mlxquant
from mlxquant import PromptCache, Sampling
from mlxquant.base.errors import BadCheckpoint, BadValue, MlxquantError
from mlxquant.chat import saved
from mlxquant.chat.conversation import Conversation
from mlxquant.chat.repl import handle
from mlxquant.chat.session import Session
from mlxquant.runtime.loop import Loop


@pytest.fixture
def spoken(tiny):
    conversation = Conversation(tiny, system="Be brief.", max_tokens=9,
                                sampling=Sampling(temperature=0.5, seed=4))
    list(conversation.reply("hello"))
    return conversation


def test_a_conversation_comes_back_with_its_keys_and_values(spoken, tiny, tmp_path):
    files = saved.save(spoken, tmp_path / "talk")
    assert [file.name for file in files] == ["talk.json", "talk.safetensors"]
    other = Conversation(tiny)
    saved.load(tmp_path / "talk.json", other)
    assert (other.messages, other.system) == (spoken.messages, spoken.system)
    assert other.sampling == spoken.sampling
    assert other.cache.tokens == spoken.cache.tokens
    for ours, theirs in zip(other.cache.layers, spoken.cache.layers):
        assert all(mx.array_equal(a, b) for a, b in zip(
            ours.keys_and_values(), theirs.keys_and_values()))
    again = list(other.reply("more"))[-1].report
    assert again.cached_tokens > 20
    assert other.messages == (list(spoken.reply("more")), spoken.messages)[1]


def test_what_was_taken_back_or_cleared_is_in_no_file(spoken, tmp_path):
    """Neither as tokens nor as keys and values in the room behind those that are kept."""
    list(spoken.reply("a secret"))
    text = spoken.model.tokenizer.decode
    assert "a secret" in text(spoken.cache.tokens)
    spoken.undo()
    path, cache = saved.save(spoken, tmp_path / "talk")
    kept = PromptCache.load(cache).tokens
    assert "hello" in text(kept) and "a secret" not in text(kept)
    assert {array.shape[2] for array in mx.load(str(cache)).values() if array.ndim == 4} == {
        len(kept)}
    spoken.clear()
    assert saved.save(spoken, tmp_path / "talk") == [path] and not cache.exists()

def test_a_quantised_cache_comes_back(tiny, tmp_path):
    cache = PromptCache()
    mlxquant.generate(tiny, list(range(3, 60)), max_tokens=4, cache=cache, kv_bits=8)
    cache.save(tmp_path / "c.safetensors")
    back = PromptCache.load(tmp_path / "c.safetensors")
    again = mlxquant.generate(tiny, list(range(3, 60)), max_tokens=4, cache=back, kv_bits=8)
    assert again.report.cached_tokens == 56 and back.layers[0].bits == 8


@pytest.mark.parametrize("seed,config,fits", [
    (0, CONFIG, True), (1, CONFIG, False), (0, CONFIG | {"rope_theta": 500.0}, False)])
def test_only_the_same_model_gets_the_keys_and_values(spoken, tmp_path, seed, config, fits):
    """Of the same shape, in files of the same names and sizes, whatever folder they are in."""
    saved.save(spoken, tmp_path / "talk")
    write_folder(tmp_path / "other", random_network(config, seed), config)
    found = Conversation(mlxquant.load(str(tmp_path / "other")))
    assert saved.load(tmp_path / "talk", found) == spoken.model.name
    assert bool(found.cache.tokens) is fits and found.messages == spoken.messages


@pytest.mark.parametrize("held,now,fits", [
    (4, 4, True), (4, None, False), (4, 8, False), (None, 8, True), (None, "draft", False)])
def test_only_a_loop_that_holds_keys_and_values_alike_gets_them(tiny, tmp_path, held, now, fits):
    before = Conversation(tiny, max_tokens=3, loop=Loop(kv_bits=held))
    list(before.reply("hello"))
    saved.save(before, tmp_path / "talk")
    loop = Loop(draft=tiny) if now == "draft" else Loop(kv_bits=now)
    found = Conversation(tiny, loop=loop)
    saved.load(tmp_path / "talk", found)
    assert bool(found.cache.tokens) is fits and found.messages == before.messages
    found.max_tokens = 3
    report = list(found.reply("more"))[-1].report
    assert bool(report.cached_tokens) is fits and found.cache.bits == (
        {loop.kv_bits} if loop.kv_bits else set())


def test_saving_again_without_keys_and_values_leaves_no_old_ones(spoken, tiny, tmp_path):
    saved.save(spoken, tmp_path / "talk")
    assert saved.save(Conversation(tiny), tmp_path / "talk") == [tmp_path / "talk.json"]
    assert not (tmp_path / "talk.safetensors").exists()


@pytest.mark.parametrize("name,message", [
    ("model.json", "model.json is no saved conversation of format 1; give another name"),
    ("model.safetensors", "model.safetensors is no prompt cache: .*; give another name")])
def test_saving_takes_no_other_file_away(spoken, tiny, tiny_folder, tmp_path, name, message):
    """As beside a model, whose files have the same endings."""
    there = tmp_path / name
    there.write_bytes((tiny_folder / name.replace("model.json", "config.json")).read_bytes())
    before = there.read_bytes()
    for conversation in (spoken, Conversation(tiny)):
        with pytest.raises(BadCheckpoint, match=message):
            saved.save(conversation, tmp_path / "model")
    assert there.read_bytes() == before and list(tmp_path.iterdir()) == [there]


@pytest.mark.parametrize("change,message", [
    (lambda v: "not json", "is no saved conversation"),
    (lambda v: json.dumps([]), "is no saved conversation of format 1"),
    (lambda v: json.dumps(v | {"format": 2}), "of format 1"),
    (lambda v: "[" * 100_000, "is no saved conversation"),
    (lambda v: json.dumps(v | {"messages": [{"role": "user", "content": "x"}]}),
     "pairs of user and assistant"),
    (lambda v: json.dumps(v | {"messages": [{"role": "user"}, {"role": "assistant"}]}),
     "pairs of user"),
    (lambda v: json.dumps(v | {"system": 7}), "model and system must be text"),
    (lambda v: json.dumps(v | {"max_tokens": "many"}), "whole numbers that fit"),
    (lambda v: json.dumps(v | {"forgotten": 4}), "whole numbers that fit"),
    (lambda v: json.dumps(v | {"sampling": {"heat": 1}}), "other settings"),
])
def test_what_is_no_saved_conversation_is_refused(spoken, tiny, tmp_path, change, message):
    path, _ = saved.save(spoken, tmp_path / "talk")
    path.write_text(change(json.loads(path.read_text())))
    with pytest.raises(BadCheckpoint, match=message):
        saved.load(path, Conversation(tiny))


def test_a_damaged_cache_is_refused(spoken, tiny, tmp_path):
    _, cache = saved.save(spoken, tmp_path / "talk")
    cache.write_bytes(cache.read_bytes()[:100])
    with pytest.raises(BadCheckpoint, match="is no prompt cache"):
        saved.load(tmp_path / "talk", Conversation(tiny))
    (tmp_path / "plain.safetensors").unlink(missing_ok=True)
    mx.save_safetensors(str(tmp_path / "plain.safetensors"), {"a": mx.zeros(3)})
    with pytest.raises(BadCheckpoint, match="is no prompt cache"):
        PromptCache.load(tmp_path / "plain.safetensors")


def test_an_error_that_says_nothing_is_named(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError

    monkeypatch.setattr("mlxquant.runtime.prompt_cache.load_prompt_cache", fail)
    with pytest.raises(BadCheckpoint, match="is no prompt cache: RuntimeError"):
        PromptCache.load(tmp_path / "talk.safetensors")


def test_a_missing_file_and_a_bad_value_are_one_line(tiny, spoken, tmp_path):
    with pytest.raises(MlxquantError, match="cannot read .*talk.json: No such file"):
        saved.load(tmp_path / "talk", Conversation(tiny))
    path, _ = saved.save(spoken, tmp_path / "talk")
    value = json.loads(path.read_text())
    path.write_text(json.dumps(value | {"sampling": value["sampling"] | {"top_p": 7}}))
    with pytest.raises(BadValue, match="top_p is 7"):
        saved.load(path, Conversation(tiny))


def test_commands_save_and_load(tiny_folder, tmp_path, capsys):
    session = Session(Conversation(scripted(tiny_folder, ["One.", "Two."])))
    handle(session, "hello")
    handle(session, f"/save {tmp_path}/talk")
    handle(session, "/clear")
    handle(session, f"/load {tmp_path}/talk")
    handle(session, "/save")
    handle(session, "/load")
    handle(session, "/save ..")
    handle(session, "/save ~nobody-of-this-name/x")
    (tmp_path / "file").touch()
    handle(session, f"/save {tmp_path}/file/talk")
    (tmp_path / "talk.safetensors").unlink()
    (tmp_path / "talk.safetensors").mkdir()
    handle(session, f"/save {tmp_path}/talk")
    err = " ".join(capsys.readouterr().err.split())
    assert "error: ~nobody-of-this-name/x: Could not determine home" in err
    assert f"error: cannot write {tmp_path}/file/talk.json: " in err
    assert f"error: cannot write {tmp_path}/talk.safetensors: Is a directory" in err
    assert "(saved: " in err and "1 turns;" in err and "need no processing" in err
    assert err.count("error: /save needs a file's name") == 2
    assert "error: /load needs a file's name" in err
    assert [m["content"] for m in session.conversation.messages] == ["hello", "One."]
