"""`POST /recommend` over real HTTP: the best of the catalogue, and `/score` meanwhile."""

import json
import re
import time
from typing import Any

import numpy as np
import pytest

from service.metrics import STAGES
from service.schemas import MAX_RECOMMENDATIONS, RecommendAnswer
from tests.service.dummy_model import HISTORY_LENGTH, KNOWN_ITEMS, score_of
from tests.service.histories import DAY_S, NOW, records, steps
from tests.service.live_service import in_background, wait_until
from tests.service.problem_answers import assert_invalid, assert_problem, assert_retry

ALL_ITEMS = list(range(1, KNOWN_ITEMS + 1))
BODY = json.dumps({"user_id": "gone", "k": 3}).encode()
REQUEST = b"POST /recommend HTTP/1.1\r\nHost: test\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY


def n_fetched(redis) -> int:
    stats = redis.info("commandstats").get("cmdstat_getrange", {"calls": 0})
    return int(stats["calls"])


class TestRecommend:
    def test_the_answer_says_what_was_found_by_what(self, service, redis):
        redis.set("history:ann", records((5, NOW - 9 * DAY_S), (7, NOW - DAY_S)))
        answer = service.recommend("ann", 3, ranking_time=NOW)
        assert answer.status_code == 200
        assert answer.headers["Content-Type"] == "application/json"
        assert answer.json() == {
            "item_ids": [90, 89, 88],
            "scores": [score_of(item, behaviors=2, oldest=5, day=1) for item in (90, 89, 88)],
            "arm": "main",
            "model": "dummy",
            "version": "dummy-1",
            "history_length": 2,
            "degraded": False,
        }

    @pytest.mark.parametrize("block_items", [1, 7, 89, 90])
    def test_the_scores_are_those_of_score_for_all_items(self, serve, redis, block_items):
        service = serve(recommend_block_items=block_items)
        redis.set("history:ann", records(*steps(5, 6, 7)))
        of_item = dict(
            zip(ALL_ITEMS, service.scores("ann", ALL_ITEMS, ranking_time=NOW + 2), strict=True)
        )
        answer = service.recommend("ann", KNOWN_ITEMS, ranking_time=NOW + 2).json()
        assert answer["item_ids"] == sorted(ALL_ITEMS, key=of_item.__getitem__, reverse=True)
        assert answer["scores"] == [of_item[item] for item in answer["item_ids"]]

    @pytest.mark.parametrize("block_items", [7, 90])
    def test_equal_scores_are_ordered_by_item_id(self, serve, block_items):
        service = serve(recommend_block_items=block_items)
        service.model.answers_with = 0.1
        assert service.recommended(k=20) == ALL_ITEMS[:20]
        assert b'"scores":[0.1]' in service.recommend(k=1).content

    def test_an_unknown_user_is_recommended_to_by_an_empty_history(self, service):
        answer = service.recommend("nobody", 2).json()
        assert answer["scores"] == [score_of(90), score_of(89)]
        assert answer["history_length"] == 0

    def test_an_integer_is_taken_as_its_decimal_string(self, service, redis):
        redis.set("history:4711", records((5, NOW)))
        assert service.recommend(4711).json()["history_length"] == 1

    def test_the_ranking_time_is_now_unless_said(self, service, redis):
        redis.set("history:ann", records((5, int(time.time()) - 5 * DAY_S)))
        expected = [score_of(90, behaviors=1, oldest=5, day=3)]
        assert service.recommend("ann", 1).json()["scores"] == expected

    def test_seen_items_are_left_out_on_request(self, service, redis):
        redis.set("history:ann", records(*steps(90, 89, 3)))
        assert service.recommended("ann", 3) == [90, 89, 88]
        assert service.recommended("ann", 3, exclude_seen=False) == [90, 89, 88]
        assert service.recommended("ann", 3, exclude_seen=True) == [88, 87, 86]

    def test_seen_items_are_those_of_the_whole_stored_history(self, service, redis):
        redis.set("history:ann", records(*steps(*range(90, 90 - 2 * HISTORY_LENGTH, -1))))
        answer = service.recommend("ann", 2, exclude_seen=True).json()
        assert answer["item_ids"] == [74, 73]
        assert answer["history_length"] == HISTORY_LENGTH

    def test_fewer_come_where_no_more_are_unseen(self, service, redis):
        redis.set("history:ann", records(*steps(1, 2, 3)))
        found = service.recommended("ann", KNOWN_ITEMS, exclude_seen=True)
        assert found == ALL_ITEMS[:2:-1]

    def test_an_event_is_seen_at_once(self, service):
        service.events(("ann", 90, NOW))
        assert service.recommended("ann", 1, exclude_seen=True) == [89]

    def test_server_timing_says_where_the_time_went(self, service):
        timing = service.recommend().headers["Server-Timing"]
        stages = dict(re.findall(r"(\w+);dur=(\d+\.\d{3})(?:, |$)", timing))
        assert list(stages) == ["fetch", "encode", "infer", "queue", "respond", "total"]
        parts = sum(float(ms) for stage, ms in stages.items() if stage != "total")
        assert parts <= float(stages["total"]) + 0.01

    def test_recommendations_are_counted_beside_scores_and_not_among_them(self, serve, redis):
        service = serve()
        redis.set("history:ann", records(*steps(1, 2, 3)))
        service.recommended("ann")
        service.recommended("nobody")
        assert service.metric("mneme_requests_total", route="/recommend", status="200") == 2
        assert service.metric("mneme_history_behaviors_sum") == 3
        for stage in STAGES:
            assert service.metric("mneme_recommend_seconds_count", stage=stage) == 2
            assert service.metric("mneme_stage_seconds_count", stage=stage) == 0

    def test_the_documented_fields_are_those_of_the_answer(self, service):
        """The answer is written without the schema; this is what keeps them together."""
        answer = service.recommend().json()
        assert set(answer) == set(RecommendAnswer.model_fields)
        RecommendAnswer.model_validate(answer, strict=True)

    @pytest.mark.parametrize("number", [1 / 3, -0.0, float(np.finfo(np.float32).max)])
    def test_a_score_parses_back_to_the_very_same_float32(self, service, number):
        service.model.answers_with = number
        (score,) = json.loads(service.recommend(k=1).content)["scores"]
        assert np.float32(score).tobytes() == np.float32(number).tobytes()


def bad(name: str, field: str, reason: str, **fields: Any) -> Any:
    return pytest.param(fields, field, reason, id=name)


BAD = [
    bad("k of 0", "k", "greater than or equal to 1", k=0),
    bad("k below 0", "k", "greater than or equal to 1", k=-1),
    bad("k of 1,001", "k", "less than or equal to 1000", k=MAX_RECOMMENDATIONS + 1),
    bad("more than the catalogue", "k", "at most 90, the items of the catalogue", k=91),
    bad("k of 1.0", "k", "valid integer", k=1.0),
    bad("k in a string", "k", "valid integer", k="3"),
    bad("k of true", "k", "valid integer", k=True),
    bad("no k", "k", "valid integer", k=None),
    bad("empty user", "user_id", "1 .. 128 bytes", user_id=""),
    bad("user of true", "user_id", "valid string", user_id=True),
    bad("exclude_seen of 1", "exclude_seen", "valid boolean", exclude_seen=1),
    bad("exclude_seen in words", "exclude_seen", "valid boolean", exclude_seen="yes"),
    bad("exclude_seen of null", "exclude_seen", "valid boolean", exclude_seen=None),
    bad("milliseconds", "ranking_time", "less than or equal", ranking_time=1_700_000_000_000),
    bad("time below 0", "ranking_time", "greater than or equal to 0", ranking_time=-1),
    bad("candidates", "candidates", "Extra inputs are not permitted", candidates=[1]),
    bad("history", "history", "Extra inputs are not permitted", history=[]),
    bad("field of another case", "K", "Extra inputs are not permitted", K=1),
    bad("named as the headers are", "header", "Extra inputs are not permitted", header=1),
]


class TestBadRequests:
    @pytest.mark.parametrize(("fields", "field", "reason"), BAD)
    def test_a_bad_field_is_named_with_its_reason(self, service, fields, field, reason):
        assert_invalid(service.recommend(**fields), field, reason)
        assert service.model.runs == []

    @pytest.mark.parametrize("missing", ["user_id", "k"])
    def test_a_missing_field_is_named(self, service, missing):
        body = {"user_id": "ann", "k": 1}
        del body[missing]
        assert_invalid(service.client.post("/recommend", json=body), missing, "Field required")

    @pytest.mark.parametrize(
        ("body", "reason"),
        [
            pytest.param(b"", "required", id="no body"),
            pytest.param(b"{", "not valid JSON at character 1", id="half a body"),
            pytest.param(b"[]", "valid dictionary", id="a list"),
            pytest.param(b"[" * 100_000, "", id="nested deeply"),
        ],
    )
    def test_a_body_that_is_no_request_is_refused_with_its_reason(self, service, body, reason):
        assert_invalid(service.client.post("/recommend", content=body), "body", reason)

    def test_a_body_that_is_too_large_is_answered_413(self, serve):
        answer = serve(max_body_bytes=10).recommend()
        assert_problem(answer, 413, "body-too-large")

    @pytest.mark.parametrize("deadline_ms", ["0", "-1", "nan", "inf", "60001", "soon", ""])
    def test_a_bad_deadline_is_named_as_score_names_it(self, service, deadline_ms):
        answer = service.recommend(deadline_ms=deadline_ms)
        assert_invalid(answer, "x-deadline-ms", "Input should be")
        assert answer.json()["errors"] == service.score(deadline_ms=deadline_ms).json()["errors"]

    @pytest.mark.parametrize("k", [1, KNOWN_ITEMS, MAX_RECOMMENDATIONS])
    def test_a_click_model_is_refused_before_it_costs_anything(self, serve, redis, k):
        service = serve(score_kind="probability")
        redis.config_resetstat()
        problem = assert_problem(service.recommend(k=k), 409, "not-recommendable")
        assert problem["detail"].startswith("dummy gives the probability of a click")
        assert service.model.runs == []
        assert n_fetched(redis) == 0
        assert service.scores() == [score_of(1)]


class TestHistories:
    @pytest.mark.parametrize("exclude_seen", [False, True])
    @pytest.mark.parametrize(
        "value", [b"x" * 13, records((5, NOW), (0, NOW))], ids=["length", "item 0"]
    )
    def test_a_corrupt_one_is_answered_as_score_answers_it(
        self, service, redis, value, exclude_seen
    ):
        redis.set("history:eve", value)
        before = service.metric("mneme_corrupt_histories_total")
        problem = assert_problem(
            service.recommend("eve", exclude_seen=exclude_seen), 500, "corrupt-history"
        )
        assert problem == service.score("eve").json()
        assert service.metric("mneme_corrupt_histories_total") == before + 2

    def test_without_redis_it_is_answered_503(self, serve, away_url):
        answer = serve(redis_url=away_url).recommend()
        assert_retry(answer, 503, "history-unavailable")

    def test_or_cold_where_the_operator_says_so(self, serve, away_url):
        service = serve(redis_url=away_url, on_redis_failure="cold")
        answer = service.recommend(k=2, exclude_seen=True).json()
        assert answer["item_ids"] == [90, 89]
        assert answer["degraded"] is True
        assert service.metric("mneme_degraded_total") == 1


class TestModelFailures:
    @pytest.mark.parametrize("number", [float("nan"), float("-inf")])
    def test_a_score_that_is_no_number_is_an_error_and_never_json(self, service, number):
        service.model.answers_with = number
        problem = assert_problem(service.recommend(), 500, "model-failed")
        assert "not a finite number" in problem["detail"]
        service.model.answers_with = None
        assert service.recommended(k=1) == [90]

    def test_scores_of_another_shape_are_an_error(self, service):
        service.model.forgets_a_candidate = True
        assert_problem(service.recommend(), 500, "model-failed")


class TestDeadline:
    @pytest.mark.parametrize(
        ("settings", "deadline_ms"),
        [({}, 500), ({"recommend_deadline_s": 0.5}, None)],
        ids=["of the request", "of the settings"],
    )
    def test_a_request_past_its_deadline_costs_no_run(self, serve, settings, deadline_ms):
        service = serve(**settings)
        with in_background() as begin:
            with service.model.held():
                first = begin(service.recommended, "ann", deadline_ms=30_000)
                service.model.wait_until_busy()
                late = begin(service.recommend, "late", deadline_ms=deadline_ms)
                time.sleep(0.51)
            assert first.result() == [90, 89, 88]
            assert_retry(late.result(), 503, "deadline-exceeded")
        assert service.metric("mneme_dropped_total", reason="deadline") == 1
        assert service.model.batch_sizes == [1]

    def test_that_of_score_is_no_other(self, serve):
        """Scores may be late long before recommendations are."""
        service = serve(deadline_s=1e-6)
        assert service.score().status_code == 503
        assert service.recommended() == [90, 89, 88]


class TestClientsThatLeave:
    def test_who_leaves_while_waiting_costs_no_run(self, serve, redis):
        service = serve()
        redis.config_resetstat()
        with in_background() as begin:
            with service.model.held():
                first = begin(service.recommended)
                service.model.wait_until_busy()
                with service.client_that_leaves(REQUEST):
                    wait_until(lambda: n_fetched(redis) == 2, "the second history is read")
            assert first.result() == [90, 89, 88]
        service.wait_for("mneme_requests_total", 1, route="/recommend", status="499")
        assert service.metric("mneme_dropped_total", reason="client left") == 1
        assert service.model.batch_sizes == [1]

    def test_who_leaves_between_two_blocks_costs_no_more_of_them(self, serve):
        service = serve(recommend_block_items=30)
        with service.model.held(), service.client_that_leaves(REQUEST):
            service.model.wait_until_busy()
        service.wait_for("mneme_requests_total", 1, route="/recommend", status="499")
        assert service.model.batch_sizes == [1]


class TestBesideScores:
    def test_a_batch_runs_between_two_blocks(self, serve):
        service = serve(recommend_block_items=30)
        with in_background() as begin:
            with service.model.held():
                recommended = begin(service.recommended, k=1)
                service.model.wait_until_busy()
                scored = begin(service.scores, "nobody", [1, 2])
                # Read and encoded, it has the work of an empty history: it waits for the device.
                service.wait_for("mneme_queued_work", 2)
            assert scored.result() == [score_of(1), score_of(2)]
            assert recommended.result() == [90]
        widths = [run.candidate_items.shape[1] for run in service.model.runs]
        assert widths == [30, 2, 30, 30]

    def test_two_recommendations_leave_room_for_it_as_well(self, serve):
        service = serve(recommend_block_items=45)
        with in_background() as begin:
            with service.model.held():
                recommended = [begin(service.recommended, user) for user in ("ann", "bob")]
                service.model.wait_until_busy()
                scored = begin(service.scores, "nobody", [1])
                service.wait_for("mneme_queued_work", 1)
            assert scored.result() == [score_of(1)]
            assert [one.result() for one in recommended] == [[90, 89, 88]] * 2
        widths = [run.candidate_items.shape[1] for run in service.model.runs]
        assert widths == [45, 1, 45, 45, 45]

    def test_all_are_answered_while_both_go_on(self, serve, redis):
        """Every request within its deadline: nobody is refused, dropped or answered wrongly."""
        service = serve(recommend_block_items=7)
        service.model.takes_s = 0.001
        redis.set("history:ann", records(*steps(90, 89, 3)))

        def recommend() -> None:
            for _ in range(4):
                found = service.recommended("ann", 3, exclude_seen=True)
                assert found == [88, 87, 86]

        def score(n: int) -> None:
            for _ in range(20):
                assert service.scores(f"user {n}", [n, n + 1]) == [score_of(n), score_of(n + 1)]

        with in_background() as begin:
            calls = [begin(recommend) for _ in range(4)]
            calls += [begin(score, n) for n in range(1, 9)]
            for call in calls:
                call.result()
        assert service.metric("mneme_requests_total", route="/score", status="200") == 8 * 20
        assert service.metric("mneme_requests_total", route="/recommend", status="200") == 4 * 4
        # Blocks are no batches.
        assert service.metric("mneme_batch_requests_sum") == 8 * 20
