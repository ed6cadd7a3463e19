"""Verbs that answer: chat, generate and serve."""

import sys
from typing import TYPE_CHECKING, Annotated

from typer import Context, Option

from mlxquant.base.errors import BadValue
from mlxquant.base.text import clean, require_unicode
from mlxquant.cli import options as option
from mlxquant.cli.common import app, load_model, print_json, refuse, remark

if TYPE_CHECKING:
    from mlxquant.model.loading import LanguageModel


@app.command(epilog="Example: mlxquant chat smollm2-135m --system 'Answer briefly.'")
def chat(
    model: option.DefaultModel = "", system: option.System = None,
    max_tokens: option.MaxTokens = 1024, temp: option.Temperature = 0.7,
    top_p: option.TopP = 0.95, top_k: option.TopK = 0, min_p: option.MinP = 0.0,
    repetition_penalty: option.Penalty = 1.0, seed: option.Seed = None,
    kv_bits: option.KvBits = None, draft: option.Draft = None, lookup: option.Lookup = 0,
    revision: option.Revision = None, memory: option.Memory = None,
    trust_remote_code: option.Trust = False,
) -> None:
    """Talk with a model; /help lists the commands."""
    from mlxquant.chat.conversation import Conversation
    from mlxquant.chat.repl import run
    from mlxquant.chat.session import Session
    from mlxquant.runtime.loop import Loop
    from mlxquant.runtime.sampling import Sampling
    from mlxquant.sources.names import DEFAULT_MODEL, resolve

    first = model or DEFAULT_MODEL

    def of(name: str) -> str | None:
        return revision if name == first else None

    def load(name: str) -> "LanguageModel":
        return load_model(name, of(name), memory, trust_remote_code)

    sampling = Sampling(temp, top_p, top_k, min_p, repetition_penalty, seed)
    loaded = load(first)
    loop = Loop(kv_bits, _load_draft(draft, memory, trust_remote_code), lookup=lookup)
    talk = Conversation(loaded, system, sampling, max_tokens, loop)
    loop.check(loaded, talk.cache)
    remark(f"{loaded.name}: /help lists the commands, Ctrl-D leaves")
    run(Session(talk, load, lambda name: resolve(name, revision=of(name))))


@app.command(epilog='Example: mlxquant generate smollm2-135m -p "What is gravity?"')
def generate(
    ctx: Context, model: option.Model,
    prompt: Annotated[str | None, Option("-p", "--prompt", help="Default: stdin.")] = None,
    system: option.System = None,
    raw: Annotated[bool, Option("--raw", help="Continue the text, no chat template.")] = False,
    max_tokens: option.MaxTokens = 256, temp: option.Temperature = 0.0, top_p: option.TopP = 1.0,
    top_k: option.TopK = 0, min_p: option.MinP = 0.0, repetition_penalty: option.Penalty = 1.0,
    seed: option.Seed = None,
    stop: Annotated[list[str] | None, Option(help="End at this text; repeatable.")] = None,
    kv_bits: option.KvBits = None, draft: option.Draft = None,
    draft_tokens: option.DraftTokens = 4, lookup: option.Lookup = 0,
    revision: option.Revision = None, memory: option.Memory = None,
    trust_remote_code: option.Trust = False, as_json: option.AsJson = False,
) -> None:
    """Answer one prompt, streaming, with a report of the speed.

    A file or pipe gets the answer as it is; a terminal gets it without control characters.
    """
    from mlxquant.runtime.generation import stream_generate
    from mlxquant.runtime.reply import Response
    from mlxquant.runtime.sampling import Sampling

    if raw:
        refuse(ctx, "goes without --raw: it has its place in a chat template", "system")
    if draft is None:
        refuse(ctx, "needs --draft", "draft_tokens")
    if temp == 0:
        refuse(ctx, "needs --temp above 0", "top_p", "top_k", "min_p", "seed")
    sampling = Sampling(temp, top_p, top_k, min_p, repetition_penalty, seed)
    text = require_unicode(sys.stdin.read(), "standard input") if prompt is None else prompt
    loaded = load_model(model, revision, memory, trust_remote_code)
    chat = not raw and loaded.tokenizer.has_chat_template
    if system and not chat:
        raise BadValue(f"--system needs a chat template, and {model} has none")
    guesser = _load_draft(draft, memory, trust_remote_code)
    told = [{"role": "system", "content": system}] if system else []
    request = [*told, {"role": "user", "content": text}] if chat else text
    shown = clean if sys.stdout.isatty() else str
    chunks = []
    for chunk in stream_generate(
            loaded, request, max_tokens=max_tokens, sampling=sampling, stop=stop or (),
            kv_bits=kv_bits, draft=guesser, draft_tokens=draft_tokens, lookup=lookup):
        chunks.append(chunk)
        if not as_json:
            print(shown(chunk.text), end="", flush=True)
    response = Response.of(chunks)
    if as_json:
        print_json(response.as_dict())
    else:
        print(flush=True)
        remark(response.report.line())


@app.command(epilog="Example: mlxquant serve smollm2-135m --port 8080")
def serve(
    model: option.DefaultModel = "",
    host: Annotated[str, Option(help="0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, Option(help="0: any free one.")] = 8080,
    max_tokens: option.MaxTokens = 1024, temp: option.Temperature = 0.0, top_p: option.TopP = 1.0,
    top_k: option.TopK = 0, min_p: option.MinP = 0.0, kv_bits: option.KvBits = None,
    draft: option.Draft = None,
    origin: Annotated[list[str] | None, Option(
        help="A web page's origin that may call it, or *; repeatable.")] = None,
    verbose: Annotated[bool, Option("--verbose", help="A line for each request.")] = False,
    revision: option.Revision = None, memory: option.Memory = None,
    trust_remote_code: option.Trust = False,
) -> None:
    """Serve a model to any OpenAI client, until Ctrl-C."""
    import signal

    from mlxquant.runtime.loop import Loop
    from mlxquant.runtime.sampling import Sampling
    from mlxquant.server.forms import Options
    from mlxquant.server.serving import serve as run
    from mlxquant.sources.names import DEFAULT_MODEL

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    sampling = Sampling(temp, top_p, top_k, min_p)
    Options(port=port, max_tokens=max_tokens)  # refused before the model is loaded
    loaded = load_model(model or DEFAULT_MODEL, revision, memory, trust_remote_code)
    loop = Loop(kv_bits, _load_draft(draft, memory, trust_remote_code))
    options = Options(host, port, max_tokens, sampling, loop, tuple(origin or ()), verbose=verbose)
    run(loaded, options, lambda address: remark(f"{loaded.name} at {address}, Ctrl-C stops"))


def _load_draft(name: str | None, memory: str | None, trust: bool) -> "LanguageModel | None":
    return load_model(name, None, memory, trust, probe=False) if name else None
