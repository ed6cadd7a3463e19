"""Start the server, and end it together with the thread that computes."""

import errno
import socket
from collections.abc import Callable

import mlx.core as mx
import uvicorn

from mlxquant.base.errors import MlxquantError
from mlxquant.model.loading import LanguageModel
from mlxquant.runtime.prompt_cache import PromptCache
from mlxquant.server.app import make_app
from mlxquant.server.engine import Engine
from mlxquant.server.forms import Options


def serve(model: LanguageModel, options: Options | None = None,
          ready: Callable[[str], None] | None = None) -> None:
    """Answer requests until Ctrl-C; ``ready`` is told the address once it can be called.

    On several machines the first one listens, and all others compute with it. Raises
    ``MlxquantError`` where the address cannot be taken or computing has failed for good, and
    what ``Loop.check`` does.
    """
    options = options or Options()
    options.loop.check(model, PromptCache())
    if mx.distributed.init().rank() > 0:
        engine = Engine(model, options)
        engine.run()
    else:
        with listen(options) as listener:
            engine, server = make_server(model, options)
            engine.start()
            try:
                if ready is not None:
                    ready(address_of(options.host, listener))
                server.run(sockets=[listener])
            except KeyboardInterrupt:
                pass
            finally:
                engine.stop()
    if (error := engine.error) is not None:
        raise MlxquantError(
            f"computing has failed for good: {type(error).__name__}: {error}") from error


def make_server(model: LanguageModel, options: Options) -> "tuple[Engine, _Server]":
    """The computing thread and the HTTP server, each of which ends when the other does."""
    engine = Engine(model, options, lambda: setattr(server, "should_exit", True))
    server = _Server(uvicorn.Config(
        make_app(model, options, engine), http="h11", ws="none", loop="asyncio", lifespan="off",
        log_config=None, access_log=False, proxy_headers=False, server_header=False,
        timeout_graceful_shutdown=5), engine)
    return engine, server


def address_of(host: str, listener: socket.socket) -> str:
    """Where clients find a server."""
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{listener.getsockname()[1]}/v1"


class _Server(uvicorn.Server):
    """Ends the replies under way before it waits for their connections."""

    def __init__(self, config: uvicorn.Config, engine: Engine):
        super().__init__(config)
        self._engine = engine

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._engine.stop()
        await super().shutdown(sockets)


def listen(options: Options) -> socket.socket:
    try:
        found = socket.getaddrinfo(
            options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = min(found, key=lambda place: place[0] != socket.AF_INET)
        both = options.host == "::" and socket.has_dualstack_ipv6()
        return socket.create_server(address[:2], family=family, dualstack_ipv6=both, backlog=128)
    except (OSError, UnicodeError) as error:
        reason = "the port is taken" if getattr(error, "errno", 0) == errno.EADDRINUSE else error
        raise MlxquantError(f"cannot listen on {options.host}:{options.port}: {reason}") from error
