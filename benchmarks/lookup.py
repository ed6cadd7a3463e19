"""Prompt look-up (``--lookup``): tokens/s with and without, where a reply repeats its prompt.

    python benchmarks/lookup.py MODEL … [--ahead 0 3 7] [--tokens 192] [--out NAME]

A MODEL is what ``bench.py`` takes. One with a tokenizer is asked to edit a file of this folder, and
for prose. SHAPE:FORM computes with random weights, but what it says is a script: its prompt of 256
tokens again and again, with a new token in place of every 8th or 32nd, so that a known share of the
guesses is right. Every row is greedy; ``same`` says whether its tokens are those without look-up:
products of one row and of several round differently, so that a close choice may fall otherwise.
"""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from record import parser, save  # first: it loads the BLAS before MLX

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from bench import open_model
from mlx_lm.models.cache import make_prompt_cache

from mlxquant.layers import traffic
from mlxquant.model.loading import LanguageModel
from mlxquant.runtime.loop import Loop
from mlxquant.runtime.probe import measured, percent_of_ceiling
from mlxquant.runtime.prompt import Request
from mlxquant.runtime.prompt_cache import PromptCache

EDITED = Path(__file__).with_name("measured.py").read_text(encoding="utf-8")
ASKED = {
    "edit": "Rename the variable `row` to `line` in this file. Answer with the whole file and "
            f"nothing else.\n```python\n{EDITED}```",
    "prose": "Explain in three paragraphs how tides come about.",
}
SCRIPTED = {"7 of 8 repeated": 8, "31 of 32 repeated": 32}
_PROMPT = 256


class Scripted(nn.Module):
    """A network that computes all it would, and then says what stands in ``text``."""

    def __init__(self, network: nn.Module, text: np.ndarray):
        super().__init__()
        self.network, self._text = network, mx.array(text)

    @property
    def layers(self) -> list[nn.Module]:
        return self.network.layers

    def __call__(self, tokens: mx.array, cache: list[Any] | None = None) -> mx.array:
        following = (cache[0].offset if cache else 0) + 1 + mx.arange(tokens.shape[1])
        logits = self.network(tokens, cache=cache)
        said = mx.arange(logits.shape[-1]) == self._text[following][:, None]
        return mx.where(said, mx.array(100.0, logits.dtype), mx.clip(logits, -50, 50))


def script(vocabulary: int, length: int, every: int) -> np.ndarray:
    """``length`` tokens: a run of ``_PROMPT`` repeated, then with every so-manieth token new."""
    drawn = np.random.default_rng(0)
    text = np.resize(drawn.integers(0, vocabulary, _PROMPT), length)
    text[_PROMPT + every - 1::every] = drawn.integers(
        0, vocabulary, len(text[_PROMPT + every - 1::every]))
    return text


def requests(model: LanguageModel, scripted: bool,
             tokens: int) -> Iterator[tuple[str, LanguageModel, Request]]:
    """What is asked by name: the model that answers, and the request."""
    if not scripted:
        for name, prompt in ASKED.items():
            yield name, model, Request.of(model, [{"role": "user", "content": prompt}],
                                          max_tokens=tokens)
        return
    for name, every in SCRIPTED.items():
        text = script(model.vocabulary, _PROMPT + tokens + 1, every)
        yield (name, replace(model, network=Scripted(model.network, text)),
               Request(text[:_PROMPT].tolist(), tokens))


def decoded(model: LanguageModel, request: Request, ahead: int) -> tuple[list[int], dict[str, Any]]:
    """The tokens of a reply, and how they came; a first short one compiles what is needed."""
    for asked in (replace(request, max_tokens=min(24, request.max_tokens)), request):
        tokens: list[int] = []
        cache, passes = PromptCache(layers=make_prompt_cache(model.network)), 0
        steps = Loop(lookup=ahead).steps(model, asked, cache, 0, lambda done, total: None)
        for step in steps:
            if not tokens:
                start = time.perf_counter()  # the prompt is read, and the first token there
            tokens.append(step.token)
            passes += not step.guessed
            if step.token in ends(model):
                break
        seconds = time.perf_counter() - start
        steps.close()
    gb_per_s = (passes - 1) * traffic.weight_bytes(model.network) / seconds / 1e9
    return tokens, dict(tokens=len(tokens), passes=passes, tps=(len(tokens) - 1) / seconds,
                        gb_per_s=gb_per_s)


def ends(model: LanguageModel) -> set[int]:
    return set(getattr(model.tokenizer, "eos_token_ids", ()))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("models", nargs="+")
    options.add_argument("--ahead", nargs="+", type=int, default=[0, 3, 7])
    options.add_argument("--tokens", type=int, default=192)
    options.add_argument("--out", default="lookup")
    a = options.parse_args()
    rows, ceiling = [], measured().ceiling
    for name in a.models:
        model = open_model(name)
        for text, asked, request in requests(model, not ends(model), a.tokens):
            plain: list[int] = []
            for ahead in a.ahead:
                tokens, row = decoded(asked, request, ahead)
                plain = plain or tokens
                row["percent_of_ceiling"], ceiling = percent_of_ceiling(row["gb_per_s"])
                rows.append(dict(model=Path(name).name, text=text, ahead=ahead,
                                 same=tokens == plain) | row)
                print("  ".join(f"{key} {value:.4g}" if isinstance(value, float) else
                                f"{key} {value}" for key, value in rows[-1].items()), flush=True)
                save(a.out, ceiling=ceiling.__dict__, rows=rows)
        mx.clear_cache()


if __name__ == "__main__":
    main()
