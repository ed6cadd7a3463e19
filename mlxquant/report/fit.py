"""Split the time of a token: what every token costs, and what every byte costs.

    milliseconds = fixed + bytes / bandwidth, by least squares over several models or depths.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_LEAST_POINTS = 3  # two give a line through both, whatever they are
_LEAST_RANGE = 1.02  # most over least bytes: closer together is noise


@dataclass(frozen=True)
class Fit:
    """``gb_per_s`` is the fitted bandwidth, that of each additional byte; errors are standard
    errors, residuals in milliseconds in the order of the points, measured minus fitted."""

    fixed_ms: float
    fixed_ms_error: float
    gb_per_s: float
    gb_per_s_error: float
    residuals_ms: tuple[float, ...]

    def line(self) -> str:
        """One line for people."""
        worst = max(map(abs, self.residuals_ms))
        return (f"{self.fixed_ms:.2f} ± {self.fixed_ms_error:.2f} ms fixed per token + bytes at "
                f"{self.gb_per_s:.1f} ± {self.gb_per_s_error:.1f} GB/s "
                f"({len(self.residuals_ms)} points, largest residual {worst:.3f} ms)")


def fit(bytes_per_token: Sequence[float], milliseconds: Sequence[float]) -> Fit | None:
    """The split, or None where the points do not tell: fewer than 3, all of nearly the same bytes,
    a slope of less than twice its standard error, or a negative fixed time."""
    gigabytes, times = np.array(bytes_per_token) / 1e9, np.array(milliseconds)
    if len(set(gigabytes)) < _LEAST_POINTS or gigabytes.max() < _LEAST_RANGE * gigabytes.min():
        return None
    (slope, fixed), covariance = np.polyfit(gigabytes, times, 1, cov=True)
    slope_error, fixed_error = np.sqrt(np.diag(covariance))
    if slope <= 2 * slope_error or fixed < 0:
        return None
    rate = 1e3 / slope
    return Fit(float(fixed), float(fixed_error), float(rate), float(rate * slope_error / slope),
               tuple(map(float, times - fixed - slope * gigabytes)))
