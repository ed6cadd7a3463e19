"""An OpenAI-compatible server: mlx-lm's own, with our loaded model in it.

mlx-lm brings the protocol, batching of concurrent requests and prompt caches. What is
bounded here: one model, whatever name a request gives; bodies of a limited size; no
addresses fetched for a request; no web page of another origin unless allowed.
"""

import json
import threading
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from http.server import ThreadingHTTPServer
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import LRUPromptCache, make_prompt_cache
from mlx_lm.server import (
    APIHandler,
    ModelProvider,
    ResponseGenerator,
    _image_parts,
    get_system_fingerprint,
)

from mlxquant.base.errors import BadValue, MlxquantError
from mlxquant.model.loading import LanguageModel
from mlxquant.layers.outline import KV_GROUP
from mlxquant.runtime.sampling import Sampling
from mlxquant.runtime.speculation import DRAFT_TOKENS

BODY_LIMIT = 16 << 20  # bytes


@dataclass(frozen=True)
class Options:
    """What a server does where a request does not say.

    ``origins`` are those of web pages that may call it. Raises ``BadValue`` outside the ranges.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    max_tokens: int = 1024
    sampling: Sampling = field(default_factory=Sampling)
    kv_bits: int | None = None
    draft: LanguageModel | None = None
    origins: tuple[str, ...] = ()
    prompt_caches: int = 10
    verbose: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise BadValue(f"port is {self.port}, allowed are 0 (any free one) to 65535")
        if self.max_tokens < 1:
            raise BadValue(f"max_tokens is {self.max_tokens}, at least 1 is needed")
        if self.draft is not None and self.kv_bits is not None:
            raise BadValue("kv_bits and a draft model exclude each other; give one")


def serve(model: LanguageModel, options: Options = Options(), ready: Callable[[str], None] | None = None) -> None:
    """Answer requests until Ctrl-C; ``ready`` is told the address once it can be called.

    Raises ``MlxquantError`` where the address cannot be taken. On several machines the
    first one listens, and all others compute with it.
    """
    provider = _Provider(model, options)
    first = mx.distributed.init().rank() == 0
    httpd = _listen(options) if first else None
    generator = _Generator(provider, LRUPromptCache(options.prompt_caches))
    if httpd is None:
        generator.join()
        return
    httpd.RequestHandlerClass = partial(_Handler, model, options.verbose, generator,
                                        system_fingerprint=get_system_fingerprint())
    try:
        if ready is not None:
            ready(f"http://{options.host}:{httpd.server_address[1]}/v1")
        httpd.serve_forever(poll_interval=0.1)
    except KeyboardInterrupt:
        pass
    finally:
        httpd.server_close()
        generator.stop_and_join()


def _listen(options: Options) -> ThreadingHTTPServer:
    try:
        return ThreadingHTTPServer((options.host, options.port), APIHandler)
    except (OSError, OverflowError) as error:
        raise MlxquantError(f"cannot listen on {options.host}:{options.port}: {error}") from error


class _Provider(ModelProvider):
    """Has one model, and gives it for every name."""

    def __init__(self, model: LanguageModel, options: Options):
        super().__init__(_arguments(model, options))
        self.model_key: tuple[str, None, str | None] | None = None
        self._model, self._draft = model, options.draft
        self._lock = threading.Lock()

    def load(self, model_path: str, adapter_path: Any = None, draft_model_path: Any = None) -> tuple[Any, Any]:
        if adapter_path is not None:
            raise ValueError("adapters are not supported")
        with self._lock:
            if self.model_key is None:
                self.model_key = (self._model.name, None, self._draft.name if self._draft else None)
                self.model, self.tokenizer = self._model.network, self._model.tokenizer
                self.draft_model = self._draft.network if self._draft else None
                self.is_batchable = self._draft is None and all(
                    hasattr(layer, "merge") for layer in make_prompt_cache(self.model))
        return self.model, self.tokenizer


class _Generator(ResponseGenerator):
    """mlx-lm's, whose thread clears up behind itself: MLX else aborts the process at its end."""

    def _run_generate(self) -> None:
        try:
            super()._run_generate()
        finally:
            mx.clear_streams()


class _Handler(APIHandler):
    """mlx-lm's, with limits on what a request may ask for."""

    max_tokens: int

    def __init__(self, model: LanguageModel, verbose: bool, *args: Any, **kwargs: Any):
        self._served, self._verbose = model, verbose
        super().__init__(*args, **kwargs)

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if length.isdigit() and int(length) > BODY_LIMIT:
            self._refuse(413, f"the body has {length} bytes, allowed are {BODY_LIMIT}")
            return
        super().do_POST()

    def validate_model_parameters(self) -> None:
        """mlx-lm's checks, and a reply no longer than the context."""
        super().validate_model_parameters()
        context = self._served.context_length
        if context is not None:
            self.max_tokens = min(self.max_tokens, context)

    def handle_chat_completions(self) -> Any:
        messages = self.body.get("messages")
        if not isinstance(messages, list) or not all(isinstance(m, dict) and "role" in m for m in messages):
            raise ValueError("messages must be a list of objects with role and content")
        if any(True for _ in _image_parts(messages)):
            raise ValueError("images are not supported")
        return super().handle_chat_completions()

    def handle_models_request(self) -> None:
        """The one model there is; mlx-lm lists all that lie in the hub's cache."""
        self._set_completion_headers(200)
        self.end_headers()
        model = {"id": self._served.name, "object": "model", "created": self.created, "owned_by": "mlxquant"}
        self.wfile.write(json.dumps({"object": "list", "data": [model]}).encode())

    def log_message(self, format: str, *args: Any) -> None:
        if self._verbose:
            super().log_message(format, *args)

    def _refuse(self, status: int, reason: str) -> None:
        self._set_completion_headers(status)
        self.end_headers()
        self.wfile.write(json.dumps({"error": reason}).encode())
        self.close_connection = True


def _arguments(model: LanguageModel, options: Options) -> Namespace:
    """What mlx-lm's server reads of its own command line."""
    sampling = options.sampling
    return Namespace(
        model=model.name, adapter_path=None, draft_model=options.draft and options.draft.name,
        num_draft_tokens=DRAFT_TOKENS, trust_remote_code=False, chat_template="", use_default_chat_template=False,
        chat_template_args={}, temp=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k,
        min_p=sampling.min_p, max_tokens=options.max_tokens, decode_concurrency=32, prompt_concurrency=8,
        prefill_step_size=2048, prompt_cache_size=options.prompt_caches, prompt_cache_bytes=None,
        kv_bits=options.kv_bits, kv_group_size=KV_GROUP, quantized_kv_start=0, pipeline=False,
        allowed_origins=list(options.origins))
