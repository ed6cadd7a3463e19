"""The rotation of inputs, against its matrix in float64."""

import mlx.core as mx
import numpy as np
import pytest
from test_transformed import close, draw, rotation_matrix

from mlxquant.base.errors import BadValue
from mlxquant.codes import hadamard


@pytest.mark.parametrize("n,block", [
    (64, 64), (96, 32), (6, 2), (5, 1), (576, 64), (960, 64), (12, 4)])
def test_rotation_equals_its_matrix(n, block):
    signs = hadamard.random_signs(n, seed=n)
    r = rotation_matrix(np.array(signs), block)
    np.testing.assert_allclose(r @ r.T, np.eye(n), atol=1e-12)
    x, h = draw(2, 3, n), draw(n, n, seed=1)
    close(hadamard.rotate(mx.array(x), signs, block), x @ r.T)
    close(hadamard.rotate(mx.array(x[0]), signs, block), x[0] @ r.T)
    close(hadamard.unrotate_weight(mx.array(x[0]), signs, block), x[0] @ r)
    close(hadamard.rotate_hessian(mx.array(h), signs, block), r @ h @ r.T)
    turned = hadamard.rotate(mx.array(x[0]), signs, block)
    close(hadamard.unrotate_weight(turned, signs, block), x[0])


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_rotation_stays_in_its_dtype(dtype):
    x, signs = mx.array(draw(3, 64)).astype(dtype), hadamard.random_signs(64, 0)
    for turned in (hadamard.rotate(x, signs, 32), hadamard.unrotate_weight(x, signs, 32)):
        assert turned.dtype == dtype
    expected = np.array(x.astype(mx.float32)) @ rotation_matrix(signs, 32).T
    close(hadamard.rotate(x, signs, 32), expected, 2e-2)


def test_signs_are_repeatable_and_even():
    signs = np.array(hadamard.random_signs(4096, 7))
    assert set(signs) == {-1.0, 1.0} and abs(signs.mean()) < 0.06
    np.testing.assert_array_equal(signs, np.array(hadamard.random_signs(4096, 7)))
    assert (signs != np.array(hadamard.random_signs(4096, 8))).any()


@pytest.mark.parametrize("n", [1, 3, 8, 9, 96, 577])
def test_signs_pack_to_bits_lowest_first(n):
    signs = hadamard.random_signs(n, n)
    packed = hadamard.pack_signs(signs)
    assert packed.dtype == mx.uint8 and packed.shape == (-(-n // 8),)
    for j, sign in enumerate(signs.tolist()):
        assert packed[j // 8].item() >> j % 8 & 1 == (sign < 0)
    np.testing.assert_array_equal(np.array(hadamard.unpack_signs(packed, n)), np.array(signs))


@pytest.mark.parametrize("n,expected", [(576, 64), (96, 32), (97, 1), (4096, 64)])
def test_default_block(n, expected):
    assert hadamard.default_block(n) == expected


@pytest.mark.parametrize("block", [0, -2, 3, 64, 96, 2.0, True])
def test_impossible_blocks_say_what_is_allowed(block):
    with pytest.raises(BadValue, match="allowed for 96 inputs are 1, 2, 4, 8, 16, 32"):
        hadamard.rotate(mx.ones((2, 96)), mx.ones(96), block)
