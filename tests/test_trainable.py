"""Groups of levels in training: moved alike in every width, and measured as they are stored."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from conftest import CONFIG, random_network
from mlx.utils import tree_flatten, tree_unflatten

from mlxquant.codes import rtn
from mlxquant.codes.affine import unpack
from mlxquant.codes.spec import Spec
from mlxquant.layers.trainable import Trainable, TrainedParts
from mlxquant.layers.unpacked import AffineCodes

STEP = 2.0 ** -6  # of u


def quantised(bits, dtype=mx.float16):
    """A network whose blocks' layers hold groups of 64 in ``bits``."""
    network = random_network(CONFIG)
    network.update(tree_unflatten([(path, array.astype(dtype)) for path, array
                                   in tree_flatten(network.parameters())]))
    nn.quantize(network, 64, bits, class_predicate=lambda path, _: path.endswith("_proj"))
    return network


def matrices(student, values):
    """Of each layer, float32."""
    student.install(values)
    return {path: module.dense(mx.float32) for path, module in student.network.named_modules()
            if isinstance(module, AffineCodes)}


def weights(network):
    return {path: mx.dequantize(module.weight, module.scales.astype(mx.float32),
                                module.biases.astype(mx.float32), module.group_size, module.bits)
            for path, module in network.named_modules() if isinstance(module, nn.QuantizedLinear)}


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_a_step_is_as_long_in_every_width(bits):
    """About the lowest level a scale's step would shift the whole group, by more the more levels
    it has."""
    student = Trainable(quantised(bits), mx.float32)
    start = student.start()
    before = matrices(student, student.values(start))
    top = 2 ** bits - 1
    for name, longest in (("scales", top / 2), ("centres", 2 ** bits / 4)):
        moved = {path: u + STEP * path.endswith(name) for path, u in start.items()}
        after = matrices(student, student.values(moved))
        for path, matrix in before.items():
            levels = (after[path] - matrix).reshape(*student.base[f"{path}.scales"].shape, 64)
            levels = mx.abs(levels / student.base[f"{path}.scales"][..., None])
            assert levels.max().item() == pytest.approx(STEP * longest, rel=0.01), path


@pytest.mark.parametrize("bits", [2, 8])
def test_bfloat16_takes_less_than_rounding_to_levels_did(bits):
    network = quantised(bits)
    exact = weights(network)
    student = Trainable(network, mx.bfloat16)
    student.install(student.values(student.start()))
    for path, module in student.network.named_modules():
        if isinstance(module, AffineCodes):
            error = (module.dense(mx.bfloat16) - exact[path]).reshape(*module.scales.shape, 64)
            levels = error / module.scales[..., None]
            assert mx.square(levels).mean() < 1 / 12, path


@pytest.mark.parametrize("bits", [2, 5, 8])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_what_is_measured_is_what_is_stored(bits, dtype):
    network = quantised(bits, dtype)
    student = Trainable(network, mx.float32, TrainedParts(codes=0.5))
    moved = {path: 0.3 * mx.random.normal(u.shape, key=mx.random.key(1))
             for path, u in student.start().items()}
    measured = matrices(student, student.stored_values(moved))
    stored = quantised(bits, dtype)
    stored.load_weights(list(student.tensors(moved).items()), strict=False)
    assert not any(path.endswith("centres") for path in student.tensors(moved))
    for path, matrix in weights(stored).items():
        assert mx.abs(measured[path] - matrix).max() < 1e-6 * mx.abs(matrix).max(), path
    assert {array.dtype for _, array in tree_flatten(stored.parameters())} == {dtype, mx.uint32}


@pytest.mark.parametrize("spec", [Spec(bits="ternary"), Spec(bits=2, symmetric=True)], ids=str)
def test_levels_stay_those_that_were_asked_for(spec):
    """No fourth one beside ternary ones, and of symmetric ones none off the mirror."""
    network, top = quantised(2), spec.bits.levels - 1
    matrices = {path: module for path, module in network.named_modules()
                if isinstance(module, nn.QuantizedLinear)}
    for path, weight in weights(network).items():
        matrices[path].update(rtn.quantise(weight, spec).tensors(mx.float16))
    before = dict(tree_flatten(network.parameters()))
    specs = dict.fromkeys(matrices, spec)
    student = Trainable(network, mx.float32, TrainedParts(codes=5.0, specs=specs))
    made = student.tensors({path: 0.1 * mx.random.normal(u.shape)
                            for path, u in student.start().items()})
    for path in matrices:
        old, new = (unpack(found[f"{path}.weight"], 2, 64) for found in (before, made))
        assert new.max() == top and (old != new).any()
        scales, biases = (made[f"{path}.{name}"] for name in ("scales", "biases"))
        assert bool(mx.allclose(biases, -top / 2 * scales, rtol=4e-3)) == spec.symmetric
        assert not mx.allclose(scales, before[f"{path}.scales"], rtol=0.01)
