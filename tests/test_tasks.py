"""Accuracy on questions, and agreement with the original, without a network."""

import json
import math
import socket
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from commands import run
from conftest import CONFIG, SHARED_DATA, job, random_network, write_folder
from mlx.utils import tree_map
from scripted import scripted

import mlxquant
from mlxquant.base import blas
from mlxquant.base.errors import BadValue, MlxquantError, TooLarge
from mlxquant.codes.width import Width
from mlxquant.report import comparison

pytest.importorskip("lm_eval", reason="tasks need lm-eval: pip install 'mlxquant[tasks]'")

from lm_eval.tasks import manager

from mlxquant.report import tasks

LONG = CONFIG | {"max_position_embeddings": 8192}  # eight examples of GSM8K, by bytes
ENDINGS = [
    {"activity": "Cooking", "context": "A man stands at a stove. he", "answer": 1,
     "endings": ["flies away [title] home.", "stirs the pot.", "is a pot, and then another."]},
    {"activity": "Rowing", "context": "Two people sit in a boat. they", "answer": 0,
     "endings": ["row to the shore.", "eat it."]},
    {"context": "A dog sees a ball. it", "endings": ["reads.", "runs after it."], "answer": 1},
    {"context": "It rains. people", "endings": ["melt.", "open umbrellas.", "s"], "answer": 2},
]
CHOICES = [{"question": f"What is {i}?", "choices": ["A number.", "A cat, of course.", "No."],
            "answer": i % 3} for i in range(2)]
NUMBERS = [{"question": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(3)]


def offline() -> None:
    """Every look-up of a name fails, in this process."""
    def refuse(*_, **__):
        raise AssertionError("the network was asked")

    socket.getaddrinfo = refuse


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    for name, lines in (("endings", ENDINGS), ("choices", CHOICES), ("numbers", NUMBERS)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model, and itself with noise, which stands for a quantised one."""
    folder, network = tmp_path_factory.mktemp("models"), random_network(LONG)
    network.model.embed_tokens.weight = 0.1 * network.model.embed_tokens.weight
    original = write_folder(folder / "original", network, LONG)
    network.update(tree_map(lambda w: w if w.ndim == 1 else w + w.std() * mx.random.normal(
        w.shape), network.parameters()))
    return write_folder(folder / "student", network, LONG), original


@pytest.fixture(scope="module")
def models(folders):
    return [mlxquant.load(str(folder)) for folder in folders]


def likelihood(model, prompt: str, continuation: str) -> float:
    """By one pass over everything, in float64."""
    tokens = model.tokenizer.encode(prompt + continuation)
    start = len(model.tokenizer.encode(prompt))
    logits = np.array(model.network(mx.array([tokens])))[0].astype(np.float64)
    logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return sum(logits[i - 1, tokens[i]] for i in range(start, len(tokens)))


def test_the_likeliest_ending_per_letter_is_chosen(models, files):
    (task,) = tasks.prepare([str(files / "endings.jsonl")])
    chosen = []
    for line in ENDINGS:
        topic = f"{line['activity']}: " if "activity" in line else ""
        prompt = topic + line["context"]
        endings = [ending.replace(" [title] ", ". ") for ending in line["endings"]]  # as lm-eval
        chosen.append(int(np.argmax([likelihood(models[1], prompt, f" {e}") / len(e)
                                     for e in endings])))
    found = task.answered(models[1])
    assert found.chosen == chosen and len(set(chosen)) > 1
    assert found.marks == [c == line["answer"] for c, line in zip(chosen, ENDINGS)]


def test_where_every_length_is_planned_there_are_few_and_the_choices_are_the_same(
        models, files, monkeypatch):
    (task,) = tasks.prepare([str(files / "endings.jsonl")])
    lengths, network = [], type(models[1].network)
    call = network.__call__
    expected = task.answered(models[1])
    monkeypatch.setattr(tasks, "is_cuda", lambda: True)
    monkeypatch.setattr(network, "__call__", lambda self, tokens, cache: (
        lengths.append(tokens.shape[1]), call(self, tokens, cache=cache))[1])
    assert task.answered(models[1]).chosen == expected.chosen
    assert lengths and all(length % 64 == 0 for length in lengths)


def test_a_file_of_a_models_own_choices_is_all_right_and_of_others_all_wrong(models, files,
                                                                             tmp_path):
    own = tasks.prepare([str(files / "choices.jsonl")])[0].answered(models[0]).chosen
    for shift, expected in ((0, 1.0), (1, 0.0)):
        path = tmp_path / f"by{shift}.jsonl"
        path.write_text("\n".join(json.dumps(line | {"answer": (choice + shift) % 3})
                                  for line, choice in zip(CHOICES, own)))
        score = tasks.prepare([str(path)])[0].answered(models[0]).score()
        assert (score.task, score.metric, score.questions) == (path.stem, "acc", 2)
        assert score.accuracy == expected and score.agreement is None


def test_replies_are_marked_by_their_last_number(folders, files, monkeypatch):
    monkeypatch.setattr(tasks, "batchable", lambda _: False)  # the script knows one prompt
    said = ["0 and 1 are $1. Q: What is 9?", "That is 7.", "no idea"], ["1", "2", "no idea"]
    (task,) = tasks.prepare([str(files / "numbers.jsonl")])
    # a prompt is read in two pieces, and the script turns its page at each
    answers = [task.answered(scripted(folders[1], [page for page in replies for _ in "ab"]))
               for replies in said]
    assert [a.marks for a in answers] == [[1, 0, 0], [1, 1, 0]]
    score = answers[0].score(answers[1])
    assert (score.accuracy, score.original_accuracy) == pytest.approx((1 / 3, 2 / 3))
    assert score.agreement == pytest.approx(2 / 3)  # the first and, with no answer, the last


def test_replies_side_by_side_are_those_of_one_by_one(models, files, monkeypatch):
    (task,) = tasks.prepare([str(files / "numbers.jsonl")], 2)
    monkeypatch.setattr(tasks, "_MOST_GENERATED", 6)
    together = task.answered(models[1])
    monkeypatch.setattr(tasks, "batchable", lambda _: False)
    assert task.answered(models[1]) == together


def test_evaluate_says_accuracy_and_agreement_with_their_errors(models, folders, files):
    names = [str(files / f"{name}.jsonl") for name in ("endings", "choices")]
    options = [part for name in names for part in ("--tasks", name)]
    result = run("evaluate", folders[0], "--reference", folders[1], *options, "--json",
                 before=offline)
    assert result.returncode == 0 and set(result.stderr.splitlines()) <= {blas.HINT}
    scores = json.loads(result.stdout)["tasks"]
    for score, task in zip(scores, tasks.prepare(names), strict=True):
        own, original = (task.answered(model) for model in models)
        same = np.mean([a == b for a, b in zip(own.chosen, original.chosen)])
        assert score["agreement"] == same
        for key in ("accuracy", "original", "agreement"):
            share = score["original_accuracy" if key == "original" else key]
            error = math.sqrt(share * (1 - share) / (score["questions"] - 1))
            assert score[f"{key}_stderr"] == pytest.approx(error)
    assert 0 < scores[0]["agreement"] < 1 and scores[0]["metric"] == "acc_norm"
    text = run("evaluate", folders[0], *options, "--questions", 1).stdout
    assert text.count(" over 1 questions\n") == 2 and "±" not in text


def test_what_was_measured_before_a_task_failed_is_shown(tiny_folder, files, tmp_path):
    """The second task's questions are longer than the context of this model."""
    (tmp_path / "text").write_text("some words to predict " * 20)
    result = run("evaluate", tiny_folder, "--text", tmp_path / "text", "--context", 64, "--windows",
                 2, "--tasks", files / "endings.jsonl", "--tasks", files / "choices.jsonl",
                 before=offline)
    assert result.returncode != 0 and "holds 512" in result.stderr
    assert "perplexity" in result.stdout and "endings: acc_norm" in result.stdout


def test_compare_has_columns_of_each_task(tiny_folder, files):
    (task,) = tasks.prepare([str(files / "endings.jsonl")])
    rows = list(comparison.compare(
        str(tiny_folder), comparison.Evaluation("a text of enough letters", 8, 2, [task]),
        methods=["rtn"], bits=[Width.TWO], job=job(group_size=32)))
    head, *cells = comparison.table(rows)
    assert head[-2:] == ["endings %", "same %"] and {len(row) for row in cells} == {len(head)}
    score = rows[1].tasks[0]
    assert cells[0][-1] == "100.0 ± 0.0"
    assert cells[1][-1] == f"{100 * score.agreement:.1f} ± {100 * score.agreement_stderr:.1f}"


def test_questions_beyond_the_context_are_refused(tiny, files):
    (task,) = tasks.prepare([str(files / "choices.jsonl")])
    with pytest.raises(TooLarge, match="holds 512"):
        task.answered(tiny)


@pytest.mark.parametrize("content,message", [
    ('{"context": "a", "endings": ["b", "c"], "answer": 2}', "line 1: .*allowed are 0 to 1"),
    ('{"question": "a", "answer": "1"}\n{"question": "a", "answer": 1}',
     "line 2: answer: Input should be a valid string"),
    ('{"question": "a", "choices": ["b"], "answer": 0}', "line 1: choices: .*at least 2 items"),
    ('{"question": "a", "answer": "1"}\n\n{"question"', "line 3: Invalid JSON"),
    ('{"question": "a\u2028b\u2029c\x85d", "answer": "1"}\n{"question"', "line 2: Invalid JSON"),
    ("\n", "holds no question"), (b"\xe9", "can't decode byte 0xe9"),
])
def test_a_broken_file_is_refused_by_line(tmp_path, content, message):
    path = tmp_path / "broken.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(MlxquantError, match=rf"broken\.jsonl.*{message}"):
        tasks.prepare([str(path)])


def test_tasks_that_cannot_be_asked_are_refused(files, tmp_path, monkeypatch):
    # Of all tasks that lm-eval brings, it is to read one folder: they are 14 thousand files.
    monkeypatch.setattr(manager, "__file__", str(Path(manager.__file__).parent / "gsm8k" / "_"))
    with pytest.raises(BadValue, match="'nosuch' is no file .* lm-eval has no task"):
        tasks.prepare(["nosuch"])
    with pytest.raises(BadValue, match="questions is 0"):
        tasks.prepare([str(files / "endings.jsonl")], 0)
    path = tmp_path / "own.yaml"
    path.write_text(f"""
task: own
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{files / 'numbers.jsonl'}"}}, cache_dir: "{tmp_path}"}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
""")
    with pytest.raises(BadValue, match="own is scored by loglikelihood"):
        tasks.prepare([str(path)])
    path.write_text("task: own\noutput_type: nonsense\n")
    with pytest.raises(MlxquantError, match=r"lm-eval cannot load .*own\.yaml: "):
        tasks.prepare([str(path)])


@pytest.mark.parametrize("options,code,message", [
    (("--tasks", "missing.jsonl"), 1, "no such file: missing.jsonl"),
    ((), 2, "nothing to evaluate on"),
    (("--tasks", "a.jsonl", "--by-layer", "--reference", "x"), 2, "goes without --tasks"),
])
def test_bad_calls_end_before_a_model_is_looked_for(options, code, message):
    result = run("evaluate", "no-such-model", *options)
    assert result.returncode == code and message in result.stderr
    assert result.stderr.count("\n") == 1


def _without_lm_eval() -> None:
    for name in [name for name in sys.modules if name.startswith("lm_eval")]:
        del sys.modules[name]
    for name in ("mlxquant.report.tasks", "mlxquant.report.task_files"):
        sys.modules.pop(name, None)
    sys.modules["lm_eval"] = None


def test_without_lm_eval_one_line_says_what_to_install(files):
    result = run("evaluate", "no-such-model", "--tasks", files / "endings.jsonl",
                 before=_without_lm_eval)
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert "pip install 'mlxquant[tasks]'" in result.stderr


def test_the_shared_files_are_read_whole():
    folder = SHARED_DATA / "tasks"
    if not folder.exists():
        pytest.skip("the shared tasks are not beside this checkout")
    found = tasks.prepare([str(path) for path in sorted(folder.glob("*.jsonl"))])
    assert [(task.name, task.metric) for task in found] == [
        ("gsm8k-100", "exact_match"), ("hellaswag-100", "acc_norm"), ("truthfulqa-mc1-100", "acc")]
