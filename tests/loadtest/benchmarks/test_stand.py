"""The test stand on a real Redis and a real service."""

import os

import httpx
import numpy as np
import pytest
import redis

from contract.records import RECORD_BYTES
from loadtest.benchmarks.stand import StandError, histories, make_requests, pinned, service
from tests.service.tiny_bundle import make_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("bundle"))


def test_every_user_has_a_full_history_and_known_candidates(bundle):
    requests = make_requests(bundle, n=3, candidates=5)
    known = set(np.load(bundle / "catalogue.npy").tolist())
    assert all(set(items) <= known for items in requests.candidates)
    with histories(bundle, 7, n=3) as url, redis.Redis.from_url(url) as client:
        lengths = [client.strlen(f"history:{user}") for user in requests.users]
    assert lengths == [7 * RECORD_BYTES] * 3


def test_the_service_answers_on_its_cores_and_ends(bundle):
    requests = make_requests(bundle, n=2, candidates=4)
    core = min(os.sched_getaffinity(0))
    with (
        histories(bundle, 8, n=2) as url,
        service(bundle, url, cores=[core], threads=1) as running,
    ):
        assert os.sched_getaffinity(running.pid) == {core}
        answer = httpx.post(f"{running.url}/score", content=requests.bodies()[0])
        assert answer.json()["history_length"] == 8
        assert len(answer.json()["scores"]) == 4
        assert running.metric("mneme_batch_requests_count") == 1
        assert running.cpu_s() > 0
        assert running.rss_bytes() > 1_000_000
        pid = running.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_service_that_does_not_start_is_an_error(bundle):
    with (
        pytest.raises(StandError, match="ended with status 2"),
        service(bundle, "no url", cores=[0], threads=1),
    ):
        pass


def test_the_caller_is_where_it_was_after_the_block():
    before = os.sched_getaffinity(0)
    with pinned([min(before)]):
        assert os.sched_getaffinity(0) == {min(before)}
    assert os.sched_getaffinity(0) == before
