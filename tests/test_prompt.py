"""What may be a prompt: types, ids, messages, templates; understood, or refused in one line."""

import json
import shutil
import time

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

import mlxquant
from mlxquant import Sampling
from mlxquant.base.errors import BadValue, MlxquantError, Unsupported
from mlxquant.runtime import prompt
from mlxquant.runtime.prompt import encode, plain_messages

CHAT = [{"role": "user", "content": "tell me"}]


@pytest.mark.parametrize("wrong, message", [
    ([10**6], "token 1000000, .* has 0 to 383"), ([5, 384], "token 384"), ([-3], "token -3"),
    ([1.5], "must be text"), (["a"], "must be text"), (b"abc", "must be text"),
    (("a", "b"), "must be text"), ([True, False], "must be text"), (5, "must be text"),
    ([{"role": "user", "content": "x"}, 5], r"messages\[1\] must be an object"),
    ([{"content": "x"}], r"messages\[0\] must be an object with role"),
    ([{"role": "user", "content": 5}], r"messages\[0\].content must be text"),
    ([{"role": "user", "content": [{"type": "image_url"}]}], "images are not supported"),
    ([{"role": "user", "tool_calls": [{"function": {"arguments": "{"}}]}], "arguments in JSON"),
    ([], "empty"), ("", "empty"), ("half \ud800 of a pair", "no text")])
def test_what_is_no_prompt_is_refused_in_one_line(tiny, wrong, message):
    with pytest.raises(BadValue, match=message) as refused:
        mlxquant.generate(tiny, wrong)
    assert "\n" not in str(refused.value)


def test_the_tokenizer_itself_says_nothing_of_a_long_prompt(tiny_folder, monkeypatch):
    model, said = mlxquant.load(str(tiny_folder)), []
    monkeypatch.setattr("transformers.tokenization_utils_base.logger.warning",
                        lambda *told: said.append(told))
    model.tokenizer._tokenizer.model_max_length = 5
    assert len(encode(model, "longer than five")) == 16 and not said


@pytest.mark.parametrize("options", [
    dict(max_tokens=1.5), dict(max_tokens="5"), dict(max_tokens=True), dict(stop=[1]),
    dict(stop=["a", ""]), dict(kv_bits=4.0), dict(lookup=100), dict(lookup="2"), dict(logprobs=99),
    dict(draft_tokens=1.0), dict(sampling=("temperature", "hot")), dict(sampling=("top_k", 2.0)),
    dict(sampling=("temperature", float("nan"))), dict(sampling=("seed", 1.5)),
    dict(sampling=("seed", True)), dict(sampling=("logit_bias", [5])),
    dict(sampling=("logit_bias", {"5": 1})), dict(sampling=("logit_bias", {5: "x"})),
    dict(sampling=("logit_bias", {999999: 5.0})), dict(sampling=("repetition_context_size", 0)),
    dict(sampling=("temperature", 10**5000))])
def test_options_of_a_wrong_type_or_range_are_refused(tiny, options):
    with pytest.raises(BadValue, match=next(iter(options)) if "sampling" not in options else
                       options["sampling"][0]):
        if "sampling" in options:
            options = {"sampling": Sampling(**dict([options["sampling"]]))}
        mlxquant.generate(tiny, "x", **options)


@pytest.mark.parametrize("work, message", [
    (lambda model: mlxquant.generate(model, "x", stop=None), "stop must be text, or a list of"),
    (lambda model: mlxquant.generate(model, "x", draft="tiny"), "draft is 'tiny', a LanguageModel"),
    (lambda model: mlxquant.generate(model, "x", sampling=None), "sampling is None, a Sampling"),
    (lambda model: mlxquant.generate(model, "x", cache={}), "cache is {}, a PromptCache is"),
    (lambda model: mlxquant.generate("tiny", "x"), "model is 'tiny', a LanguageModel is needed"),
    (lambda model: mlxquant.evaluate("tiny", "x"), "model is 'tiny', a LanguageModel is needed"),
    (lambda model: mlxquant.batch_generate("tiny", ["x"]), "model is 'tiny', a LanguageModel is"),
    (lambda model: mlxquant.batch_generate(model, "Red is"), "prompts is 'Red is', a list is"),
    (lambda model: mlxquant.bench("tiny"), "models is 'tiny', a list is needed"),
    (lambda model: mlxquant.Text("t.txt"), "files is 't.txt', a list is needed"),
    (lambda model: mlxquant.Job(None), "spec is None, a Spec is needed"),
    (lambda model: mlxquant.Job(text="t.txt"), "text is 't.txt', a Text is needed"),
    (lambda model: mlxquant.quantize("tiny", "out", mlxquant.Spec()), "job is Spec.*, a Job is"),
    (lambda model: mlxquant.load(None), "model is None, text or a path is needed"),
])
def test_usual_mistakes_are_said_in_one_line(tiny, work, message):
    with pytest.raises(BadValue, match=message):
        work(tiny)


def test_a_path_is_a_name_everywhere(tiny_folder, tmp_path):
    assert mlxquant.load(tiny_folder).name == str(tiny_folder)
    assert mlxquant.plan(tiny_folder, memory="8GB", chip="M1").model == str(tiny_folder)
    job = mlxquant.Job(mlxquant.Spec(method="rtn"))
    assert mlxquant.quantize(tiny_folder, tmp_path / "out", job).folder == tmp_path / "out"
    assert mlxquant.Text([tiny_folder / "a"]).files == (str(tiny_folder / "a"),)


@pytest.mark.parametrize("seed", [-1, 0, 2**64, -2**70])
def test_any_whole_number_is_a_seed(tiny, seed):
    hot = Sampling(temperature=5.0, seed=seed)
    first, second = (mlxquant.generate(tiny, "x", max_tokens=6, sampling=hot) for _ in range(2))
    assert first.text == second.text


def test_content_in_parts_is_one_text(tiny):
    parts = [{"role": "user", "content": [{"type": "text", "text": "tell"},
                                          {"type": "text", "text": " me"}]}]
    assert encode(tiny, parts) == encode(tiny, CHAT)
    assert encode(tiny, [{"role": "user", "content": None}]) == encode(
        tiny, [{"role": "user", "content": ""}])


def test_calls_of_earlier_replies_reach_the_template_as_objects():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    (message,) = plain_messages([{"role": "assistant", "tool_calls": [call]}])
    assert message["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert call["function"]["arguments"] == '{"a": 1}' and message["content"] == ""


def with_template(folder, tmp_path, template):
    copy = shutil.copytree(folder, tmp_path / "model")
    config = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    return mlxquant.load(str(copy))


@pytest.mark.parametrize("template", [
    "{% for i in range(999999999) %}x{% endfor %}", "{{ raise_exception('no\nsystem') }}",
    "{{ messages.x.y }}", "{{ 1 / 0 }}", "{{ messages + 5 }}", "{% for x in %}", "{{ 'a' + 1 }}",
    [{"name": "rag", "template": "{{ messages }}"}]])
def test_whatever_a_template_raises_is_one_line(tiny_folder, tmp_path, template):
    model = with_template(tiny_folder, tmp_path, template)
    with pytest.raises(Unsupported, match="refuses these messages: .") as refused:
        mlxquant.generate(model, CHAT)
    assert "\n" not in str(refused.value)


def test_a_template_that_does_not_end_is_ended(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(prompt, "TEMPLATE_SECONDS", 0.2)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    model = with_template(tiny_folder, tmp_path, endless)
    with pytest.raises(Unsupported, match="took more than 0.2 s"):
        mlxquant.generate(model, CHAT)


def test_what_takes_too_long_is_interrupted_and_not_only_left_alone():
    reached = []

    def work():
        try:
            while True:
                time.sleep(0.001)
        finally:
            reached.append(True)

    with pytest.raises(TimeoutError):
        prompt.within(0.05, work)
    deadline = time.monotonic() + 30
    while not reached and time.monotonic() < deadline:
        time.sleep(0.01)
    assert reached and prompt.within(5, lambda: 3) == 3
    with pytest.raises(KeyError):
        prompt.within(5, lambda: {}["a"])


def sentencepiece(bos: bool):
    """A tokenizer as Llama 2's: ▁ for spaces, bytes for unknown characters, maybe a BOS."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), "▁", "▁Once", "▁upon",
             "▁a", "▁time", "▁Hello", "a", "b", ",", "."]
    made = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True,
                                unk_token="<unk>", fuse_unk=True, ignore_merges=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"),
                                            normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0)])
    if bos:
        made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def test_bos_is_there_once(tiny_folder):
    model = mlxquant.load(str(tiny_folder))
    model.tokenizer._tokenizer = sentencepiece(bos=True)
    for text in ("a", "<s>a", "<s> a"):
        assert encode(model, text).count(1) == 1, text
    model.tokenizer._tokenizer = sentencepiece(bos=False)
    assert encode(model, "a").count(1) == 0


def test_errors_of_a_prompt_are_ours(tiny):
    with pytest.raises(MlxquantError):
        mlxquant.batch_generate(tiny, ["fine", [10**6]])
    with pytest.raises(BadValue, match="max_tokens"):
        mlxquant.batch_generate(tiny, ["x"], max_tokens=1.5)
