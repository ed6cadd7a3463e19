"""Low-bit inference on MLX, with every speed shown against the bandwidth ceiling.

The public names load on first use, so that importing the package and printing
a help page stay fast. Only the BLAS must come early: see ``blas.py``.
"""

from importlib import import_module
from inspect import isfunction
from typing import TYPE_CHECKING, Any

from mlxquant.base import blas, threads
from mlxquant.base.version import __version__ as __version__

if TYPE_CHECKING:  # what type checkers see of the names below
    from mlxquant.base.errors import MlxquantError as MlxquantError
    from mlxquant.codes.spec import Spec as Spec
    from mlxquant.model.inspection import inspect as inspect
    from mlxquant.model.loading import LanguageModel as LanguageModel
    from mlxquant.model.loading import load as load
    from mlxquant.quantise.job import Job as Job
    from mlxquant.quantise.job import Target as Target
    from mlxquant.quantise.job import Text as Text
    from mlxquant.quantise.pipeline import quantize as quantize
    from mlxquant.report.bench import bench as bench
    from mlxquant.report.perplexity import evaluate as evaluate
    from mlxquant.report.plan import plan as plan
    from mlxquant.runtime.batch import BatchResponse as BatchResponse
    from mlxquant.runtime.batch import batch_generate as batch_generate
    from mlxquant.runtime.generation import generate as generate
    from mlxquant.runtime.generation import stream_generate as stream_generate
    from mlxquant.runtime.prompt_cache import PromptCache as PromptCache
    from mlxquant.runtime.reply import Chunk as Chunk
    from mlxquant.runtime.reply import Response as Response
    from mlxquant.runtime.sampling import Sampling as Sampling
    from mlxquant.sources.names import resolve as resolve
    from mlxquant.tuning.settings import Schedule as Schedule
    from mlxquant.tuning.settings import Tuning as Tuning
    from mlxquant.tuning.tune import tune as tune

_HOME = {name: module for module, names in {
    "base.errors": ["MlxquantError"],
    "codes.spec": ["Spec"],
    "model.inspection": ["inspect"],
    "model.loading": ["LanguageModel", "load"],
    "quantise.job": ["Job", "Target", "Text"],
    "quantise.pipeline": ["quantize"],
    "report.bench": ["bench"],
    "report.perplexity": ["evaluate"],
    "report.plan": ["plan"],
    "runtime.batch": ["BatchResponse", "batch_generate"],
    "runtime.generation": ["generate", "stream_generate"],
    "runtime.prompt_cache": ["PromptCache"],
    "runtime.reply": ["Chunk", "Response"],
    "runtime.sampling": ["Sampling"],
    "sources.names": ["resolve"],
    "tuning.settings": ["Schedule", "Tuning"],
    "tuning.tune": ["tune"],
}.items() for name in names}

__all__ = sorted(_HOME)

blas.preload()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mlxquant' has no attribute {name!r}")
    value = getattr(import_module(f"mlxquant.{_HOME[name]}"), name)
    globals()[name] = value = threads.for_any(value) if isfunction(value) else value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
