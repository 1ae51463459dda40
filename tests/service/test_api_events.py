"""`POST /events` over real HTTP, and the bytes that it leaves in Redis."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from service.api_keys import described, make_key
from service.schemas import MAX_EVENTS
from tests.service.dummy_model import HISTORY_LENGTH as KEEP
from tests.service.dummy_model import score_of
from tests.service.histories import NOW, records, steps
from tests.service.problem_answers import assert_invalid, assert_problem, assert_retry

YEAR_S = 365 * 86_400


def outcome(answer: Any) -> tuple[int, int]:
    """Return (appended, duplicates) of an answer that must succeed."""
    assert answer.status_code == 200, answer.text
    assert list(answer.json()) == ["appended", "duplicates"]
    return answer.json()["appended"], answer.json()["duplicates"]


@pytest.fixture
def post_one(service) -> Callable[..., Any]:
    def post(**fields: Any) -> Any:
        body = {"user_id": "ann", "item_id": 5, "time": NOW, **fields}
        return service.client.post("/events", json=body)

    return post


class TestAppend:
    def test_one_behavior_is_twelve_bytes(self, post_one, redis):
        assert outcome(post_one(item_id=0x0102030405060708, time=0x11121314)) == (1, 0)
        assert redis.get("history:ann").hex() == "080706050403020114131211"

    def test_many_keep_each_users_order(self, service, redis):
        """The order posted, not that of the times: the poster knows what came first."""
        posted = [("ann", 1, 30), ("bob", 2, 20), ("ann", 3, 10), (4711, 4, 5), ("ann", 5, 40)]
        assert outcome(service.events(*posted)) == (5, 0)
        assert redis.get("history:ann") == records((1, 30), (3, 10), (5, 40))
        assert redis.get("history:bob") == records((2, 20))
        assert redis.get("history:4711") == records((4, 5))

    def test_a_behavior_counts_in_the_next_score(self, service, post_one):
        assert service.scores("ann", [1]) == [score_of(1)]
        post_one(item_id=5)
        assert service.scores("ann", [1], ranking_time=NOW) == [score_of(1, behaviors=1, oldest=5)]

    @pytest.mark.parametrize("given", [{}, {"time": None}], ids=["no time", "null"])
    def test_without_a_time_it_happened_now(self, service, redis, given):
        before = int(time.time())
        body = {"user_id": "ann", "item_id": 5, **given}
        assert outcome(service.client.post("/events", json=body)) == (1, 0)
        assert redis.get("history:ann") in [
            records((5, second)) for second in range(before, int(time.time()) + 1)
        ]

    def test_a_clock_may_be_a_day_ahead(self, post_one):
        assert outcome(post_one(time=int(time.time()) + 86_000)) == (1, 0)

    def test_up_to_1000_are_taken_at_once(self, service, redis):
        posted = [(f"user {n % 10}", n + 1, NOW) for n in range(MAX_EVENTS)]
        assert outcome(service.events(*posted)) == (MAX_EVENTS, 0)
        assert redis.dbsize() == 10

    def test_a_value_above_twice_the_kept_is_cut_to_the_newest(self, service, redis):
        behaviors = steps(*range(1, 2 * KEEP + 2))
        for half in (behaviors[:KEEP], behaviors[KEEP:-1]):
            service.events(*(("ann", *one) for one in half))
        assert redis.get("history:ann") == records(*behaviors[:-1])
        service.events(("ann", *behaviors[-1]))
        assert redis.get("history:ann") == records(*behaviors[-KEEP:])

    def test_keys_begin_with_the_prefix_of_the_settings(self, serve, redis):
        serve(key_prefix="shop:7").events(("ann", 5, NOW))
        assert redis.keys() == [b"shop:7:ann"]


class TestRepetition:
    def test_it_appends_nothing_and_says_so(self, service, redis):
        posted = [("ann", 1, 10), ("ann", 2, 20), ("bob", 3, 30)]
        assert outcome(service.events(*posted)) == (3, 0)
        stored = redis.get("history:ann"), redis.get("history:bob")
        assert outcome(service.events(*posted)) == (0, 3)
        assert outcome(service.events(posted[1], posted[2], ("bob", 4, 40))) == (1, 2)
        assert redis.get("history:ann") == stored[0]
        assert redis.get("history:bob") == stored[1] + records((4, 40))

    def test_a_duplicate_within_one_call_counts_as_one(self, service, redis):
        assert outcome(service.events(("ann", 1, 10), ("ann", 1, 10))) == (1, 1)
        assert redis.get("history:ann") == records((1, 10))

    def test_an_integer_and_its_string_are_one_user(self, service):
        assert outcome(service.events((4711, 1, 10), ("4711", 1, 10))) == (1, 1)

    def test_many_clients_at_once_append_once(self, service, redis):
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: service.events(("ann", 1, 10)), range(24)))
        assert sorted(map(outcome, answers)) == [(0, 1)] * 23 + [(1, 0)]
        assert redis.get("history:ann") == records((1, 10))

    def test_outcomes_are_counted(self, serve, redis):
        service = serve()
        redis.set("history:eve", b"broken")
        service.events(("ann", 1, 10), ("ann", 2, 20))
        service.events(("ann", 1, 10), ("ann", 3, 30), ("eve", 1, 1), ("eve", 2, 2))
        assert service.metric("mneme_events_total", outcome="appended") == 3
        assert service.metric("mneme_events_total", outcome="duplicate") == 1
        assert service.metric("mneme_events_total", outcome="refused") == 2


class TestIdempotencyKey:
    @pytest.fixture
    def post(self, service) -> Callable[..., Any]:
        def call(key: str, body: dict[str, Any]) -> Any:
            return service.client.post("/events", json=body, headers={"Idempotency-Key": key})

        return call

    def test_a_repetition_without_a_time_appends_nothing_and_is_answered_alike(self, post, redis):
        body = {"events": [{"user_id": "ann", "item_id": 1}, {"user_id": "bob", "item_id": 2}]}
        first, again = post("k", body), post("k", body)
        assert outcome(first) == (2, 0)
        assert again.json() == first.json()
        assert redis.strlen("history:ann") == redis.strlen("history:bob") == 12

    def test_another_body_is_answered_422_and_nothing_is_appended(self, post, redis):
        post("k", {"user_id": "ann", "item_id": 1})
        answer = post("k", {"user_id": "bob", "item_id": 1})
        problem = assert_problem(answer, 422, "idempotency-key-reused")
        assert problem["detail"].startswith("Idempotency-Key: it came with another body")
        assert redis.get("history:bob") is None

    def test_callers_with_different_api_keys_may_number_alike(self, serve, tmp_path, redis):
        callers = {name: make_key() for name in ("shop", "web")}
        path = tmp_path / "keys.toml"
        path.write_text("".join(described(*one, roles=["events"]) for one in callers.items()))
        service = serve(api_keys=path)

        def post(caller: str, item: int) -> Any:
            return service.client.post(
                "/events",
                json={"user_id": "ann", "item_id": item},
                headers={"Idempotency-Key": "1", "Authorization": f"Bearer {callers[caller]}"},
            )

        assert [outcome(post("shop", 1)), outcome(post("web", 2))] == [(1, 0)] * 2
        assert redis.strlen("history:ann") == 24
        assert [outcome(post("shop", 1)), outcome(post("web", 2))] == [(1, 0)] * 2
        assert redis.strlen("history:ann") == 24
        assert_problem(post("shop", 2), 422, "idempotency-key-reused")

    def test_white_space_and_order_are_no_other_body(self, service, post, redis):
        assert outcome(post("k", {"user_id": "ann", "item_id": 1})) == (1, 0)
        answer = service.client.post(
            "/events",
            content=b'{ "item_id":1,\n"user_id" : "ann" }',
            headers={"Idempotency-Key": "k"},
        )
        assert outcome(answer) == (1, 0)
        assert redis.strlen("history:ann") == 12

    @pytest.mark.parametrize("key", ["", "a b", "x" * 257, "\u00e9"], ids=repr)
    def test_what_is_no_key_is_named(self, service, redis, key):
        answer = service.client.post(
            "/events",
            json={"user_id": "ann", "item_id": 1},
            headers={"Idempotency-Key": key.encode("latin-1")},
        )
        assert_invalid(answer, "idempotency-key", "String should match pattern")
        assert redis.keys() == []

    def test_a_structured_string_is_a_key(self, post):
        """As the draft of the IETF writes it."""
        body = {"user_id": "ann", "item_id": 1}
        assert outcome(post('"8e03978e-40d5-43dd-bc93-6894a57f9324"', body)) == (1, 0)

    def test_what_was_appended_earlier_counts_as_duplicate(self, serve):
        service = serve()
        for _ in range(3):
            service.client.post(
                "/events",
                json={"user_id": "ann", "item_id": 1},
                headers={"Idempotency-Key": "k"},
            )
        assert service.metric("mneme_events_total", outcome="appended") == 1
        assert service.metric("mneme_events_total", outcome="duplicate") == 2


class TestLateEvents:
    """They are stored when they come, and read where they belong."""

    def test_a_score_reads_them_by_time(self, service):
        service.events(("ann", 7, NOW), ("ann", 5, NOW - 100))
        (score,) = service.scores("ann", [1], ranking_time=NOW)
        assert score == score_of(1, behaviors=2, oldest=5)

    def test_so_does_the_history_page(self, service, redis):
        service.events(("ann", 7, NOW), ("ann", 5, NOW - 100), ("ann", 6, NOW - 100))
        found = service.client.get("/users/ann/history").json()["behaviors"]
        assert [one["item_id"] for one in found] == [5, 6, 7]
        assert redis.get("history:ann") == records((7, NOW), (5, NOW - 100), (6, NOW - 100))

    def test_so_does_an_explanation(self, serve):
        service = serve(explains=True)
        service.events(("ann", 7, NOW), ("ann", 5, NOW - 100))
        body = {"user_id": "ann", "candidates": [1], "ranking_time": NOW}
        found = service.client.post("/explain", json=body).json()
        assert [one["item_id"] for one in found["behaviors"]] == [5, 7]
        assert found["candidates"][0]["score"] == service.scores("ann", ranking_time=NOW)[0]


class TestCorruptHistories:
    @pytest.mark.parametrize("value", [b"x", b"\x01" * (12 * KEEP + 1)], ids=["short", "long"])
    def test_the_value_stays_and_other_users_are_served(self, service, redis, value):
        redis.set("history:eve", value)
        before = service.metric("mneme_corrupt_appends_total")
        answer = service.events(("ann", 1, 10), ("eve", 2, 20), ("bob", 3, 30))
        problem = assert_problem(answer, 500, "corrupt-history")
        assert "the history of user 'eve' cannot be read" in problem["detail"]
        assert redis.get("history:eve") == value
        assert redis.get("history:ann") == records((1, 10))
        assert redis.get("history:bob") == records((3, 30))
        assert service.metric("mneme_corrupt_appends_total") == before + 1

    def test_a_value_of_another_type_stays(self, service, redis):
        redis.hset("history:eve", "a", "b")
        assert_problem(service.events(("eve", 2, 20)), 500, "corrupt-history")
        assert redis.hgetall("history:eve") == {b"a": b"b"}


BAD_FIELDS = [
    pytest.param({"item_id": 0}, "item_id", "greater than or equal to 1", id="item 0"),
    pytest.param({"item_id": -1}, "item_id", "greater than or equal to 1", id="negative item"),
    pytest.param({"item_id": 2**63}, "item_id", "less than or equal to", id="item 2**63"),
    pytest.param({"item_id": "5"}, "item_id", "valid integer", id="item in a string"),
    pytest.param({"item_id": 5.0}, "item_id", "valid integer", id="float item"),
    pytest.param({"item_id": True}, "item_id", "valid integer", id="bool item"),
    pytest.param({"item_id": None}, "item_id", "valid integer", id="null item"),
    pytest.param({"time": -1}, "time", "greater than or equal to 0", id="time below 0"),
    pytest.param({"time": 2**32}, "time", "less than or equal to", id="time in 2106"),
    pytest.param({"time": 1.5}, "time", "valid integer", id="float time"),
    pytest.param({"user_id": ""}, "user_id", "1 .. 128 bytes", id="empty user"),
    pytest.param({"user_id": "x" * 129}, "user_id", "got 129", id="129 bytes of user"),
    pytest.param({"user_id": False}, "user_id", "valid string", id="bool user"),
    pytest.param({"when": 1}, "when", "Extra inputs", id="unknown field"),
]


class TestBadRequests:
    @pytest.mark.parametrize(("fields", "field", "reason"), BAD_FIELDS)
    def test_a_bad_field_of_one_is_named(self, post_one, redis, fields, field, reason):
        assert_invalid(post_one(**fields), field, reason)
        assert redis.keys() == []

    @pytest.mark.parametrize(("fields", "field", "reason"), BAD_FIELDS)
    def test_a_bad_field_of_many_is_named_with_its_place(
        self, service, redis, fields, field, reason
    ):
        """And nothing of the call is written."""
        good = {"user_id": "ann", "item_id": 5, "time": NOW}
        answer = service.client.post("/events", json={"events": [good, {**good, **fields}]})
        assert_invalid(answer, f"events.1.{field}", reason)
        assert redis.keys() == []

    @pytest.mark.parametrize(
        ("body", "field", "reason"),
        [
            pytest.param({}, "user_id", "Field required", id="nothing"),
            pytest.param([], "body", "valid dictionary", id="a list"),
            pytest.param({"events": []}, "events", "at least 1 item", id="no events"),
            pytest.param({"events": None}, "events", "valid list", id="null events"),
            pytest.param({"events": [5]}, "events.0", "valid dictionary", id="no event"),
            pytest.param(
                {"events": [{"user_id": "a", "item_id": 1}] * (MAX_EVENTS + 1)},
                "events",
                "at most 1000 items",
                id="1,001 events",
            ),
            pytest.param(
                {"events": [{"user_id": "a", "item_id": 1}], "user_id": "a"},
                "user_id",
                "Extra inputs",
                id="one and many",
            ),
        ],
    )
    def test_a_body_that_is_no_event_is_refused(self, service, body, field, reason):
        assert_invalid(service.client.post("/events", json=body), field, reason)

    def test_a_time_far_in_the_future_is_refused_and_named(self, service, post_one, redis):
        """Milliseconds for seconds, or a clock that is years ahead."""
        future = int(time.time()) + YEAR_S
        problem = assert_problem(post_one(time=future), 422, "invalid-request")
        assert problem["detail"].startswith(f"time: {future} lies more than 86400 s in the future")
        answer = service.events(("ann", 1, NOW), ("ann", 2, future))
        problem = assert_problem(answer, 422, "invalid-request")
        assert problem["detail"].startswith(f"events.1.time: {future} lies more than 86400 s")
        assert redis.keys() == []

    def test_how_far_is_a_setting(self, serve):
        service = serve(max_clock_skew_s=0)
        answer = service.events(("ann", 1, int(time.time()) + 60))
        problem = assert_problem(answer, 422, "invalid-request")
        assert "more than 0 s in the future" in problem["detail"]


def test_a_redis_that_refuses_to_write_is_away(service, redis):
    redis.config_set("maxmemory", 1)
    try:
        assert_retry(service.events(("ann", 1, NOW)), 503, "history-unavailable")
    finally:
        redis.config_set("maxmemory", 0)
    assert outcome(service.events(("ann", 1, NOW))) == (1, 0)
