"""Ids in and out, slow requests with their stages, and nobody's name in the log."""

import re
from typing import ClassVar

import numpy as np
import pytest

from service.history import HistoryStore
from service.metrics import STAGES
from service.redis_nodes import connect
from service.request_log import Allowance, stages_of
from service.scorer import Scored
from tests.service.live_service import PATIENCE_S

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
USER, CANDIDATE = "somebody-in-particular", 777_777_777
ALL_ARE_SLOW = {"slow_request_s": 1e-9}


class BrokenStore(HistoryStore):
    """Has a bug whose message names a user."""

    async def fetch(self, user_ids, length, *, timeout_s=0.0):
        del length, timeout_s
        raise KeyError(user_ids[0])


@pytest.fixture
def broken_store(redis_url):
    return BrokenStore(connect(redis_url, timeout_s=5.0), prefix="history", keep=8)


def parent_of(traceparent: str) -> str:
    """Return the span of a header that must be well formed."""
    found = re.fullmatch(r"00-[0-9a-f]{32}-([0-9a-f]{16})-0[01]", traceparent)
    assert found, traceparent
    return found[1]


REQUESTS = [
    pytest.param("POST", "/score", {"user_id": "ann", "candidates": [1]}, 200, id="scores"),
    pytest.param("POST", "/score", {"user_id": "ann"}, 422, id="no candidates"),
    pytest.param("POST", "/score", {"user_id": "x" * 300_000}, 413, id="too large"),
    pytest.param("GET", "/score", None, 405, id="another method"),
    pytest.param("POST", "/recommend", {"user_id": "ann", "k": 1}, 200, id="items"),
    pytest.param("POST", "/events", {"user_id": "ann", "item_id": 1}, 200, id="an event"),
    pytest.param("GET", "/healthz", None, 200, id="health"),
    pytest.param("GET", "/nowhere", None, 404, id="nowhere"),
]


class TestIds:
    @pytest.mark.parametrize(("method", "path", "body", "status"), REQUESTS)
    def test_every_answer_says_the_ids_of_its_request(self, service, method, path, body, status):
        given = {"X-Request-Id": "checkout-17", "traceparent": f"00-{TRACE}-{PARENT}-01"}
        answer = service.client.request(method, path, json=body, headers=given)
        assert answer.status_code == status
        assert answer.headers.get_list("X-Request-Id") == ["checkout-17"]
        (traceparent,) = answer.headers.get_list("traceparent")
        assert traceparent.startswith(f"00-{TRACE}-")
        assert parent_of(traceparent) != PARENT

    @pytest.mark.parametrize(("method", "path", "body", "status"), REQUESTS)
    def test_ids_are_made_where_none_came(self, service, method, path, body, status):
        answers = [service.client.request(method, path, json=body) for _ in range(2)]
        assert [answer.status_code for answer in answers] == [status] * 2
        for header in ("X-Request-Id", "traceparent"):
            assert len({answer.headers[header] for answer in answers}) == 2
        parent_of(answers[0].headers["traceparent"])

    def test_ids_that_are_not_valid_are_replaced(self, service):
        given = [
            ("X-Request-Id", "<script>"),
            ("traceparent", f"00-{TRACE}-{PARENT}-01"),
            ("traceparent", f"00-{TRACE}-{PARENT}-01"),
        ]
        body = {"user_id": "ann", "candidates": [1]}
        answer = service.client.post("/score", json=body, headers=given)
        assert re.fullmatch("[0-9a-f]{32}", answer.headers["X-Request-Id"])
        assert TRACE not in answer.headers["traceparent"]
        parent_of(answer.headers["traceparent"])

    def test_a_fault_of_the_service_is_found_by_the_ids_of_its_answer(
        self, serve, logged, broken_store
    ):
        answer = serve(history=broken_store).score()
        assert answer.status_code == 500
        (event,) = logged.events("request-failed")
        assert event["request_id"] == answer.headers["X-Request-Id"]
        assert event["span_id"] == parent_of(answer.headers["traceparent"])
        assert event["route"] == "/score"
        assert event["traceback"].endswith("KeyError")


class TestSlow:
    def test_a_slow_request_is_told_with_where_its_time_went(self, serve, logged):
        service = serve(slow_request_s=0.02)
        service.model.takes_s = 0.03
        given = {"X-Request-Id": "slow-1", "traceparent": f"00-{TRACE}-{PARENT}-00"}
        body = {"user_id": "ann", "candidates": [1]}
        answer = service.client.post("/score", json=body, headers=given)
        (event,) = logged.wait_for("request-slow")
        assert (event["level"], event["route"], event["status"]) == ("warning", "/score", 200)
        assert (event["request_id"], event["trace_id"]) == ("slow-1", TRACE)
        assert event["parent_id"] == PARENT
        assert event["span_id"] == parent_of(answer.headers["traceparent"])
        assert (event["arm"], event["version"]) == ("main", "dummy-1")
        stages_s = event["stages_s"]
        assert set(stages_s) == set(STAGES)
        assert stages_s["infer"] >= 0.03
        assert event["taken_s"] >= stages_s["total"] >= stages_s["infer"]
        assert event["withheld"] == 0
        timing = dict(part.split(";dur=") for part in answer.headers["Server-Timing"].split(", "))
        assert float(timing["infer"]) / 1000 == pytest.approx(stages_s["infer"], abs=2e-6)

    def test_unless_said_otherwise_slow_is_later_than_the_deadline(self, serve, logged):
        service = serve(deadline_s=0.004)
        service.model.takes_s = 0.005
        assert service.score(deadline_ms=30_000).status_code == 200
        logged.wait_for("request-slow")

    def test_a_recommendation_has_a_deadline_of_its_own(self, serve, logged):
        service = serve(deadline_s=0.004, recommend_deadline_s=PATIENCE_S)
        service.model.takes_s = 0.005
        service.recommended()
        (event,) = logged.wait_for("request-answered")
        assert set(event["stages_s"]) == set(STAGES)
        assert logged.events("request-slow") == []

    @pytest.mark.parametrize(
        ("method", "path", "body"),
        [
            ("POST", "/recommend", {"user_id": "ann", "k": 1}),
            ("POST", "/events", {"user_id": "ann", "item_id": 1}),
        ],
        ids=["recommend", "events"],
    )
    def test_other_routes_that_have_work_to_do_are_slow_too(
        self, serve, logged, method, path, body
    ):
        assert serve(**ALL_ARE_SLOW).client.request(method, path, json=body).status_code == 200
        (event,) = logged.wait_for("request-slow")
        assert event["route"] == path

    @pytest.mark.parametrize("path", ["/metrics", "/healthz", "/nowhere"])
    def test_what_people_and_monitors_look_at_is_never_slow(self, serve, logged, path):
        serve(**ALL_ARE_SLOW).client.get(path)
        (event,) = logged.wait_for("request-answered")
        assert event["route"] == ("other" if path == "/nowhere" else path)
        assert logged.events("request-slow") == []

    def test_one_that_was_not_scored_is_told_without_stages(self, serve, logged):
        service = serve(**ALL_ARE_SLOW)
        service.model.fails_with = ZeroDivisionError()
        assert service.score().status_code == 500
        (event,) = logged.wait_for("request-slow")
        assert event["status"] == 500
        assert "stages_s" not in event

    def test_no_more_than_so_many_a_second_are_told(self, serve, logged):
        service = serve(**ALL_ARE_SLOW, slow_log_per_s=0.001)
        for _ in range(4):
            service.scores()
        logged.wait_for("request-answered", 3)  # a debugger sees the others
        assert len(logged.events("request-slow")) == 1

    def test_a_request_in_time_is_told_to_debuggers_only(self, serve, logged):
        serve(slow_request_s=PATIENCE_S).scores()
        (event,) = logged.wait_for("request-answered")
        assert event["level"] == "debug"
        assert logged.events("request-slow") == []


class TestAllowance:
    def test_those_of_a_second_may_come_at_once(self):
        allowance = Allowance(2.0)
        assert [allowance.take(10.0) for _ in range(4)] == [0, 0, None, None]

    def test_time_lets_others_pass_and_they_say_how_many_did_not(self):
        allowance = Allowance(2.0)
        for _ in range(5):
            allowance.take(10.0)
        assert allowance.take(10.25) is None
        assert allowance.take(10.5) == 4
        assert allowance.take(10.5) is None

    def test_no_more_gather_than_those_of_a_second(self):
        allowance = Allowance(2.0)
        allowance.take(10.0)
        assert [allowance.take(99.0) for _ in range(3)] == [0, 0, None]

    def test_less_than_one_a_second(self):
        allowance = Allowance(0.5)
        assert [allowance.take(t) for t in (10.0, 11.0, 12.0)] == [0, None, 1]

    def test_none_at_all(self):
        allowance = Allowance(0.0)
        assert [allowance.take(t) for t in (10.0, 1e6)] == [None, None]


class TestPersonalData:
    BODY: ClassVar = {"user_id": USER, "candidates": [CANDIDATE]}

    def test_nobody_is_named_unless_asked_for(self, serve, logged, broken_store):
        well, broken = serve(**ALL_ARE_SLOW), serve(**ALL_ARE_SLOW, history=broken_store)
        for service in (well, broken):
            service.client.post("/score", json=self.BODY)
            service.client.post("/score", json={**self.BODY, "arm": "unknown"})
            service.client.post("/recommend", json={"user_id": USER, "k": 1})
            service.client.post("/events", json={"user_id": USER, "item_id": CANDIDATE})
        well.client.get(f"/{USER}")
        logged.wait_for("request-slow", 8)
        logged.wait_for("request-answered", 1)
        assert len(logged.events("request-failed")) == 2
        assert USER not in logged.text
        assert str(CANDIDATE) not in logged.text

    def test_who_asks_for_them_finds_users_and_candidates(self, serve, logged):
        service = serve(**ALL_ARE_SLOW, log_personal_data=True)
        service.client.post("/score", json=self.BODY)
        service.client.post("/recommend", json={"user_id": USER, "k": 1})
        score, recommend = logged.wait_for("request-slow", 2)
        assert (score["user_id"], score["candidates"]) == (USER, [CANDIDATE])
        assert recommend["user_id"] == USER
        assert "candidates" not in recommend


class TestStages:
    def scored(self) -> Scored:
        return Scored(
            scores=np.zeros(1, dtype=np.float32),
            history_length=0,
            unknown_candidates=0,
            degraded=False,
            began=10.0,
            fetch_s=1.0,
            encode_s=0.5,
            infer_s=3.0,
            ended=20.0,
        )

    def test_they_follow_one_another_and_the_two_waits_add_up(self):
        stages = list(stages_of(self.scored(), {"queue": 7.5}))
        assert stages == [
            ("queue", 8.0, 10.0),
            ("fetch", 10.0, 11.0),
            ("encode", 11.0, 11.5),
            ("queue", 11.5, 17.0),
            ("infer", 17.0, 20.0),
        ]

    def test_none_ends_before_it_begins(self):
        """Waits are told by another clock reading than the rest."""
        stages = list(stages_of(self.scored(), {"queue": 5.0}))
        assert stages[0] == ("queue", 10.0, 10.0)

    def test_without_scores_there_are_none(self):
        assert list(stages_of(None, {})) == []
