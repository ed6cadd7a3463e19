"""Low-bit inference on MLX, with every speed shown against the bandwidth ceiling.

The public names load on first use, so that importing the package and printing
a help page stay fast. Only the BLAS must come early: see ``blas.py``.
"""

from importlib import import_module

from mlxquant import blas

__version__ = "0.1.0"

_HOME = {
    "load": "loading",
    "LanguageModel": "loading",
    "generate": "generation",
    "stream_generate": "generation",
    "batch_generate": "batch",
    "BatchResponse": "batch",
    "Chunk": "reply",
    "Response": "reply",
    "PromptCache": "prompt_cache",
    "Sampling": "sampling",
    "evaluate": "evaluation.perplexity",
    "quantize": "quant.pipeline",
    "tune": "tuning.tune",
    "inspect": "inspection",
    "bench": "roofline.bench",
    "plan": "roofline.plan",
    "resolve": "models",
    "MlxquantError": "errors",
}

__all__ = sorted(_HOME)

blas.preload()


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'mlxquant' has no attribute {name!r}")
    value = getattr(import_module(f"mlxquant.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *_HOME})
