"""A bench of two tiny bundles."""

from pathlib import Path

import pytest

from loadtest.chaos.bench import Bench
from loadtest.chaos.pool import Expected, Pool, expect, make_pool
from tests.service.tiny_bundle import make_bundle

Tiny = tuple[Path, Path]


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Two versions of a tiny model, each with its checkpoint beside it."""
    return (
        make_bundle(tmp_path_factory.mktemp("served"), gain=4.0),
        make_bundle(tmp_path_factory.mktemp("other"), version="tiny-2", seed=2, gain=4.0),
    )


@pytest.fixture(scope="session")
def pool(bundles: Tiny) -> Pool:
    return make_pool(bundles[0], 30, 5)


@pytest.fixture(scope="session")
def expected(
    bundles: Tiny, pool: Pool, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Expected, Expected]:
    folder = tmp_path_factory.mktemp("expected")
    served, other = bundles
    return expect(served, pool, folder), expect(other, pool, folder)


@pytest.fixture
def bench(bundles: Tiny, pool: Pool, expected: tuple[Expected, Expected], tmp_path: Path) -> Bench:
    """Short faults, and a deadline that a busy machine keeps."""
    return Bench(
        bundles=bundles,
        expected=expected,
        checkpoint=bundles[0].parent / "model.pt",
        pool=pool,
        folder=tmp_path,
        capacity=400.0,
        rate=50.0,
        seconds=4.0,
        deadline_ms=2000.0,
        slow_clients=50,
        hurried=True,  # beside other tests the lowest priority gets no time
    )
