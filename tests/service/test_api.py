"""The routes over real HTTP: `POST /score`, and what operators ask."""

import re
import time
from typing import Any

import pytest

from service.metrics import STAGES
from service.schemas import MAX_CANDIDATES, MAX_INLINE_BEHAVIORS
from tests.service.dummy_model import HISTORY_LENGTH, KNOWN_ITEMS, UNKNOWN, score_of
from tests.service.histories import DAY_S, NOW, records, steps
from tests.service.problem_answers import assert_invalid, assert_problem


def behaviors(*pairs: tuple[Any, Any]) -> list[dict[str, Any]]:
    return [{"item_id": item, "time": when} for item, when in pairs]


class TestScore:
    def test_the_answer_says_what_was_scored_by_what(self, service, redis):
        redis.set("history:ann", records((5, NOW - 9 * DAY_S), (7, NOW - DAY_S)))
        answer = service.score("ann", [3, 1, 91], ranking_time=NOW)
        assert answer.status_code == 200
        assert answer.json() == {
            "scores": [score_of(c, behaviors=2, oldest=5, day=1) for c in (3, 1, UNKNOWN)],
            "score_kind": "affinity",
            "arm": "main",
            "model": "dummy",
            "version": "dummy-1",
            "history_length": 2,
            "unknown_candidates": 1,
            "degraded": False,
        }

    def test_scores_come_in_the_order_asked(self, service):
        asked = [*range(KNOWN_ITEMS, 0, -7), *range(1, KNOWN_ITEMS, 5)]
        assert service.scores(candidates=asked) == [score_of(c) for c in asked]

    @pytest.mark.parametrize("asked", [[4, 2, 4], [4, 4, 4]], ids=["one twice", "one only"])
    def test_an_item_that_stands_twice_is_scored_twice(self, service, asked):
        assert service.scores(candidates=asked) == [score_of(c) for c in asked]

    def test_an_unknown_user_is_scored_with_an_empty_history(self, service):
        answer = service.score("nobody", [3])
        assert answer.json()["scores"] == [score_of(3)]
        assert answer.json()["history_length"] == 0

    def test_an_integer_is_taken_as_its_decimal_string(self, service, redis):
        redis.set("history:4711", records((5, NOW)))
        assert service.scores(4711, ranking_time=NOW) == [score_of(1, behaviors=1, oldest=5)]
        assert service.scores("4711", ranking_time=NOW) == service.scores(4711, ranking_time=NOW)
        assert service.scores("04711") == [score_of(1)]

    @pytest.mark.parametrize(
        "user_id",
        ["x" * 128, "é" * 64, "a b:c\n", "\x00", "⭐", -5, 2**63],
        ids=["128 bytes", "64 two-byte", "blanks", "nul", "star", "negative", "large integer"],
    )
    def test_user_ids_of_any_text_have_histories(self, service, redis, user_id):
        redis.set(f"history:{user_id}".encode(), records((5, NOW)))
        assert service.score(user_id).json()["history_length"] == 1

    @pytest.mark.parametrize("n", [1, MAX_CANDIDATES])
    def test_up_to_1000_candidates_are_scored(self, service, n):
        answer = service.score(candidates=list(range(1, n + 1))).json()
        assert len(answer["scores"]) == n
        assert answer["unknown_candidates"] == max(0, n - KNOWN_ITEMS)

    def test_the_largest_item_id_is_an_id_like_any_other(self, service, redis):
        redis.set("history:ann", records((2**63 - 1, NOW)))
        answer = service.score("ann", [2**63 - 1], ranking_time=NOW).json()
        assert answer["scores"] == [score_of(UNKNOWN, behaviors=1, oldest=UNKNOWN)]

    def test_a_history_longer_than_the_models_is_cut_to_the_newest(self, service, redis):
        redis.set("history:ann", records(*steps(*range(1, HISTORY_LENGTH + 4))))
        answer = service.score("ann", [1], ranking_time=NOW).json()
        assert answer["history_length"] == HISTORY_LENGTH
        assert answer["scores"] == [score_of(1, behaviors=HISTORY_LENGTH, oldest=4)]

    def test_a_history_in_the_request_replaces_the_stored_one(self, service, redis):
        redis.set("history:ann", records((5, NOW)))
        given = behaviors((11, NOW - DAY_S), (12, NOW))
        assert service.scores("ann", ranking_time=NOW, history=given) == [
            score_of(1, behaviors=2, oldest=11)
        ]
        assert service.scores("ann", history=[]) == [score_of(1)]
        assert redis.get("history:ann") == records((5, NOW))

    def test_a_history_in_the_request_is_cut_to_the_newest(self, service):
        given = behaviors(*steps(*range(1, HISTORY_LENGTH + 2)))
        answer = service.score(ranking_time=NOW, history=given).json()
        assert answer["history_length"] == HISTORY_LENGTH
        assert answer["scores"] == [score_of(1, behaviors=HISTORY_LENGTH, oldest=2)]

    @pytest.mark.parametrize(
        ("days", "bucket"), [(-1, 0), (0, 0), (1, 1), (2, 2), (4, 3), (1000, 10)]
    )
    def test_elapsed_time_is_measured_back_from_the_ranking_time(
        self, service, redis, days, bucket
    ):
        redis.set("history:ann", records((5, NOW)))
        assert service.scores("ann", ranking_time=NOW + days * DAY_S) == [
            score_of(1, behaviors=1, oldest=5, day=bucket)
        ]

    def test_the_ranking_time_is_now_unless_said(self, service, redis):
        redis.set("history:ann", records((5, int(time.time()) - 5 * DAY_S)))
        assert service.scores("ann") == [score_of(1, behaviors=1, oldest=5, day=3)]

    def test_null_is_the_same_as_nothing(self, service):
        assert service.scores(ranking_time=None, history=None) == [score_of(1)]

    @pytest.mark.parametrize(
        "content_type",
        [None, "application/json; charset=utf-8", "application/x-www-form-urlencoded"],
        ids=["no name", "json", "curl's"],
    )
    def test_a_body_is_json_whatever_its_sender_calls_it(self, service, content_type):
        answer = service.client.post(
            "/score",
            content=b'{"user_id": "ann", "candidates": [2]}',
            headers={} if content_type is None else {"Content-Type": content_type},
        )
        assert answer.status_code == 200, answer.text
        assert answer.json()["scores"] == [score_of(2)]

    def test_server_timing_says_where_the_time_went(self, service):
        timing = service.score().headers["Server-Timing"]
        stages = dict(re.findall(r"(\w+);dur=(\d+\.\d{3})(?:, |$)", timing))
        assert list(stages) == ["fetch", "encode", "infer", "queue", "respond", "total"]
        parts = sum(float(ms) for stage, ms in stages.items() if stage != "total")
        assert parts <= float(stages["total"]) + 0.01

    def test_what_was_scored_is_counted(self, serve, redis):
        service = serve()
        redis.set("history:ann", records(*steps(1, 2, 3)))
        service.scores("ann", [1, 95, 96])
        service.scores("nobody", [1])
        assert service.metric("mneme_requests_total", route="/score", status="200") == 2
        assert service.metric("mneme_unknown_candidates_total") == 2
        assert service.metric("mneme_history_behaviors_sum") == 3
        assert service.metric("mneme_history_behaviors_bucket", le="0.0") == 1
        assert service.metric("mneme_candidates_total") == 4
        for stage in STAGES:
            assert service.metric("mneme_stage_seconds_count", stage=stage) == 2


def bad(name: str, field: str, reason: str, **fields: Any) -> Any:
    return pytest.param(fields, field, reason, id=name)


BAD_USER_IDS = [
    bad("empty", "user_id", "1 .. 128 bytes of UTF-8, got 0", user_id=""),
    bad("129 bytes", "user_id", "got 129", user_id="x" * 129),
    bad("65 two-byte characters", "user_id", "got 130", user_id="é" * 65),
    bad("129 digits", "user_id", "got 129", user_id=10**128),
    bad("bool", "user_id", "valid string", user_id=True),
    bad("float", "user_id", "valid string", user_id=4.0),
    bad("null", "user_id", "valid string", user_id=None),
    bad("list", "user_id", "valid string", user_id=["ann"]),
]
BAD_CANDIDATES = [
    bad("none", "candidates", "at least 1 item", candidates=[]),
    bad("1,001", "candidates", "at most 1000 items", candidates=[1] * 1001),
    bad("10,000", "candidates", "at most 1000 items", candidates=list(range(1, 10_001))),
    bad("zero", "candidates.0", "greater than or equal to 1", candidates=[0]),
    bad("negative", "candidates.1", "greater than or equal to 1", candidates=[1, -1]),
    bad("2**63", "candidates.0", "less than or equal to", candidates=[2**63]),
    bad("float", "candidates.0", "valid integer", candidates=[1.5]),
    bad("whole float", "candidates.0", "valid integer", candidates=[1.0]),
    bad("digits in a string", "candidates.0", "valid integer", candidates=["1"]),
    bad("bool item", "candidates.0", "valid integer", candidates=[True]),
    bad("null item", "candidates.2", "valid integer", candidates=[1, 2, None]),
    bad("nested", "candidates.0", "valid integer", candidates=[[1]]),
    bad("no list", "candidates", "valid list", candidates=1),
    bad("string", "candidates", "valid list", candidates="123"),
    bad("object", "candidates", "valid list", candidates={"0": 1}),
    bad("null list", "candidates", "valid list", candidates=None),
]
BAD_REST = [
    bad("ranking time below 0", "ranking_time", "greater than or equal to 0", ranking_time=-1),
    bad("milliseconds", "ranking_time", "less than or equal", ranking_time=1_700_000_000_000),
    bad("float time", "ranking_time", "valid integer", ranking_time=1.5),
    bad("time in words", "ranking_time", "valid integer", ranking_time="now"),
    bad("bool time", "ranking_time", "valid integer", ranking_time=True),
    bad("history no list", "history", "valid list", history={}),
    bad("behavior no object", "history.0", "valid dictionary", history=[5]),
    bad("behavior without time", "history.0.time", "required", history=[{"item_id": 5}]),
    bad(
        "behavior of item 0", "history.1.item_id", "greater than", history=behaviors((1, 1), (0, 1))
    ),
    bad("behavior in 2106", "history.0.time", "less than", history=behaviors((1, 2**32))),
    bad(
        "too many", "history", f"at most {MAX_INLINE_BEHAVIORS}", history=behaviors((1, 1)) * 10_001
    ),
    bad("unknown field", "candidate", "Extra inputs are not permitted", candidate=[1]),
    bad("field of another case", "Candidates", "Extra inputs", Candidates=[1]),
]


class TestBadRequests:
    @pytest.mark.parametrize(
        ("fields", "field", "reason"), [*BAD_USER_IDS, *BAD_CANDIDATES, *BAD_REST]
    )
    def test_a_bad_field_is_named_with_its_reason(self, service, fields, field, reason):
        assert_invalid(service.score(**fields), field, reason)
        assert service.model.runs == []

    @pytest.mark.parametrize("missing", ["user_id", "candidates"])
    def test_a_missing_field_is_named(self, service, missing):
        body = {"user_id": "ann", "candidates": [1]}
        del body[missing]
        assert_invalid(service.client.post("/score", json=body), missing, "Field required")

    @pytest.mark.parametrize(
        ("body", "field", "reason"),
        [
            pytest.param(b"", "body", "required", id="no body"),
            pytest.param(b"{", "body", "not valid JSON at character 1", id="half a body"),
            pytest.param(b"user_id=ann", "body", "not valid JSON at character 0", id="a form"),
            pytest.param(b"[]", "body", "valid dictionary", id="a list"),
            pytest.param(b"null", "body", "valid dictionary", id="null"),
            pytest.param(
                b'{"user_id": "ann", "candidates": [NaN]}',
                "candidates.0",
                "valid integer",
                id="NaN",
            ),
            pytest.param(
                b'{"user_id": "ann", "candidates": [1], "ranking_time": Infinity}',
                "ranking_time",
                "valid integer",
                id="infinity",
            ),
            pytest.param(
                b'{"user_id": "\\ud800", "candidates": [1]}',
                "user_id",
                "lone surrogate",
                id="lone surrogate",
            ),
            pytest.param(
                b'{"user_id": "ann", "candidates": [1], "\\ud800": 1}',
                "body",
                "unicode",
                id="lone surrogate as a name",
            ),
            pytest.param(b"[" * 100_000, "body", "", id="nested deeply"),
            pytest.param(
                b'{"user_id": "ann", "candidates": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
                "",
                "",
                id="candidates nested deeply",
            ),
            pytest.param(
                b'{"user_id": "ann", "candidates": [1' + b"0" * 5000 + b"]}",
                "",
                "",
                id="5,001 digits",
            ),
            pytest.param(b'{"user_id": "\xff", "candidates": [1]}', "body", "", id="not UTF-8"),
        ],
    )
    def test_a_body_that_is_no_request_is_refused_with_its_reason(
        self, service, body, field, reason
    ):
        assert_invalid(service.client.post("/score", content=body), field, reason)
        assert service.scores() == [score_of(1)]

    def test_the_first_errors_of_many_are_listed(self, service):
        answer = service.score(candidates=[0] * 50)
        problem = assert_problem(answer, 422, "invalid-request")
        assert [error["field"] for error in problem["errors"]] == [
            f"candidates.{i}" for i in range(10)
        ]
        assert problem["detail"].endswith("(and 49 more)")

    @pytest.mark.parametrize("deadline_ms", ["0", "-1", "nan", "inf", "60001", "soon", ""])
    def test_a_bad_deadline_is_named(self, service, deadline_ms):
        assert_invalid(service.score(deadline_ms=deadline_ms), "x-deadline-ms", "Input should be")

    @pytest.mark.parametrize(
        ("method", "path"),
        [
            *(("GET", "/score"), ("PUT", "/score"), ("GET", "/recommend"), ("GET", "/events")),
            ("POST", "/metrics"),
        ],
    )
    def test_a_wrong_method_is_told_the_right_one(self, service, method, path):
        answer = service.client.request(method, path)
        assert_problem(answer, 405, "method-not-allowed")
        assert answer.headers["Allow"] == ("GET" if path == "/metrics" else "POST")

    @pytest.mark.parametrize("path", ["/scores", "/score/ann", "/users/ann"])
    def test_an_unknown_path_is_a_problem_too(self, service, path):
        assert_problem(service.client.get(path), 404, "not-found")

    def test_unknown_paths_are_counted_together(self, serve):
        """Or whoever asks for many paths would fill the registry."""
        service = serve()
        for path in ("/a", "/b", "/c"):
            service.client.get(path)
        assert service.metric("mneme_requests_total", route="other", status="404") == 3


class TestOperators:
    def test_healthz_lives(self, service):
        answer = service.client.get("/healthz")
        assert (answer.status_code, answer.json()) == (200, {"status": "alive"})

    def test_readyz_is_ready_when_redis_is_up(self, service):
        answer = service.client.get("/readyz")
        assert (answer.status_code, answer.json()) == (200, {"status": "ready", "redis": "up"})

    def test_models_says_what_is_served(self, service):
        assert service.client.get("/models").json() == {
            "models": [
                {
                    "arm": "main",
                    "share": 1.0,
                    "shadow": False,
                    "model": "dummy",
                    "version": "dummy-1",
                    "score_kind": "affinity",
                    "history_length": HISTORY_LENGTH,
                    "items": KNOWN_ITEMS,
                    "calibration": "none",
                    "explains": False,
                    "metrics": {"auc": 0.5},
                }
            ]
        }

    def test_metrics_are_prometheus_text(self, service):
        answer = service.client.get("/metrics")
        assert answer.headers["Content-Type"].startswith("text/plain; version=")
        assert service.metric("mneme_model_info", model="dummy", version="dummy-1") == 1

    def test_the_docs_have_an_example_for_each_body(self, service):
        assert service.client.get("/docs").status_code == 200
        schemas = service.client.get("/openapi.json").json()["components"]["schemas"]
        for name in ("ScoreBody", "ScoreAnswer", "RecommendBody", "RecommendAnswer", "Event"):
            assert schemas[name]["examples"], name

    def test_the_example_of_the_docs_is_answered(self, service):
        schemas = service.client.get("/openapi.json").json()["components"]["schemas"]
        for example in schemas["ScoreBody"]["examples"]:
            assert service.client.post("/score", json=example).status_code == 200
        for example in schemas["RecommendBody"]["examples"]:
            assert service.client.post("/recommend", json=example).status_code == 200
        for example in schemas["Event"]["examples"]:
            assert service.client.post("/events", json=example).status_code == 200

    @pytest.mark.parametrize(
        ("path", "statuses"),
        [
            ("/score", {"413", "422", "429", "500", "503"}),
            ("/recommend", {"409", "413", "422", "429", "500", "503"}),
            ("/events", {"413", "422", "500", "503"}),
        ],
    )
    def test_the_docs_name_every_problem(self, service, path, statuses):
        described = service.client.get("/openapi.json").json()["paths"][path]["post"]["responses"]
        assert set(described) == {"200", "400", "408", "415", "431", *statuses}
        for status in statuses:
            assert "application/problem+json" in described[status]["content"]
            assert "urn:mneme:problem:" in described[status]["description"]
