"""Questions with known answers: accuracy, and how often a model chooses as its original does.

Prompts, filters and metrics are those of lm-eval (https://github.com/EleutherAI/
lm-evaluation-harness): those of the named task or, for a local file, of the task that has questions
of the same form; then nothing is fetched. Importing this needs lm-eval. mlx-lm's adapter for it
opens models itself, which it cannot do with replicated ones, and looks for stop strings only when
the whole reply is generated: hence another adapter here.
"""

import contextlib
import io
import logging
import re
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean_stderr
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from mlx_lm.models.cache import make_prompt_cache

from mlxquant.base import checks
from mlxquant.base.errors import BadValue, MlxquantError, first_line
from mlxquant.kernels.backend import is_cuda
from mlxquant.model.loading import LanguageModel
from mlxquant.model.windows import check_context
from mlxquant.report import task_files
from mlxquant.runtime.batch import batch_generate, batchable
from mlxquant.runtime.generation import generate

METRICS = ("acc_norm", "acc", "exact_match")  # the first that a task has is reported
_MOST_GENERATED = 256  # tokens of a reply, where the task does not say: lm-eval's own default
Progress = Callable[[int, int, None], None]


@dataclass(frozen=True)
class Score:
    """Accuracy by ``metric`` over some questions, and beside the original's: its accuracy, and the
    share of questions where both choose the same. Errors are standard errors, None for a single
    question; what needs an original is None without one."""

    task: str
    metric: str
    questions: int
    accuracy: float
    accuracy_stderr: float | None
    original_accuracy: float | None = None
    original_stderr: float | None = None
    agreement: float | None = None
    agreement_stderr: float | None = None

    def line(self) -> str:
        line = (f"{self.task}: {self.metric} {shown(self.accuracy, self.accuracy_stderr)} over "
                f"{self.questions} questions")
        if self.original_accuracy is not None:
            line += (f" · the original {shown(self.original_accuracy, self.original_stderr)} · "
                     f"the same choice {shown(self.agreement, self.agreement_stderr)}")
        return line


def shown(share: float | None, stderr: float | None) -> str:
    """A share in percent, with its standard error; nothing where it is not known."""
    error = "" if stderr is None else f" ± {100 * stderr:.1f}"
    return "" if share is None else f"{100 * share:.1f}{error} %"


@dataclass(frozen=True)
class Answers:
    """What a model chose for every question of a task, and how that was marked, from 0 to 1."""

    task: "BuiltTask"
    chosen: list[Any]
    marks: list[float]

    def score(self, original: "Answers | None" = None) -> Score:
        """The score, beside that of ``original``, answers to the same task."""
        beside = () if original is None else (*_mean(original.marks), *_mean(
            [float(a == b) for a, b in zip(self.chosen, original.chosen)]))
        return Score(self.task.name, self.task.metric, len(self.marks), *_mean(self.marks), *beside)


class BuiltTask:
    """A task of lm-eval with its prompts built; ``name`` is a file's or lm-eval's own."""

    def __init__(self, task: Any, name: str, questions: int | None):
        if task.OUTPUT_TYPE not in ("multiple_choice", "generate_until"):
            raise BadValue(f"{name} is scored by {task.OUTPUT_TYPE}; allowed are tasks of choices "
                           "and of generated answers")
        known = [metric for metric in METRICS if metric in task.aggregation()]
        if not known:
            raise BadValue(f"{name} has {', '.join(task.aggregation())}; "
                           f"one of {', '.join(METRICS)} is needed")
        self.name, self.metric, self._task = name, known[0], task
        task.set_config("num_fewshot", task.get_config("num_fewshot") or 0)
        task.set_fewshot_seed(1234)  # lm-eval's own
        with contextlib.redirect_stderr(io.StringIO()):  # a bar, for less than a second
            task.build_all_requests(limit=questions)

    def answered(self, model: LanguageModel, progress: Progress = lambda *_: None) -> Answers:
        """Ask ``model`` everything. Raises ``TooLarge`` for questions beyond its context."""
        asked = self._task.instances
        replies = getattr(_Model(model, progress), asked[0].request_type)(
            asked, disable_tqdm=True)
        for instance, reply in zip(asked, replies):
            instance.resps = [reply] * instance.repeats
        self._task.apply_filters()
        chosen, marks = [], list[float]()
        for _, group in groupby(asked, key=lambda instance: instance.doc_id):
            of_one = list(group)
            extract = list(of_one[0].filtered_resps)[-1]  # of several the most lenient
            found = [instance.filtered_resps[extract] for instance in of_one]
            marks.append(float(self._task.process_results(of_one[0].doc, found)[self.metric]))
            chosen.append(self._choice(of_one[0].doc, found))
        return Answers(self, chosen, marks)

    def _choice(self, document: dict[str, Any], found: list[Any]) -> Any:
        """The index of the likeliest choice as the metric has it, or the answer in a reply."""
        if self.metric == "exact_match":
            return re.sub(r"[$,]|\.$", "", found[0])
        choices = self._task.doc_to_choice(document)
        likelihoods = np.array([likelihood for likelihood, _ in found[:len(choices)]])
        if self.metric == "acc_norm":
            likelihoods /= [len(choice) for choice in choices]
        return int(np.argmax(likelihoods))


class _Model(TemplateLM):
    """A loaded model as lm-eval asks it, without a chat template."""

    def __init__(self, model: LanguageModel, progress: Progress):
        super().__init__()
        self._model, self._progress = model, progress
        # On CUDA, MLX plans attention anew for every pair of lengths, which takes longer than to
        # read a few tokens more: lengths there are multiples of so many tokens.
        self._step = 64 if is_cuda() else 1

    @property
    def eot_token_id(self) -> int:
        return self._model.tokenizer.eos_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None,
                   **_: Any) -> list[int]:
        special = add_special_tokens is not False
        return self._model.tokenizer.encode(string, add_special_tokens=special)

    def _loglikelihood_tokens(self, requests: list[tuple[Any, list[int], list[int]]],
                              **_: Any) -> list[tuple[float, bool]]:
        """The common context of a question's choices is read once, up to a multiple of ``_step``
        tokens. The rest is padded at its end to a multiple; causal attention does not see that."""
        longest = max(len(context) + len(continuation) for _, context, continuation in requests)
        check_context(self._model, longest, 0)
        network, results = self._model.network, list[tuple[float, bool]]()
        for context, of_one in groupby(requests, key=lambda request: request[1]):
            cache, read = make_prompt_cache(network), (len(context) - 1) // self._step * self._step
            if read:
                network(mx.array([context[:read]]), cache=cache)
                mx.eval([layer.state for layer in cache])
            for continuation in (request[2] for request in of_one):
                tokens = context[read:] + continuation
                filling = [tokens[-1]] * self._filling(read, len(tokens) - 1)
                logits = network(mx.array([tokens[:-1] + filling]), cache=deepcopy(cache))
                first = len(context) - read - 1
                results.append(_likelihood(logits[0, first:len(tokens) - 1], continuation))
            self._progress(len(results), len(requests), None)
        return results

    def _filling(self, read: int, tokens: int) -> int:
        """Tokens to add to ``tokens`` behind ``read`` of them, within the model's context."""
        free = -tokens % self._step
        limit = self._model.context_length
        return free if limit is None else min(free, limit - read - tokens)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        replies = list[str]()
        for settings, alike in groupby(requests, key=lambda request: request.args[1]):
            prompts = [self.tok_encode(request.args[0]) for request in alike]
            until = settings.get("until") or []
            settled: dict[str, Any] = dict(stop=[until] if isinstance(until, str) else until,
                                           max_tokens=settings.get("max_gen_toks", _MOST_GENERATED))
            if batchable(self._model):
                replies += batch_generate(
                    self._model, prompts, **settled,
                    progress=lambda done, total: self._progress(done, total, None)).texts
            else:
                replies += [generate(self._model, prompt, **settled).text for prompt in prompts]
        return replies

    def loglikelihood_rolling(self, requests: list[Instance],
                              disable_tqdm: bool = True) -> list[float]:
        raise NotImplementedError  # ``BuiltTask`` refuses what would ask for it


def _likelihood(logits: mx.array, continuation: list[int]) -> tuple[float, bool]:
    """The logarithm of the probability of a continuation of n tokens by the logits (n, vocabulary)
    before each, and whether each was the likeliest."""
    logits, targets = logits.astype(mx.float32), mx.array(continuation)
    greedy = mx.all(mx.argmax(logits, axis=-1) == targets)
    loss = nn.losses.cross_entropy(logits, targets, reduction="sum")
    return -loss.item(), bool(greedy.item())


def prepare(names: Sequence[str], questions: int | None = None) -> list[BuiltTask]:
    """The tasks called ``names``, each with its first ``questions`` (None: all).

    A name is a file of JSON lines, an lm-eval task in a ``.yaml`` file, or a task or group by
    lm-eval's name, whose questions are fetched. A line has ``context``, ``endings`` and the index
    ``answer`` (asked as HellaSwag), ``question``, ``choices`` and the index ``answer`` (as
    TruthfulQA MC1), or ``question`` and the text ``answer`` (as GSM8K, with eight examples).
    Raises ``BadValue`` and ``MlxquantError`` for what is none of these.
    """
    if questions is not None:
        checks.integer("questions", questions, 1)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    tasks = []
    for name in names:
        if name.endswith((".jsonl", ".yaml")) and not Path(name).is_file():
            raise MlxquantError(f"no such file: {name}")
        found = ({Path(name).stem: task_files.read(Path(name))} if name.endswith(".jsonl") else
                 _of_harness(name))
        tasks += [BuiltTask(task, own, questions) for own, task in found.items()]
    return tasks


def _of_harness(name: str) -> dict[str, Any]:
    manager = TaskManager(include_defaults=not name.endswith(".yaml"))
    if not name.endswith(".yaml") and name not in manager.all_tasks:
        raise BadValue(f"{name!r} is no file of JSON lines (.jsonl), and lm-eval has no task of "
                       "this name")
    try:
        return manager.load([name])["tasks"]
    except Exception as error:  # of the hub's client, of YAML, of what a task brings itself
        raise MlxquantError(f"lm-eval cannot load {name}: {first_line(error)}") from error


def _mean(values: list[float]) -> tuple[float, float | None]:
    return float(np.mean(values)), mean_stderr(values) if len(values) > 1 else None
