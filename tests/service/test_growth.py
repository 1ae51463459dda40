"""What a service keeps does not grow with what it has been asked."""

import gc

import pytest

from tests.service.histories import NOW
from tests.service.live_service import LiveService

ROUNDS = 60


def ask(service: LiveService, first: int) -> None:
    """Ask everything that there is, every time for another user, item, path and id."""
    for n in range(first, first + ROUNDS):
        user, headers = f"user {n}", {"X-Request-Id": f"request-{n}"}
        client = service.client
        statuses = [
            service.events((user, n + 1, NOW + n)).status_code,
            service.score(user, [n % 90 + 1] * (n % 20 + 1), ranking_time=NOW + n).status_code,
            service.recommend(user, n % 90 + 1).status_code,
            client.post(
                "/explain", json={"user_id": user, "candidates": [n + 1]}, headers=headers
            ).status_code,
            client.get(f"/users/{n}/history").status_code,
            client.get("/items/sample", params={"limit": n % 100 + 1}).status_code,
            client.get(f"/nowhere/{n}").status_code,
            client.request("PROPFIND", f"/score/{n}").status_code,
            service.score(user, arm=f"arm-{n % 30}").status_code,
            service.score(user, [0]).status_code,
        ]
        assert statuses == [200, 200, 200, 200, 200, 200, 404, 404, 422, 422]


def n_objects(service: LiveService) -> int:
    service.model.reset()  # it keeps its runs
    gc.collect()
    return len(gc.get_objects())


@pytest.fixture
def asked(serve) -> LiveService:
    """A service that has met one of everything."""
    service: LiveService = serve(explains=True)
    ask(service, 0)
    service.client.get("/metrics")
    return service


def test_not_the_number_of_its_objects(asked):
    """Fewer than one more for every ten requests."""
    before = n_objects(asked)
    ask(asked, ROUNDS)
    assert n_objects(asked) - before < ROUNDS


def test_not_the_number_of_its_series(asked):
    before = asked.client.get("/metrics").text.count("\n")
    ask(asked, ROUNDS)
    assert asked.client.get("/metrics").text.count("\n") == before
