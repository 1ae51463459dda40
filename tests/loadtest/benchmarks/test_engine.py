"""How straight a line is."""

import pytest

from loadtest.benchmarks.engine import linear_r2


def test_points_on_a_line_have_one():
    assert linear_r2([1, 2, 5], [3, 5, 11]) == pytest.approx(1.0)


def test_a_parabola_is_no_line():
    """At 0, 1, 2 the line through 0, 1, 4 is 2x - 1/3: residuals 1/3, -2/3, 1/3."""
    assert linear_r2([0, 1, 2], [0, 1, 4]) == pytest.approx(1 - (6 / 9) / (26 / 3))
