"""Verbs that answer: generate and chat."""

import sys
from typing import Annotated

import typer

from mlxquant.cli.common import (
    MODEL_HELP,
    AsJson,
    Draft,
    DraftTokens,
    KvBits,
    Lookup,
    MaxTokens,
    Memory,
    MinP,
    ModelName,
    Penalty,
    Revision,
    Seed,
    System,
    Temperature,
    TopK,
    TopP,
    Trust,
    app,
    load_model,
    print_json,
    remark,
)


@app.command(epilog='Example: mlxquant generate smollm2-135m -p "What is gravity?"')
def generate(
    model: ModelName,
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", help="Default: stdin.")] = None,
    system: System = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text, no chat template.")] = False,
    max_tokens: MaxTokens = 256, temp: Temperature = 0.0, top_p: TopP = 1.0, top_k: TopK = 0,
    min_p: MinP = 0.0, repetition_penalty: Penalty = 1.0, seed: Seed = None,
    stop: Annotated[list[str] | None, typer.Option(help="End at this text; repeatable.")] = None,
    kv_bits: KvBits = None, draft: Draft = None, draft_tokens: DraftTokens = 4, lookup: Lookup = 0,
    revision: Revision = None, memory: Memory = None, trust_remote_code: Trust = False, as_json: AsJson = False,
):
    """Answer one prompt, streaming, with a report of the speed."""
    from mlxquant.runtime.generation import stream_generate
    from mlxquant.runtime.reply import Response
    from mlxquant.runtime.sampling import Sampling

    sampling = Sampling(temp, top_p, top_k, min_p, repetition_penalty, seed)
    text = sys.stdin.read() if prompt is None else prompt
    loaded = load_model(model, revision, memory, trust_remote_code)
    guesser = load_model(draft, None, memory, trust_remote_code, probe=False) if draft else None
    request = text
    if not raw and loaded.tokenizer.has_chat_template:
        request = [{"role": "system", "content": system}] if system else []
        request.append({"role": "user", "content": text})
    chunks = []
    for chunk in stream_generate(loaded, request, max_tokens=max_tokens, sampling=sampling, stop=stop or (),
                                 kv_bits=kv_bits, draft=guesser, draft_tokens=draft_tokens, lookup=lookup):
        chunks.append(chunk)
        if not as_json:
            print(chunk.text, end="", flush=True)
    response = Response.of(chunks)
    if as_json:
        print_json(response.as_dict())
    else:
        print(flush=True)
        remark(response.report.line())


@app.command(epilog="Example: mlxquant chat smollm2-135m --system 'Answer briefly.'")
def chat(
    model: Annotated[str, typer.Argument(metavar="[MODEL]", help=MODEL_HELP)] = "",
    system: System = None, max_tokens: MaxTokens = 1024, temp: Temperature = 0.7,
    top_p: TopP = 0.95, top_k: TopK = 0, min_p: MinP = 0.0, repetition_penalty: Penalty = 1.0,
    seed: Seed = None, kv_bits: KvBits = None, draft: Draft = None, lookup: Lookup = 0,
    revision: Revision = None, memory: Memory = None, trust_remote_code: Trust = False,
):
    """Talk with a model; /help lists the commands."""
    from mlxquant.chat import Conversation, Session, run
    from mlxquant.runtime.sampling import Sampling
    from mlxquant.sources.names import DEFAULT_MODEL

    def load(name: str):
        return load_model(name, revision, memory, trust_remote_code)

    sampling = Sampling(temp, top_p, top_k, min_p, repetition_penalty, seed)
    loaded = load(model or DEFAULT_MODEL)
    guesser = load_model(draft, None, memory, trust_remote_code, probe=False) if draft else None
    remark(f"{loaded.name}: /help lists the commands, Ctrl-D leaves")
    run(Session(Conversation(loaded, system, sampling, max_tokens, kv_bits, guesser, lookup), load))
