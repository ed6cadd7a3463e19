"""MLX 0.32.4 writes freed memory at some empty products: none may reach it."""

import mlx.core as mx
import numpy as np
import pytest
from commands import run
from conftest import CONFIG, job, write_folder
from mlx_lm.models import mixtral

import mlxquant
from mlxquant.codes.spec import ReplicaShape
from mlxquant.codes.statistics import Statistics
from mlxquant.codes.width import Width
from mlxquant.kernels.column_sweep import sweep_columns
from mlxquant.layers.transformed import ActivationSpec
from mlxquant.quantise import envelope


@pytest.fixture
def no_empty_product(monkeypatch):
    """Every product that the test makes has rows, columns and something between."""
    def checked(product, name):
        def call(*operands, **options):
            shapes = [x.shape for x in operands if isinstance(x, mx.array)]
            assert not any(0 in shape for shape in shapes), f"{name} of {shapes}"
            return product(*operands, **options)
        return call

    monkeypatch.setattr(mx.array, "__matmul__", checked(mx.array.__matmul__, "@"))
    for name in ("matmul", "addmm", "gather_mm", "quantized_matmul", "gather_qmm"):
        monkeypatch.setattr(mx, name, checked(getattr(mx, name), name))


def many_fits():
    """Behind a product that is waited for, and with memory that goes to others when freed."""
    mx.set_cache_limit(0)
    large, weight = mx.ones((600, 600)), mx.random.normal((64, 512), key=mx.random.key(0))
    mx.eval(large, weight)
    for _ in range(10):
        mx.async_eval(large @ large @ large)
        envelope.fit(weight, ReplicaShape(Width.TWO, 4, 0), mx.ones(512), rounds=1)
        others = [np.full(512 * k, 7, np.float32) for k in range(1, 5)]
        mx.synchronize()
        print(all((other == 7).all() for other in others))


def test_fitting_replicas_writes_no_memory_of_others():
    result = run(program=many_fits)
    assert result.returncode == 0 and result.stdout == "True\n" * 10, result.stderr


def test_no_product_of_the_first_columns_with_the_errors_before(no_empty_product):
    weight = mx.random.normal((3, 130), key=mx.random.key(0))
    codes = sweep_columns(weight, mx.ones((3, 130)), -mx.ones((3, 130)), mx.eye(130), 3)
    assert mx.array_equal(codes, mx.clip(mx.round(weight + 1), 0, 2))


def test_a_batch_without_rows_changes_no_statistics(no_empty_product):
    statistics = Statistics.empty(8)
    for rows in (0, 5, 0):
        statistics.add(mx.ones((rows, 8)), mx.ones((rows, 8)))
    assert statistics.count == 5 and mx.array_equal(statistics.hessian, mx.ones((8, 8)))


@pytest.mark.parametrize("options", [
    dict(method="rtn", bits=4), dict(method="gptq", bits=2, refine=1, propagation="corrected"),
    dict(method="awq", bits=4, group_size=0), dict(method="gptq", bits=4, rotation="fused"),
    dict(method="smoothquant", bits=8, group_size=0, activation=ActivationSpec()),
    dict(method="replica", bits=2, rotation="online", replica_group=8, refine=1)],
    ids=lambda options: options["method"])
def test_no_method_makes_an_empty_product(tmp_path, tiny_folder, options, no_empty_product):
    (tmp_path / "text").write_text("All work and no play. " * 20)
    mlxquant.quantize(str(tiny_folder), tmp_path / "out",
                      job(tmp_path / "text", samples=2, length=16, **options))
    reply = mlxquant.generate(mlxquant.load(str(tmp_path / "out")), "a", max_tokens=2)
    assert reply.finish_reason in ("stop", "length")


def test_experts_without_tokens_make_none_either(tmp_path, no_empty_product):
    config = CONFIG | {"model_type": "mixtral", "num_local_experts": 32, "num_experts_per_tok": 1,
                       "num_hidden_layers": 1}
    mx.random.seed(0)
    write_folder(tmp_path / "in", mixtral.Model(mixtral.ModelArgs.from_dict(config)), config)
    (tmp_path / "text").write_text("All work and no play. " * 20)
    made = mlxquant.quantize(str(tmp_path / "in"), tmp_path / "out", job(
        tmp_path / "text", samples=1, length=16, bits=4, group_size=32, refine=0))
    assert 0 < made.added["mean"] < 0.1
