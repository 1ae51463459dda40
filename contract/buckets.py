"""Time buckets: elapsed time on a doubling scale, [0,1) -> 0, [1,2) -> 1, [2,4) -> 2, ...

[2^k, 2^(k+1)) -> k+1, which is the bit length of the whole number of elapsed units.
"""

import numpy as np
from numpy.typing import NDArray

_MANTISSA_BITS = 52
_EXPONENT_OF_ONE = 1022  # biased exponent of 1.0 less the bit length of 1


def time_buckets(elapsed_s: NDArray[np.int64], unit_s: int, n_buckets: int) -> NDArray[np.int64]:
    """Return the bucket of each elapsed time, any shape, in 0 .. n_buckets-1.

    `elapsed_s`: seconds; below 0 (clock skew) counts as 0. `unit_s`: seconds in one unit.
    Buckets past the table are clipped to its last row.

    >>> time_buckets(np.array([-5, 0, 1, 2, 3, 4, 1000]), unit_s=1, n_buckets=8).tolist()
    [0, 0, 1, 2, 2, 3, 7]
    """
    # The exponent of a float64 *is* the bit length of its whole part, and below 1 or 0 it is no
    # more than 0: a few cheap passes, where a logarithm would cost ten and round at the powers of
    # two. A rounded quotient never crosses such a power for elapsed times below 2^52.
    exponents = np.true_divide(elapsed_s, unit_s).view(np.int64)
    exponents >>= _MANTISSA_BITS
    exponents -= _EXPONENT_OF_ONE
    np.maximum(exponents, 0, out=exponents)
    return np.minimum(exponents, n_buckets - 1, out=exponents)


def elapsed_units(elapsed_s: NDArray[np.int64], unit_s: int, n_units: int) -> NDArray[np.int64]:
    """Return the whole number of elapsed units, any shape, in 0 .. n_units-1.

    >>> elapsed_units(np.array([-5, 0, 59, 60, 1000]), unit_s=60, n_units=10).tolist()
    [0, 0, 0, 1, 9]
    """
    return np.clip(elapsed_s // unit_s, 0, n_units - 1)
