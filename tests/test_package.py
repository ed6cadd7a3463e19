"""The package itself: public names, a light import, the BLAS before MLX."""

import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest

import mlxquant
from mlxquant import blas


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_public_names():
    assert mlxquant.__all__ == [
        "LanguageModel", "MlxquantError", "PromptCache", "Response", "Sampling", "bench", "evaluate",
        "generate", "inspect", "load", "plan", "quantize", "resolve", "stream_generate", "tune"]
    for name in mlxquant.__all__:
        assert getattr(mlxquant, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        mlxquant.nonsense


def test_importing_and_help_load_nothing_heavy():
    heavy = "[m for m in ('mlx.core', 'transformers', 'numpy', 'huggingface_hub') if m in sys.modules]"
    assert run(f"import sys, mlxquant, mlxquant.cli; print({heavy})").strip() == "[]"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux wheels carry the reference BLAS")
def test_openblas_is_loaded_before_mlx():
    assert "openblas" in run("import mlxquant; print(mlxquant.blas.preload())")
    late = run("import mlx.core, mlxquant; print(mlxquant.blas.hint())")
    assert "import mlxquant before mlx" in late


def test_products_are_right_with_the_blas_in_use():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(70, 130)), rng.normal(size=(130, 50))
    product = np.array(mx.array(a.astype(np.float32)) @ mx.array(b.astype(np.float32)))
    assert np.abs(product - a @ b).max() < 1e-4
    assert blas.hint() is None or sys.platform == "linux"
