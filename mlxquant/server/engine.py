"""The thread that computes replies: in one batch where that is possible, else one by one."""

import pickle
import queue
import threading
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generation_stream

from mlxquant.base.errors import MlxquantError
from mlxquant.base.threads import close_streams_at_end
from mlxquant.model.loading import LanguageModel
from mlxquant.runtime.batch import Batch, batchable
from mlxquant.runtime.generation import answer
from mlxquant.runtime.loop import Loop
from mlxquant.runtime.prompt import Request
from mlxquant.runtime.prompt_cache import PromptCache, PromptCaches
from mlxquant.runtime.reply import Chunk
from mlxquant.server.forms import Options

_POLL = 0.1  # seconds between words to other machines
Told = Chunk | tuple[int, int] | MlxquantError  # a piece, prompt tokens read, or a failure


@dataclass(eq=False)
class ServedReply:
    """A reply that somebody waits for.

    ``tell`` is called in the computing thread. ``gone`` is set when the client no longer waits.
    ``usage`` is complete when the last piece is told: tokens of the prompt, those of them that were
    cached, and tokens generated. ``number`` is the same on every machine.
    """

    request: Request
    tell: Callable[[Told], None]
    gone: bool = False
    usage: tuple[int, int, int] = (0, 0, 0)
    number: int = 0


@dataclass
class _News:
    """What came since the last turn, the same for every machine; ``gone`` are jobs' numbers."""

    requests: dict[int, Request] = field(default_factory=dict)
    gone: list[int] = field(default_factory=list)
    stop: bool = False


class Engine(threading.Thread):
    """Answers jobs until it is stopped; a failure in one reply is told to its job alone.

    Under ``mlx.launch`` every machine runs one, and all follow the first. ``ended`` is called
    as the thread ends; ``error`` is then the exception that ended it, None after ``stop``.
    """

    def __init__(self, model: LanguageModel, options: Options,
                 ended: Callable[[], None] = lambda: None):
        super().__init__(name="generation")
        self.error: Exception | None = None
        self._model, self._ended = model, ended
        self._loop = options.loop
        self._caches = PromptCaches(options.prompt_caches)
        self._side_by_side = options.loop == Loop() and batchable(model)
        self._batch = Batch(model, keep=self._caches.keep)
        self._inbox: queue.SimpleQueue[ServedReply | None] = queue.SimpleQueue()
        self._jobs: dict[int, ServedReply] = {}
        self._waiting: deque[ServedReply] = deque()
        self._rows: dict[int, ServedReply] = {}  # by their number in the batch
        self._count, self._stopping = 0, False
        self._group = mx.distributed.init()

    @property
    def healthy(self) -> bool:
        return self.is_alive() and not self._stopping

    def submit(self, job: ServedReply) -> None:
        """Have ``job`` answered; its ``tell`` hears a failure where the thread has ended."""
        self._inbox.put(job)
        if not self.is_alive():
            self._refuse_all()

    def stop(self) -> None:
        """End the thread after its present step, and wait for it."""
        self._stopping = True
        self._inbox.put(None)
        if self.is_alive():
            self.join()

    def run(self) -> None:
        """Answer jobs until stopped: the thread's body, called directly on following machines."""
        close_streams_at_end()
        try:
            with mx.stream(generation_stream):
                while self._turn():
                    pass
        except Exception as error:
            traceback.print_exception(error)  # it is a fault of ours
            self.error = error
        finally:
            self._refuse_all()
            self._batch.close()
            del self._batch, self._caches
            self._ended()

    def _turn(self) -> bool:
        news = self._shared(self._collect() if self._group.rank() == 0 else _News())
        for number, request in news.requests.items():
            self._waiting.append(self._jobs.setdefault(
                number, ServedReply(request, lambda told: None, number=number)))
        for number in news.gone:
            self._drop(number)
        if news.stop:
            return False
        self._begin()
        if self._rows:
            self._advance()
        return True

    def _collect(self) -> _News:
        """What clients have sent; waits for it where there is nothing else to do."""
        news = _News()
        timeout = 0 if self._jobs else _POLL if self._group.size() > 1 else None
        with suppress(queue.Empty):
            while True:
                job = self._inbox.get(timeout=timeout)
                timeout = 0
                if job is not None:
                    job.number = self._count = self._count + 1
                    self._jobs[job.number], news.requests[job.number] = job, job.request
        news.gone = [number for number, job in self._jobs.items() if job.gone]
        news.stop = self._stopping
        return news

    def _shared(self, news: _News) -> _News:
        """The first machine's news, on every machine."""
        if self._group.size() == 1:
            return news
        first = self._group.rank() == 0
        data = pickle.dumps(news) if first else b""
        size = mx.distributed.all_sum(mx.array(len(data))).item()
        own = mx.array(np.frombuffer(data, np.uint8)) if first else mx.zeros(size, mx.uint8)
        return pickle.loads(bytes(np.array(mx.distributed.all_sum(own))))

    def _begin(self) -> None:
        """Begin what waits, in the order it came: one that must be alone waits for the others."""
        while self._waiting:
            request = self._waiting[0].request
            # A seed sets MLX's one random state, so its reply shares no pass with others.
            drawn = request.sampling.seed is not None and request.sampling.temperature > 0
            alone = drawn or not self._side_by_side
            if alone and self._rows:
                return
            job = self._waiting.popleft()
            try:
                cache = self._caches.nearest(request.prompt)
                if alone:
                    self._answer_alone(job, cache)
                else:
                    self._rows[self._batch.add(request, cache)] = job
                    job.usage = (len(request.prompt), len(cache.tokens), 0)
            except Exception as error:
                self._end(job, error)

    def _answer_alone(self, job: ServedReply, cache: PromptCache) -> None:
        def unwanted() -> bool:  # several machines go on together, to the end
            return self._group.size() == 1 and (job.gone or self._stopping)

        def progress(done: int, total: int) -> None:
            if unwanted():
                raise MlxquantError("nobody waits for this reply")
            job.tell((done, total))

        chunks = answer(self._model, job.request, cache, self._loop, progress)
        for chunk in chunks:
            if unwanted():
                break
            if made := chunk.report:
                job.usage = (made.prompt_tokens + made.cached_tokens, made.cached_tokens,
                             made.generation_tokens)
            job.tell(chunk)
        chunks.close()
        self._caches.keep(cache)
        if not self._stopping:  # else it is told so with all others
            del self._jobs[job.number]

    def _advance(self) -> None:
        try:
            events = self._batch.step()
        except Exception as error:
            self._end_rows(error)
            return
        for event in events:
            job = self._rows[event.row]
            if event.error is not None:
                self._end(self._rows.pop(event.row), event.error)
            elif event.cache is not None:
                job.usage = (*job.usage[:2], event.tokens)
                self._caches.keep(event.cache)
                del self._rows[event.row], self._jobs[job.number]
            if told := event.chunk or event.progress:
                job.tell(told)

    def _drop(self, number: int) -> None:
        """Compute no more of a reply that nobody waits for."""
        job = self._jobs.pop(number, None)
        self._waiting = deque(other for other in self._waiting if other is not job)
        for row in [row for row, other in self._rows.items() if other is job]:
            del self._rows[row]
            try:
                self._batch.remove(row)
            except Exception as error:
                self._end_rows(error)

    def _end_rows(self, error: Exception) -> None:
        """Fail all replies of the batch whose pass failed, and begin a new batch."""
        for job in self._rows.values():
            self._end(job, error)
        self._rows.clear()
        self._batch.close()
        self._batch = Batch(self._model, keep=self._caches.keep)

    def _end(self, job: ServedReply, error: Exception) -> None:
        if not isinstance(error, MlxquantError):
            traceback.print_exception(error)
            error = MlxquantError(
                f"generation failed: {type(error).__name__}: {str(error).strip()[:300]}")
        del self._jobs[job.number]
        job.tell(error)

    def _refuse_all(self) -> None:
        error = MlxquantError("the server is stopping" if self.error is None else
                              f"the server has failed: {type(self.error).__name__}: {self.error}")
        with suppress(queue.Empty):
            while True:
                if job := self._inbox.get_nowait():
                    job.tell(error)
        with suppress(KeyError):  # the last one has gone
            while True:
                self._jobs.popitem()[1].tell(error)
