"""What all tests need: time that a busy machine has, and nothing of who runs them."""

import fcntl
import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# Before anything loads onnxruntime: no test tells anybody of anything.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
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


@pytest.fixture(autouse=True)
def _turn(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Run beside the tests of other processes, or without them where it is marked `alone`."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        yield
        return
    folder = tmp_path_factory.getbasetemp().parent
    alone = request.node.get_closest_marker("alone") is not None
    with (folder / "door").open("w") as door, (folder / "room").open("w") as room:
        # Who waits inside the door lets nobody else in: the room empties for who wants it alone.
        fcntl.flock(door, fcntl.LOCK_EX)
        fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(door, fcntl.LOCK_UN)
        yield
        # To close it would not do: a forked process may have it open.
        fcntl.flock(room, fcntl.LOCK_UN)
