"""Steps of making a bundle."""

import pytest

from loadtest.bundles import BundleError, step


def test_a_step_that_fails_says_why():
    with pytest.raises(BundleError, match=r"/nonexistent\.csv"):
        step("training", "prepare", "/nonexistent.csv", "/nonexistent/target")
