"""The package itself: public names, a light import, the BLAS before MLX."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import commands
import mlx.core as mx
import numpy as np
import pytest

import mlxquant
from mlxquant.base import blas
from mlxquant.runtime import generation

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


@pytest.mark.parametrize("work", [
    lambda model: mlxquant.generate(model, "x", max_tokens=2),
    lambda model: mlxquant.batch_generate(model, ["x"], max_tokens=2),
    lambda model: mlxquant.evaluate(model, "text" * 20, context=8, windows=1),
    lambda model: mlxquant.inspect(str(model.folder)),
    lambda model: mlxquant.plan(str(model.folder), memory="8GB", chip="M1"),
    lambda model: list(generation.stream_generate(model, "x", max_tokens=2)),  # called elsewhere
], ids=["generate", "batch", "evaluate", "inspect", "plan", "stream"])
def test_a_thread_closes_its_streams_as_it_ends(tiny, monkeypatch, work):
    """MLX aborts the process at exit where one is left open."""
    closed, close = [], mx.clear_streams
    monkeypatch.setattr(
        mx, "clear_streams", lambda: (closed.append(threading.get_ident()), close()))
    work(tiny)
    assert closed == []  # the main thread goes on
    thread = threading.Thread(target=lambda: [work(tiny) for _ in range(2)])
    thread.start()
    number = thread.ident
    thread.join()
    assert closed == [number]


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


def test_a_public_class_has_a_name_of_its_own():
    """So that a name found anywhere in the code means one thing."""
    found = Counter(name for file in PACKAGE.rglob("*.py")
                    for name in re.findall(r"^class ([A-Za-z]\w*)", file.read_text(), re.MULTILINE))
    assert [name for name, times in found.items() if times > 1] == []


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


def say_hint():
    print(blas.hint())


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux wheels carry the reference BLAS")
def test_commands_that_the_tests_fork_have_openblas_too():
    assert commands.run(program=say_hint).stdout == "None\n"


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


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a library between")
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (7, 1), (7, 5), (1000, 300), (2, 10**5)])
def test_one_row_is_right_as_it_lies_and_turned(shape):
    """It takes another way through the BLAS, into memory that may hold anything."""
    n, k = shape
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=size).astype(np.float32) for size in ((1, k), (k, n)))
    expected, row = a.astype(np.float64) @ b, mx.array(a)
    across = mx.broadcast_to(mx.array(a).T, (k, 3))[:, 1:2].T  # its numbers are not neighbours
    for x in (row, across):
        for weight in (mx.array(b), mx.array(np.ascontiguousarray(b.T)).T):
            assert np.abs(np.array(x @ weight) - expected).max() < 1e-5 * k**0.5 * 10
            added = mx.addmm(mx.ones((1, n)), x, weight, alpha=2, beta=3)
            assert np.abs(np.array(added) - 2 * expected - 3).max() < 2e-5 * k**0.5 * 10


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++"), reason="needs a compiler")
def test_one_row_goes_to_the_function_for_one():
    code = "import mlxquant, mlx.core as mx; mx.eval(mx.ones((1, 64)) @ mx.ones((64, 64)))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env=os.environ | {"LD_DEBUG": "bindings"}).stderr
    assert re.search(r"to \S*/blas/libopenblas\S+ .*symbol `scipy_cblas_sgemv'", said)
