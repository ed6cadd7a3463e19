"""Tokens per second against the ceiling, by llama-bench's conventions.

``pp512`` processes 512 random tokens at once, ``tg128`` generates 128 one by one after none,
``tg128 @ d4096`` after 4,096; nothing ends early. Each is warmed up and repeated.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generate_step, generation_stream, wired_limit
from mlx_lm.models.cache import make_prompt_cache

from mlxquant.base import checks
from mlxquant.base.errors import BadValue
from mlxquant.layers import traffic
from mlxquant.layers.blocks import held_bytes
from mlxquant.layers.prompt_step import PROMPT_STEP
from mlxquant.machine import chips, identity, system
from mlxquant.model.loading import LanguageModel, load
from mlxquant.report.fit import Fit, fit
from mlxquant.runtime import probe
from mlxquant.runtime.prompt_cache import cut, offset

_WARM_UP = 8  # tokens, of those generated


@dataclass(frozen=True)
class Test:
    """``tokens`` processed at once (``kind`` "pp") or generated ("tg") after ``depth``, in
    ``batch`` sequences. Raises ``BadValue``."""

    kind: str
    tokens: int
    depth: int = 0
    batch: int = 1

    def __post_init__(self) -> None:
        for name, least in (("tokens", 1), ("depth", 0), ("batch", 1)):
            checks.integer(name, getattr(self, name), least)

    @property
    def name(self) -> str:
        depth = f" @ d{self.depth}" if self.depth else ""
        return f"{self.kind}{self.tokens}{depth}" + (f" b{self.batch}" if self.batch > 1 else "")


@dataclass(frozen=True, kw_only=True)
class Record:
    """The result of one test of one model. Values that are not known are None.

    Rates count the tokens of all sequences; bytes are those of weights, scales and keys and values
    that a token reads (a share, in a batch). ``ttft_ms`` is the time to the first token after the
    prompt; for tg the prompt is the depth. ``active_parameters`` are those that a token of a
    mixture uses. The fields from ``fixed_ms_per_token`` to ``fit_over`` hold a fit of the time per
    token over several records (``fit.py``).
    """

    model: str
    test: str
    depth: int
    batch: int
    tps_mean: float
    tps_stdev: float | None
    ttft_ms: float | None
    bytes_per_token: float
    operations_per_byte: float
    gb_per_s: float
    headline_gb_per_s: float | None
    probe_gb_per_s: float
    percent_of_headline: float | None
    percent_of_probe: float
    fixed_ms_per_token: float | None = None
    marginal_gb_per_s: float | None = None
    fit_residual_ms: float | None = None
    fit_over: str | None = None
    parameters: int
    active_parameters: int | None = None
    weight_gb: float
    peak_memory_gb: float
    chip: str
    gpu_cores: int | None
    mlx: str
    mlx_lm: str
    device: str
    repetitions: int
    machine: dict[str, Any]
    power: dict[str, Any]


def bench(models: Sequence[str | PathLike[str] | Callable[[], LanguageModel]], *, prompt: int = 512,
          generated: int = 128, depths: Sequence[int] = (0,), batches: Sequence[int] = (1,),
          repetitions: int = 5, memory: str | None = None,
          on_record: Callable[[list[Record]], None] = lambda _: None,
          progress: Callable[[int, int, float], None] = lambda *_: None) -> list[Record]:
    """Measure prompt and generation (none of 0 tokens) for every model, batch and depth.

    A model is a name for ``load`` (with ``memory``), or a function that opens one. ``on_record``
    gets all records so far after each, ``progress`` tests done, of how many, and the last
    tokens/s. Raises ``BadValue`` for what is not allowed, and what ``load`` raises.
    """
    checks.several("models", models)
    tests = [Test(kind, tokens, depth, batch) for batch in batches for depth in depths
             for kind, tokens in (("pp", prompt), ("tg", generated)) if tokens]
    if not tests or repetitions < 1:
        raise BadValue("at least one test and one repetition are needed")
    probe.measured()
    records: list[Record] = []
    for entry in models:
        model = entry() if callable(entry) else load(entry, memory=memory)
        for test in tests:
            newest = _measure(model, test, repetitions)
            records = [*map(_beside_ceiling, records), newest]
            on_record(with_fit(records))
            progress(len(records), len(tests) * len(models), records[-1].tps_mean)
        del model
        mx.clear_cache()
    return with_fit(records)


def with_fit(records: list[Record]) -> list[Record]:
    """The records with the split of a token's time: over models where three were measured at one
    depth, else over the depths of each; None where neither can be fitted."""
    result = list(records)
    single = [i for i, r in enumerate(records) if r.test.startswith("tg") and r.batch == 1]
    for over, key in (("depths", "model"), ("models", "depth")):
        for value in {getattr(records[i], key) for i in single}:
            chosen = [i for i in single if getattr(records[i], key) == value]
            if found := fit_of([records[i] for i in chosen]):
                for i, residual in zip(chosen, found.residuals_ms):
                    result[i] = replace(
                        records[i], fixed_ms_per_token=found.fixed_ms, fit_over=over,
                        marginal_gb_per_s=found.gb_per_s, fit_residual_ms=residual)
    return result


def fit_of(records: list[Record]) -> Fit | None:
    """The split over records of one token a step."""
    return fit([r.bytes_per_token for r in records], [1e3 / r.tps_mean for r in records])


def _measure(model: LanguageModel, test: Test, repetitions: int) -> Record:
    mx.random.seed(0)
    mx.reset_peak_memory()
    runner = _Runner(model, test)
    with wired_limit(model.network, [generation_stream]):
        times = list(runner.times(repetitions))
    peak, rates = mx.get_peak_memory() / 1e9, [test.tokens * test.batch / s for s in times]
    mean, moved = statistics.mean(rates), runner.bytes_per_token()
    rate, network, state = mean * moved / 1e9, model.network, identity.machine()
    percent, ceiling = probe.percent_of_ceiling(rate)
    headline = chips.detect().headline_gb_per_s if state["device"] == "gpu" else None
    return Record(
        model=model.name, test=test.name, depth=test.depth, batch=test.batch, tps_mean=mean,
        tps_stdev=statistics.stdev(rates) if len(rates) > 1 else None,
        ttft_ms=1e3 * (statistics.mean(times) if test.kind == "pp" else runner.depth_s) or None,
        bytes_per_token=moved, operations_per_byte=runner.operations_per_token() / moved,
        gb_per_s=rate, headline_gb_per_s=headline, probe_gb_per_s=ceiling.gb_per_s,
        percent_of_headline=100 * rate / headline if headline else None,
        percent_of_probe=percent, parameters=traffic.parameters(network),
        active_parameters=traffic.active_parameters(network), weight_gb=held_bytes(network) / 1e9,
        peak_memory_gb=peak, repetitions=repetitions, machine=state, power=system.power_state(),
        **{key: state[key] for key in ("chip", "gpu_cores", "mlx", "mlx_lm", "device")})


def _beside_ceiling(record: Record) -> Record:
    """The record with the ceiling that is known now: a later test may have raised it."""
    percent, ceiling = probe.percent_of_ceiling(record.gb_per_s)
    return replace(record, probe_gb_per_s=ceiling.gb_per_s, percent_of_probe=percent)


class _Runner:
    """Runs one test over and over on one cache, cut back to the depth in between."""

    def __init__(self, model: LanguageModel, test: Test):
        self.model, self.test = model, test
        self.network = model.network if test.batch == 1 else _Batched(model, test.batch)
        self.cache: list[Any] = []
        self.kv = self.depth_s = 0.0

    def times(self, repetitions: int) -> Iterator[float]:
        """Seconds of each repetition, after a warm-up."""
        tokens, prompt = self.test.tokens, self.test.kind == "pp"
        for run in range(repetitions + 1):
            self._to_depth()
            before = traffic.kv_bytes(self.cache)
            asked = (tokens, 0) if prompt else (1, tokens if run else min(tokens, _WARM_UP))
            seconds = self._timed(*asked)
            self.kv = (before + traffic.kv_bytes(self.cache)) / 2
            if run:
                yield seconds

    def _to_depth(self) -> None:
        surplus = offset(self.cache) - self.test.depth
        if surplus > 0 and cut(self.cache, surplus):
            return
        self.cache = make_prompt_cache(self.model.network)
        if self.test.depth:
            self.depth_s = self._timed(self.test.depth, 0)

    def _timed(self, prompt: int, generated: int) -> float:
        """Seconds until the last of ``generated`` tokens, or for 0 the first, follows a random
        prompt."""
        tokens = mx.random.randint(0, self.model.vocabulary, (prompt,))
        steps = generate_step(tokens, self.network, max_tokens=generated, prompt_cache=self.cache,
                              prefill_step_size=PROMPT_STEP)
        start = time.perf_counter()
        for _ in range(generated or 1):
            next(steps, None)  # of 0 nothing comes, but the first token is computed
        seconds = time.perf_counter() - start
        for _ in steps:  # the step after the last one is under way
            pass
        mx.synchronize()
        return seconds

    def bytes_per_token(self) -> float:
        """For generation: weights, shared by the batch, and keys and values. For a prompt: all but
        the head once for each chunk, and everything once more for the last token, which mlx-lm
        processes separately."""
        network, test, head = self.model.network, self.test, traffic.head_of(self.model.network)
        last = traffic.weight_bytes(network, batch=test.batch) + self.kv
        if test.kind == "tg":
            return last / test.batch
        together = min(test.tokens, PROMPT_STEP) * test.batch
        chunk = traffic.weight_bytes(network, batch=together) + self.kv
        chunk -= traffic.own_bytes(head) if head else 0
        chunks = math.ceil((test.tokens - 1) / PROMPT_STEP)
        return (chunks * chunk + last) / test.tokens / test.batch

    def operations_per_token(self) -> float:
        """With weights, and with the keys and values that a token attends to on average."""
        network, config, test = self.model.network, self.model.config, self.test
        text = config.get("text_config") or config
        heads = text.get("num_attention_heads", 1)
        shared = heads / (text.get("num_key_value_heads") or heads)
        attention = 2 * shared * self.kv / (4 if system.device() == "cpu" else 2) / test.batch
        head = traffic.head_of(network) if test.kind == "pp" else None
        spared = 2 * traffic.weight_count(head) * (1 - 1 / test.tokens) if head else 0
        together = (test.tokens if test.kind == "pp" else 1) * test.batch
        return traffic.operations_per_token(network, together) - spared + attention


class _Batched:
    """Runs a network on several sequences, of which ``generate_step`` sees only the first. The
    others are the same tokens shifted, so that a mixture chooses other experts for them."""

    def __init__(self, model: LanguageModel, batch: int):
        self.model = model
        self.shifts = mx.arange(batch)[:, None] * (model.vocabulary // batch)

    def __call__(self, tokens: mx.array, cache: list[Any]) -> mx.array:
        return self.model.network((tokens + self.shifts) % self.model.vocabulary, cache=cache)[:1]
