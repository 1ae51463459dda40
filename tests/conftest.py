"""What all tests need: time that a busy machine has, and nothing of who runs them."""

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# Before anything loads torch or polars: several test processes share the cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    for _name in ("OMP", "MKL", "OPENBLAS"):
        os.environ.setdefault(f"{_name}_NUM_THREADS", "1")
    os.environ.setdefault("POLARS_MAX_THREADS", "1")

settings.register_profile("tests", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")


@pytest.fixture(scope="session", autouse=True)
def clean_environment() -> Iterator[None]:
    """Settings of the developer's own service must not reach the tests."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith("MNEME_") or name == "REDIS_URL":
                patch.delenv(name)
        yield
