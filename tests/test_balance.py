"""Scale moved between weights and inputs: AWQ and SmoothQuant, against float64 references."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxquant.codes.affine import fit
from mlxquant.codes.spec import Spec
from mlxquant.codes.statistics import Statistics
from mlxquant.layers.transformed import ActivationSpec, TransformedLinear
from mlxquant.quantise import awq, smoothquant
from mlxquant.quantise.methods import METHODS
from mlxquant.quantise.settings import Settings

N = 128
W8 = Spec(bits=8, group_size=0, symmetric=True, method="smoothquant")


def inputs(outliers=4, size=30.0, n=N, tokens=400, seed=0):
    """Activations (tokens, n), correlated, with a few channels ``size`` times larger."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(tokens, n))
    x = x @ (np.eye(n) + 0.3 * random.normal(size=(n, n)) / np.sqrt(n))
    x[:, random.choice(n, outliers, replace=False)] *= size
    return x.astype(np.float32)


def matrices(*rows, n=N, seed=1):
    random = np.random.default_rng(seed)
    return [random.normal(size=(m, n)).astype(np.float32) * 0.1 for m in rows]


def statistics_of(x):
    statistics = Statistics.empty(x.shape[1])
    statistics.add(mx.array(x))
    return statistics


def sample_error(x, weights, approximations):
    """Mean over tokens of ‖(Ŵ − W) x‖², from the samples, in float64."""
    x = x.astype(np.float64)
    return sum(np.square(x @ (np.array(a, np.float64) - w.astype(np.float64)).T).sum(1).mean()
               for w, a in zip(weights, approximations))


# --- AWQ

def awq_error(x, weights, spec, s):
    """Output error of quantising each W · s as the method does."""
    scaled = statistics_of(x / np.array(s))
    made = [METHODS["awq"].quantise(mx.array(w) * s, scaled, spec, Settings()).dequantise() / s
            for w in weights]
    return sample_error(x, weights, made)


def awq_grid(x, weights, spec):
    """Errors of α = 0, 0.05 … 1, each measured on the samples and all rows."""
    magnitude = np.abs(x).mean(0)
    magnitude /= np.sqrt(magnitude.max() * magnitude.min())
    return [awq_error(x, weights, spec, mx.array(magnitude ** (step / 20))) for step in range(21)]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_awq_lowers_the_output_error_where_channels_stand_out(bits):
    x, weights, spec = inputs(), matrices(520, 24), Spec(bits=bits, method="awq")
    s = awq.balance([mx.array(w) for w in weights], statistics_of(x), spec, Settings())
    errors, ours = awq_grid(x, weights, spec), awq_error(x, weights, spec, s)
    assert ours < 0.9 * errors[0]
    assert ours < 1.02 * min(errors)  # though it looked at some of the 520 rows only


@pytest.mark.parametrize("size,bits", [(10, 2), (10, 3), (300, 2)])
def test_awq_finds_the_best_of_its_grid_where_it_sees_all_rows(size, bits):
    x, weights, spec = inputs(size=size, seed=1), matrices(24, seed=5), Spec(bits=bits)
    s = awq.balance([mx.array(w) for w in weights], statistics_of(x), spec, Settings())
    assert awq_error(x, weights, spec, s) < 1.001 * min(awq_grid(x, weights, spec))


@pytest.mark.parametrize("spec", [
    Spec(bits=1), Spec(bits="ternary"), Spec(bits=2), Spec(bits=3, group_size=-1),
    Spec(bits=4, group_size=0, symmetric=True), Spec(bits=8, group_size=32)], ids=str)
@pytest.mark.parametrize("outliers", [0, 3])
def test_awq_never_raises_the_output_error(spec, outliers):
    x, weights = inputs(outliers, seed=5), matrices(16, 8, seed=6)
    s = awq.balance([mx.array(w) for w in weights], statistics_of(x), spec, Settings())
    assert awq_error(x, weights, spec, s) <= awq_error(x, weights, spec, mx.ones(N)) * (1 + 1e-4)


def on_levels(rows):
    """A weight that 4 bits hold exactly: any scaling makes an error where there is none."""
    weight = np.random.default_rng(0).integers(0, 16, (rows, N)).astype(np.float32) / 8
    weight[:, ::64], weight[:, 1::64] = 0, 15 / 8
    return weight


def test_awq_keeps_one_where_nothing_helps():
    s = awq.balance([mx.array(on_levels(8))], statistics_of(inputs()), Spec(bits=4), Settings())
    np.testing.assert_array_equal(np.array(s), np.ones(N, np.float32))


def test_awq_is_not_misled_by_the_rows_it_searched_on():
    weight, statistics = on_levels(512), statistics_of(inputs())
    weight[::2] = matrices(256)[0]
    assert len(awq.some_rows([mx.array(weight)])[0]) == 256
    alone = awq.balance([mx.array(weight[::2])], statistics, Spec(bits=4), Settings())
    assert np.ptp(np.array(alone)) > 0
    s = awq.balance([mx.array(weight)], statistics, Spec(bits=4), Settings())
    np.testing.assert_array_equal(np.array(s), np.ones(N, np.float32))


def test_awq_factors_are_a_power_of_the_mean_magnitude():
    x = inputs()
    found = awq.balance([mx.array(matrices(32)[0])], statistics_of(x), Spec(bits=3), Settings())
    s = np.array(found, np.float64)
    assert s.max() * s.min() == pytest.approx(1, rel=1e-4)
    magnitude = np.log(np.abs(x.astype(np.float64)).mean(0))
    slope = np.polyfit(magnitude, np.log(s), 1)[0]
    assert slope * awq.STEPS == pytest.approx(round(slope * awq.STEPS), abs=1e-3) and 0 < slope <= 1
    assert np.ptp(np.log(s) - slope * magnitude) < 1e-4


def test_expected_error_equals_the_mean_over_samples():
    x, (error,) = inputs(), matrices(9)
    ours = awq.output_error(mx.array(error), statistics_of(x).hessian)
    assert ours == pytest.approx(sample_error(x, [np.zeros_like(error)], [error]), rel=1e-4)


def test_awq_quantise_weights_the_error_by_the_inputs():
    x, (weight,), spec = inputs(size=100.0), matrices(16), Spec(bits=2)
    blind = fit(mx.array(weight), spec).dequantise()
    seeing = METHODS["awq"].quantise(mx.array(weight), statistics_of(x), spec, Settings())
    assert sample_error(x, [weight], [seeing.dequantise()]) < sample_error(x, [weight], [blind])


# --- SmoothQuant

def test_smoothquant_formula_on_the_papers_example():
    x = np.array([[1, -16, 2, 6], [-2, 8, -1, -9]], np.float32)  # figure 5 of the paper
    weight = np.array([[2, 1, -2], [1, -1, -1], [2, -1, -2], [-1, -1, 1]], np.float32).T
    s = np.array(smoothquant.factors([mx.array(weight)], statistics_of(x), 0.5))
    np.testing.assert_allclose(s, [1, 4, 1, 3], rtol=1e-6)
    np.testing.assert_allclose(x / s, [[1, -4, 2, 2], [-2, 2, -1, -3]], rtol=1e-6)
    np.testing.assert_allclose((weight * s).T, [[2, 1, -2], [4, -4, -4], [2, -1, -2], [-3, -3, 3]],
                               rtol=1e-6)


@pytest.mark.parametrize("alpha,expected", [
    (0.0, [1 / 4, 2, 1 / 8]), (0.25, [0.5, 2, 2 ** -1.75]), (0.75, [2, 2, 2 ** 0.75]),
    (1.0, [4, 2, 4])])
def test_smoothquant_alpha_by_hand(alpha, expected):
    x = np.array([[4, -2, 1], [-1, 1, -4]], np.float32)  # maxima 4, 2, 4
    siblings = [mx.array([[-4.0, 0.25, 1]]), mx.array([[1.0, -0.5, 8], [0, 0.5, 2]])]  # 4, ½, 8
    s = smoothquant.factors(siblings, statistics_of(x), alpha)
    np.testing.assert_allclose(np.array(s), expected, rtol=1e-6)


def w8a8_error(x, weights, s, activation):
    """Relative output error of W8A8 layers with factors ``s``, on samples."""
    total = norm = 0.0
    for weight in weights:
        inner = nn.Linear(N, len(weight), bias=False)
        inner.weight = smoothquant.quantise(mx.array(weight) * s, None, W8, Settings()).dequantise()
        ours = np.array(TransformedLinear(inner, 1 / s, activation=activation)(mx.array(x)))
        exact = x.astype(np.float64) @ weight.astype(np.float64).T
        total, norm = total + np.square(ours - exact).sum(), norm + np.square(exact).sum()
    return total / norm


@pytest.mark.parametrize("granularity", ["token", "tensor"])
def test_smoothquant_lowers_the_w8a8_error_with_outliers(granularity):
    x, weights = inputs(), matrices(40, 24)
    given, statistics = [mx.array(w) for w in weights], statistics_of(x)
    activation = ActivationSpec(8, granularity)
    none = w8a8_error(x, weights, mx.ones(N), activation)
    half = w8a8_error(x, weights, smoothquant.factors(given, statistics, 0.5), activation)
    alpha, s = smoothquant.search_alpha(given, statistics, W8, activation)
    assert half < 0.5 * none
    assert alpha in smoothquant.CANDIDATES
    np.testing.assert_array_equal(
        np.array(s), np.array(smoothquant.factors(given, statistics, alpha)))
    tried = [w8a8_error(x, weights, smoothquant.factors(given, statistics, a), activation)
             for a in smoothquant.CANDIDATES]
    assert w8a8_error(x, weights, s, activation) < 1.15 * min(tried)


def expected_peak_square(deviation):
    """E[max_j z_j²] for independent Gaussians, by drawing them."""
    z = np.random.default_rng(9).normal(size=(20000, len(deviation))) * deviation
    return np.square(z).max(1).mean()


@pytest.mark.parametrize("activation", [
    ActivationSpec(6, "token"), ActivationSpec(6, "tensor"), ActivationSpec(6, "static"),
    ActivationSpec(16)], ids=str)
@pytest.mark.parametrize("spec", [W8, Spec(bits=4, group_size=0)], ids=["W8", "W4"])
def test_search_follows_its_documented_estimate(spec, activation):
    x, (weight,) = inputs(), matrices(24)
    statistics = statistics_of(x)
    w, x = weight.astype(np.float64), x.astype(np.float64)
    estimates = {}
    for alpha in smoothquant.CANDIDATES:
        s = np.abs(x).max(0) ** alpha / np.abs(w).max(0) ** (1 - alpha)
        made = smoothquant.quantise(mx.array((w * s).astype(np.float32)), None, spec,
                                    Settings()).dequantise()
        peak = (expected_peak_square(np.sqrt(np.square(x / s).mean(0)))
                if activation.granularity == "token" else np.square(x / s).max())
        noise = 0 if activation.bits == 16 else np.square(w * s).sum() * peak / 31 ** 2 / 12
        estimates[alpha] = sample_error(x / s, [w * s], [made]) + noise
    found, _ = smoothquant.search_alpha([mx.array(weight)], statistics, spec, activation)
    assert estimates[found] < 1.01 * min(estimates.values())


@pytest.mark.parametrize("spread", [0.0, 1.0, 4.0])
def test_expected_peak_of_a_token(spread):
    deviation = np.exp(spread * np.random.default_rng(0).normal(size=N))
    s = np.linspace(0.5, 2, N)
    statistics = Statistics(1, mx.array(np.diag(np.square(deviation)).astype(np.float32)),
                            mx.ones(N), mx.ones(N))
    ours = smoothquant._peak_square(statistics, mx.array(s.astype(np.float32)), ActivationSpec())
    assert ours == pytest.approx(expected_peak_square(deviation / s), rel=0.03)


@pytest.mark.parametrize("alpha", [None, 0.5, 0])
def test_smoothquant_balances_as_its_settings_say(alpha):
    given, statistics = [mx.array(w) for w in matrices(12, 8)], statistics_of(inputs())
    s = smoothquant.balance(given, statistics, W8,
                            Settings(activation=ActivationSpec(), alpha=alpha))
    if alpha == 0:
        assert s is None
    else:
        alpha = alpha or smoothquant.search_alpha(given, statistics, W8, ActivationSpec())[0]
        assert mx.array_equal(s, smoothquant.factors(given, statistics, alpha))
    assert smoothquant.balance(given, statistics, W8, Settings(alpha=alpha)) is None


def test_smoothquant_weights_are_symmetric_per_channel():
    affine = smoothquant.quantise(mx.array(matrices(12)[0]), None, Spec(bits=8, group_size=0),
                                  Settings())
    assert affine.spec.symmetric and affine.scales.shape == (12, 1)
    np.testing.assert_allclose(np.array(affine.biases), np.array(affine.scales) * -127.5, rtol=2e-3)


# --- both

def both(weights, statistics):
    return {"awq": awq.balance(weights, statistics, Spec(bits=3, group_size=0), Settings()),
            "smoothquant": smoothquant.factors(weights, statistics, 0.5)}


def test_scaling_alone_changes_nothing():
    x, (weight,) = inputs(), matrices(16)
    exact = x.astype(np.float64) @ weight.astype(np.float64).T
    for s in both([mx.array(weight)], statistics_of(x)).values():
        inner = nn.Linear(N, 16, bias=False)
        inner.weight = mx.array(weight) * s
        ours = np.array(TransformedLinear(inner, 1 / s)(mx.array(x)))
        assert np.abs(ours - exact).max() < 1e-5 * np.abs(exact).max()


@pytest.mark.parametrize("dead", [[3], [0, 7, 90], list(range(N))], ids=len)
@pytest.mark.parametrize("where", ["input", "weight", "both"])
def test_dead_channels_give_finite_factors(dead, where):
    x, (weight,) = inputs(), matrices(16)
    if where != "weight":
        x[:, dead] = 0
    if where != "input":
        weight[:, dead] = 0
    for name, s in both([mx.array(weight)], statistics_of(x)).items():
        s = np.array(s)
        assert np.isfinite(s).all() and (s > 0).all(), name
        assert np.isfinite(np.float16(s)).all() and np.isfinite(np.float16(1 / s)).all(), name


def test_half_precision_weights_are_balanced_in_float32():
    x, (weight,) = inputs(), matrices(16)
    for s in both([mx.array(weight).astype(mx.float16)], statistics_of(x)).values():
        assert s.dtype == mx.float32 and s.shape == (N,)
