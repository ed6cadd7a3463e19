"""The verb that answers over HTTP."""

import signal
from typing import Annotated

import typer

from mlxquant.cli.common import (
    MODEL_HELP,
    Draft,
    KvBits,
    MaxTokens,
    Memory,
    MinP,
    Revision,
    Temperature,
    TopK,
    TopP,
    Trust,
    app,
    load_model,
    remark,
)


@app.command(epilog="Example: mlxquant serve smollm2-135m --port 8080")
def serve(
    model: Annotated[str, typer.Argument(metavar="[MODEL]", help=MODEL_HELP)] = "",
    host: Annotated[str, typer.Option(help="0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any free one.")] = 8080,
    max_tokens: MaxTokens = 1024, temp: Temperature = 0.0, top_p: TopP = 1.0, top_k: TopK = 0, min_p: MinP = 0.0,
    kv_bits: KvBits = None, draft: Draft = None,
    origin: Annotated[list[str] | None, typer.Option(
        help="A web page's origin that may call it, or *; repeatable.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="A line for each request.")] = False,
    revision: Revision = None, memory: Memory = None, trust_remote_code: Trust = False,
):
    """Serve a model to any OpenAI client, until Ctrl-C."""
    from mlxquant.runtime.sampling import Sampling
    from mlxquant.server import Options
    from mlxquant.server import serve as run
    from mlxquant.sources.names import DEFAULT_MODEL

    def stop(*_):
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    sampling = Sampling(temp, top_p, top_k, min_p)
    Options(port=port, max_tokens=max_tokens)  # refused before the model is loaded
    loaded = load_model(model or DEFAULT_MODEL, revision, memory, trust_remote_code, probe=False)
    guesser = load_model(draft, None, memory, trust_remote_code, probe=False) if draft else None
    options = Options(host, port, max_tokens, sampling, kv_bits, guesser, tuple(origin or ()), verbose=verbose)
    run(loaded, options, lambda address: remark(f"{loaded.name} at {address}, Ctrl-C stops"))
