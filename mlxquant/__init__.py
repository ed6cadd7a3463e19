"""Low-bit inference on MLX, with every speed shown against the bandwidth ceiling.

The public names load on first use, so that importing the package and printing
a help page stay fast. Only the BLAS must come early: see ``blas.py``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mlxquant import blas

if TYPE_CHECKING:  # what type checkers see of the names below
    from mlxquant.batch import BatchResponse as BatchResponse
    from mlxquant.batch import batch_generate as batch_generate
    from mlxquant.errors import MlxquantError as MlxquantError
    from mlxquant.evaluation.perplexity import evaluate as evaluate
    from mlxquant.generation import generate as generate
    from mlxquant.generation import stream_generate as stream_generate
    from mlxquant.inspection import inspect as inspect
    from mlxquant.loading import LanguageModel as LanguageModel
    from mlxquant.loading import load as load
    from mlxquant.models import resolve as resolve
    from mlxquant.prompt_cache import PromptCache as PromptCache
    from mlxquant.quant.pipeline import quantize as quantize
    from mlxquant.reply import Chunk as Chunk
    from mlxquant.reply import Response as Response
    from mlxquant.roofline.bench import bench as bench
    from mlxquant.roofline.plan import plan as plan
    from mlxquant.sampling import Sampling as Sampling
    from mlxquant.tuning.tune import tune as tune

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


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mlxquant' has no attribute {name!r}")
    value = getattr(import_module(f"mlxquant.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
