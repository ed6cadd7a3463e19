"""The split of a token's time, on data whose answer is known."""

import numpy as np
import pytest

from mlxquant.report.fit import fit

SIZES = [1e9, 2e9, 4e9, 8e9]


def test_exact_data_gives_the_numbers_it_was_made_from():
    found = fit(SIZES, [3 + size / 400e6 for size in SIZES])
    assert (found.fixed_ms, found.gb_per_s) == pytest.approx((3, 400))
    assert max(map(abs, found.residuals_ms)) < 1e-9
    assert "3.00 ± 0.00 ms fixed per token + bytes at 400.0 ± 0.0 GB/s (4 points" in found.line()


def test_noise_stays_within_the_errors_it_reports():
    random = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        times = [3 + size / 400e6 + random.normal(0, 0.1) for size in SIZES * 3]
        found = fit(SIZES * 3, times)
        inside += (abs(found.fixed_ms - 3) < 2 * found.fixed_ms_error
                   and abs(found.gb_per_s - 400) < 2 * found.gb_per_s_error)
        assert sum(found.residuals_ms) == pytest.approx(0, abs=1e-9)
    assert inside > 160


def test_residuals_are_in_the_order_of_the_points():
    found = fit([1e9, 2e9, 3e9], [1.0, 2.3, 3.0])
    assert np.argmax(found.residuals_ms) == 1


@pytest.mark.parametrize("sizes, times", [
    ([1e9], [1]), ([1e9, 2e9], [1, 2]), ([1e9, 1e9, 1e9], [1, 1, 1]),
    ([1e9, 1.005e9, 1.01e9], [1, 2, 3]),
    ([1e9, 2e9, 3e9], [3, 2, 1]), ([1e9, 2e9, 3e9], [80, 110, 85]),
    ([1e9, 2e9, 3e9], [1, 11, 21])])
def test_what_cannot_be_fitted_is_none(sizes, times):
    assert fit(sizes, times) is None
