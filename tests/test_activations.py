"""The rounding of activations: exact integers, half a step, what is allowed."""

import mlx.core as mx
import numpy as np
import pytest
from test_transformed import draw

from mlxquant.base.errors import BadValue
from mlxquant.layers.transformed import ActivationSpec, round_activation


def test_integers_are_exact_per_token_per_tensor_and_static():
    # Maxima of 127/8 and 127/4 make both steps powers of two, so every quotient is exact.
    x = np.random.default_rng(0).integers(-508, 508, (1, 2, 9)) / 32
    x[0, 0, 3], x[0, 1, 4] = -127 / 8, 127 / 4
    x[0, 0] = np.clip(x[0, 0], -127 / 8, 127 / 8)
    for spec, scale, steps in [(ActivationSpec(8, "token"), None, [[[1 / 8], [1 / 4]]]),
                               (ActivationSpec(8, "tensor"), None, [1 / 4]),
                               (ActivationSpec(8, "static"), mx.array([1 / 16]), [1 / 16])]:
        codes, step = round_activation(mx.array(x), spec, scale)
        np.testing.assert_array_equal(np.array(step), np.array(steps, np.float32))
        np.testing.assert_array_equal(np.array(codes), np.clip(np.round(x / steps), -127, 127))


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 12, 15])
@pytest.mark.parametrize("granularity", ["token", "tensor"])
def test_error_is_within_half_a_step(bits, granularity):
    x = draw(2, 5, 33)
    codes, step = map(np.array, round_activation(mx.array(x), ActivationSpec(bits, granularity)))
    top = 2 ** (bits - 1) - 1
    assert np.abs(codes).max() == top and (codes == np.round(codes)).all()
    assert (np.abs(codes * step - x) <= step * 0.5 + 1e-6 * np.abs(x).max()).all()


def test_a_token_of_zeros_stays_zero():
    codes, step = round_activation(mx.zeros((1, 2, 4)), ActivationSpec())
    assert not codes.any() and not step.any()


def test_static_clips_what_calibration_did_not_see():
    x = mx.array([[-9.0, 0.6, 9.0]])
    codes, _ = round_activation(x, ActivationSpec(4, "static"), mx.ones(1))
    assert codes.tolist() == [[-7, 1, 7]]


@pytest.mark.parametrize("changes,allowed", [
    ({"bits": 1}, "2 to 16"), ({"bits": 17}, "2 to 16"), ({"bits": 8.0}, "2 to 16"),
    ({"bits": True}, "2 to 16"), ({"granularity": "row"}, "token, tensor, static")])
def test_impossible_activations_say_what_is_allowed(changes, allowed):
    with pytest.raises(BadValue, match=allowed):
        ActivationSpec(**changes)
