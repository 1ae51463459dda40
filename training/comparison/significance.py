"""Whether two means of a few seeds each differ by more than chance: Welch's t-test."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_NODES = 128


@dataclass(frozen=True)
class TTest:
    """`t`, positive where the first mean is larger; its degrees of freedom; two-sided p."""

    t: float
    degrees: float
    p_value: float


def welch_t_test(one: Sequence[float], other: Sequence[float]) -> TTest | None:
    """Compare two samples of at least two values each; variances may differ (Welch, 1947).

    None where neither sample varies: nothing then says how much chance there is.

    >>> welch_t_test([3.0, 4.0, 5.0], [1.0, 2.0, 3.0]).degrees
    4.0
    """
    # Squared standard errors of the two means.
    error_one = statistics.variance(one) / len(one)
    error_other = statistics.variance(other) / len(other)
    error = error_one + error_other
    if error == 0:
        return None
    t = (statistics.mean(one) - statistics.mean(other)) / math.sqrt(error)
    degrees = error**2 / (error_one**2 / (len(one) - 1) + error_other**2 / (len(other) - 1))
    return TTest(t, degrees, two_sided_p(t, degrees))


def two_sided_p(t: float, degrees: float) -> float:
    """Return the probability that Student's t with so many degrees, at least 1, is as far from 0.

    With x = sqrt(v) cot(a), the density's tail beyond t is, v being the degrees of freedom,

        Gamma((v + 1) / 2) / (sqrt(pi) Gamma(v / 2))  integral of sin(a)^(v - 1) da

    over 0 < a < atan(sqrt(v) / t): a bounded integrand over a bounded range, to about 1e-6.
    """
    end = math.atan2(math.sqrt(degrees), abs(t))
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    angles = end * (nodes + 1) / 2
    integral = float(weights @ np.sin(angles) ** (degrees - 1)) * end / 2
    log_factor = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2) - math.log(math.pi) / 2
    return min(1.0, 2 * math.exp(log_factor) * integral)
