"""The HTTP side: which requests are let in, how bodies are read and answers sent."""

import asyncio
import ipaddress
import json
import sys
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlxquant.base.errors import MlxquantError
from mlxquant.model.loading import LanguageModel
from mlxquant.runtime.prompt import Request
from mlxquant.runtime.reply import Chunk, joined
from mlxquant.server import answers, forms
from mlxquant.server.engine import Engine, ServedReply, Told
from mlxquant.server.forms import Options

_BODY_SECONDS = 60.0
_CLIENT_GONE = 499  # as nginx has it; nobody reads it


def make_app(model: LanguageModel, options: Options, engine: Engine) -> ASGIApp:
    """The application, behind its limits on hosts and origins."""
    service = _Service(model, options, engine)
    chat, text = partial(service.answer, forms.ChatForm), partial(service.answer, forms.TextForm)
    app: ASGIApp = Starlette(
        routes=[Route("/health", service.health), Route("/v1/models", service.models),
                Route("/v1/models/{name:path}", service.models),
                Route("/v1/completions", text, methods=["POST"]),
                Route("/v1/chat/completions", chat, methods=["POST"]),
                Route("/chat/completions", chat, methods=["POST"])],
        exception_handlers=dict.fromkeys((HTTPException, MlxquantError, Exception), _failed))
    app = CORSMiddleware(app, allow_origins=options.origins, allow_methods=["*"],
                         allow_headers=["*"])
    return Boundary(app, options)


class Boundary:
    """Refuses requests by their Host and Origin headers.

    A server on a loopback address accepts only loopback names as Host: otherwise a web page whose
    own name resolves to 127.0.0.1 could read its answers. Pages of origins that are not allowed
    cannot read answers; they may not POST either, so that they cannot make the model compute.
    """

    def __init__(self, app: ASGIApp, options: Options):
        self._app, self._origins, self._verbose = app, options.origins, options.verbose
        local = options.host == "localhost" or _is_loopback(options.host)
        self._hosts = {"localhost", "127.0.0.1", "::1", options.host.lower()} if local else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)

        async def watched(message: Message) -> None:
            if self._verbose and message["type"] == "http.response.start":
                path = ascii(scope["raw_path"].decode("latin-1"))[1:-1]
                print(f"{(scope.get('client') or '?')[0]} {scope['method']} {path} "
                      f"{message['status']}", file=sys.stderr, flush=True)
            await send(message)

        host, origin = _without_port(headers.get("host", "")), headers.get("origin")
        app = self._app
        if self._hosts is not None and host and host not in self._hosts:
            app = _error(403, "this server answers only to names of its own machine; "
                              "--host 0.0.0.0 lets others in")
        elif scope["method"] == "POST" and origin is not None and not (
                {"*", origin} & set(self._origins)):
            app = _error(403, "pages of this origin may not call the server; --origin allows one")
        await app(scope, receive, watched)


class _Service:
    """The endpoints."""

    def __init__(self, model: LanguageModel, options: Options, engine: Engine):
        self._model, self._options, self._engine = model, options, engine
        self._created = int(time.time())
        # One at a time: a tokenizer is not made for several threads.
        self._tokenizing = ThreadPoolExecutor(1)

    async def health(self, request: HttpRequest) -> Response:
        healthy = self._engine.healthy
        return JSONResponse({"status": "ok" if healthy else "unavailable"},
                            200 if healthy else 503)

    async def models(self, request: HttpRequest) -> Response:
        model = {"id": self._model.name, "object": "model", "created": self._created,
                 "owned_by": "mlxquant"}
        name = request.path_params.get("name")
        if name is None:
            return JSONResponse({"object": "list", "data": [model]})
        if name != self._model.name:
            raise HTTPException(404, f"there is no model of this name, only {self._model.name}")
        return JSONResponse(model)

    async def answer(self, kind: type[forms.AnyForm], request: HttpRequest) -> Response:
        """A completion of either kind, whole or as a stream."""
        form = forms.read(kind, await _body(request))
        wanted = await asyncio.get_running_loop().run_in_executor(
            self._tokenizing, form.requests, self._model, self._options)
        if not self._engine.healthy:
            raise HTTPException(503, "the server is stopping")
        if form.stream:
            return _Stream(self._streamed(form, wanted))
        work = asyncio.create_task(self._whole(form, wanted))
        watch = asyncio.create_task(_disconnected(request))
        watch.add_done_callback(lambda _: work.cancel())
        try:
            return await work
        except asyncio.CancelledError:
            return Response(status_code=_CLIENT_GONE)
        finally:
            watch.cancel()

    async def _whole(self, form: forms.AnyForm, wanted: Sequence[Request]) -> Response:
        jobs: list[ServedReply] = []
        chunks: list[list[Chunk]] = [[] for _ in wanted]
        async with aclosing(self._told(wanted, jobs)) as told:
            async for index, event in told:
                if isinstance(event, Chunk):
                    chunks[index].append(event)
        choices = [answers.Choice(i, form, self._model).take(joined(reply), "message")
                   for i, reply in enumerate(chunks)]
        return JSONResponse(
            {**answers.head(form, self._model), "choices": choices, "usage": answers.usage(jobs)})

    async def _streamed(self, form: forms.AnyForm,
                        wanted: Sequence[Request]) -> AsyncGenerator[str]:
        jobs: list[ServedReply] = []
        choices = [answers.Choice(i, form, self._model) for i in range(len(wanted))]
        head = answers.head(form, self._model)
        try:
            async with aclosing(self._told(wanted, jobs)) as told:
                async for index, event in told:
                    if not isinstance(event, Chunk):  # so that a long prompt is no lost connection
                        yield f": keepalive {event[0]}/{event[1]}\n\n"
                    elif made := choices[index].take(event):
                        yield _event({**head, "choices": [made]})
        except HTTPException as failure:
            yield _event(_refusal(failure.status_code, failure.detail))
            return
        if form.stream_options.include_usage:
            yield _event({**head, "choices": [], "usage": answers.usage(jobs)})
        yield "data: [DONE]\n\n"

    async def _told(self, wanted: Sequence[Request], jobs: list[ServedReply]
                    ) -> AsyncGenerator[tuple[int, Chunk | tuple[int, int]]]:
        """(index of a request, chunk or prompt progress), until all are answered or the caller
        stops; raises ``HTTPException`` with status 500 where one fails. Puts the jobs, which count
        the tokens, into ``jobs``."""
        loop, events = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Told]]()

        def tell(index: int, told: Told) -> None:
            with suppress(RuntimeError):  # the event loop has ended, so nobody waits
                loop.call_soon_threadsafe(events.put_nowait, (index, told))

        jobs += [ServedReply(request, partial(tell, i)) for i, request in enumerate(wanted)]
        try:
            for job in jobs:
                self._engine.submit(job)
            running = len(jobs)
            while running:
                index, told = await events.get()
                if isinstance(told, MlxquantError):
                    raise HTTPException(500, str(told))
                yield index, told
                running -= isinstance(told, Chunk) and told.finish_reason is not None
        finally:
            for job in jobs:
                job.gone = True


class _Stream(StreamingResponse):
    """Ends what it streams when its client leaves, not when Python next collects garbage."""

    def __init__(self, events: AsyncGenerator[str]):
        super().__init__(events, media_type="text/event-stream",
                         headers={"Cache-Control": "no-cache"})
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events):
            await super().__call__(scope, receive, send)


async def _body(request: HttpRequest) -> bytes:
    """The body, within its limits of size and time."""
    length = request.headers.get("content-length", "0")
    if not (length.isascii() and length.isdigit()):
        raise HTTPException(400, "Content-Length must be a number of digits")
    if len(length) > 20 or int(length) > forms.BODY_LIMIT:
        raise HTTPException(413, f"the body has {length[:20]} bytes, "
                                 f"allowed are {forms.BODY_LIMIT}")
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for piece in request.stream():
                body += piece
                if len(body) > forms.BODY_LIMIT:
                    raise HTTPException(413, f"the body has more than {forms.BODY_LIMIT} bytes")
    except TimeoutError as error:
        raise HTTPException(408, f"the body did not come in {_BODY_SECONDS:g} s") from error
    return bytes(body)


async def _disconnected(request: HttpRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _without_port(host: str) -> str:
    """The name in a Host header; an IPv6 address stands in brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower()


def _event(value: dict[str, Any]) -> str:
    # In ASCII: some readers cut lines at U+2028.
    return f"data: {json.dumps(value, allow_nan=False)}\n\n"


def _refusal(status: int, reason: str) -> dict[str, Any]:
    """What went wrong as OpenAI's clients read it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": reason, "type": kind, "param": None, "code": None}}


def _error(status: int, reason: str, headers: Mapping[str, str] | None = None) -> Response:
    return JSONResponse(_refusal(status, reason), status, headers)


async def _failed(request: HttpRequest, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        return _error(error.status_code, error.detail, error.headers)
    if isinstance(error, MlxquantError):
        return _error(400, str(error))
    return _error(500, f"the server failed over this request: {type(error).__name__}")
