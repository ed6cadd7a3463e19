"""The package itself: public names, a light import, the BLAS before MLX."""

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlxquant
from mlxquant.base import blas

PACKAGE = Path(mlxquant.__file__).parent
HELP = "import mlxquant.cli; mlxquant.cli.app(['--help'])"


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code],
                          capture_output=True, text=True, check=True).stdout


def test_public_names():
    assert mlxquant.__all__ == [
        "BatchResponse", "Chunk", "Job", "LanguageModel", "MlxquantError", "PromptCache",
        "Response", "Sampling", "Schedule", "Spec", "Target", "Text", "Tuning", "batch_generate",
        "bench", "evaluate", "generate", "inspect", "load", "plan", "quantize", "resolve",
        "stream_generate", "tune"]
    for name in mlxquant.__all__:
        assert getattr(mlxquant, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = mlxquant.nonsense


@pytest.mark.parametrize("code", ["import mlxquant", HELP])
def test_importing_and_help_load_nothing_heavy(code):
    heavy = {"mlx", "mlx_lm", "transformers", "numpy", "huggingface_hub", "matplotlib", "rich",
             "prompt_toolkit"}
    ends = f"print('loaded', sorted({{m.partition('.')[0] for m in sys.modules}} & {heavy}))"
    printed = run(f"import atexit, sys; atexit.register(lambda: {ends})\n{code}")
    assert printed.endswith("loaded []\n")


def test_type_checkers_see_every_public_name():
    source = (PACKAGE / "__init__.py").read_text()
    listed = set(re.findall(r" as (\w+)$", source, re.MULTILINE))
    assert listed == {*mlxquant.__all__, "__version__"} and (PACKAGE / "py.typed").exists()


def test_imports_go_one_way():
    """Each layer of the house imports only those below it: the contract in pyproject.toml."""
    call = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    result = subprocess.run([sys.executable, "-c", call], cwd=PACKAGE.parent,
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux wheels carry the reference BLAS")
def test_openblas_is_loaded_before_mlx():
    assert "openblas" in run("import mlxquant; print(mlxquant.base.blas.preload())")
    late = run("import mlx.core, mlxquant; print(mlxquant.base.blas.hint())")
    assert "import mlxquant before mlx" in late


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux wheels carry the reference BLAS")
def test_openblas_chooses_its_kernels_by_the_processor():
    """A build for one kind of processor dies of an illegal instruction on another."""
    library = ctypes.CDLL(run("import mlxquant; print(mlxquant.base.blas.preload())").strip())
    library.scipy_openblas_get_config.restype = ctypes.c_char_p
    assert b"DYNAMIC_ARCH" in library.scipy_openblas_get_config()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux wheels carry the reference BLAS")
def test_openblas_serves_mlx_and_nobody_else():
    """NumPy's own has wider integers; the loader tells which library found each name where."""
    code = ("import mlxquant, numpy as np, mlx.core as mx; numpy = np.linalg.eigvals(np.eye(3));"
            "mx.eval(mx.linalg.cholesky(mx.eye(3), stream=mx.cpu))")
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env=os.environ | {"LD_DEBUG": "bindings"}).stderr
    found = re.findall(r"binding file (\S+) .* to \S*/blas/libopenblas\S+ .*symbol `(\w+)'", said)
    callers = {Path(caller).name.split("-")[0]: name for caller, name in found
               if "/blas/libopenblas" not in caller}
    assert callers.keys() <= {"libmlx.so", "liblapack"} and "libmlx.so" in callers


def test_products_are_right_with_the_blas_in_use():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(70, 130)), rng.normal(size=(130, 50))
    product = np.array(mx.array(a.astype(np.float32)) @ mx.array(b.astype(np.float32)))
    assert np.abs(product - a @ b).max() < 1e-4
    assert blas.hint() is None or sys.platform == "linux"
