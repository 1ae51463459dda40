"""POST /score below its JSON: bodies in pieces, deadlines, clients that leave, numbers."""

import json
from collections.abc import Iterator

import numpy as np
import pytest
from fastapi.exceptions import RequestValidationError
from hypothesis import given
from hypothesis import strategies as st

from service.schemas import MAX_DEADLINE_MS, ScoreAnswer, ScoreBody
from service.score_endpoint import _parse
from tests.service.dummy_model import score_of
from tests.service.live_service import LiveService, in_background
from tests.service.problem_answers import assert_problem, assert_retry

# A warm-up that predicts 10 s for every run of the tests here.
TEN_SECONDS = ((1, 10.0), (2, 10.0))
BODY = json.dumps({"user_id": "gone", "candidates": [1, 2]}).encode()
ANNOUNCED = b"POST /score HTTP/1.1\r\nHost: test\r\nContent-Length: %d\r\n\r\n" % len(BODY)
CHUNKED = b"POST /score HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(content: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(content), content)


def answers(service: LiveService, status: int) -> float:
    return service.metric("mneme_requests_total", route="/score", status=str(status))


class TestBodies:
    @pytest.mark.parametrize("size", [1, 7, 1000], ids=["bytes", "pieces", "one chunk"])
    def test_a_body_may_come_in_chunks(self, service, size):
        pieces = (BODY[start : start + size] for start in range(0, len(BODY), size))
        answer = service.client.post("/score", content=pieces)
        assert answer.json()["scores"] == [score_of(1), score_of(2)]

    def test_an_announced_body_may_come_in_pieces(self, service):
        def pieces() -> Iterator[bytes]:
            yield from (BODY[:10], BODY[10:20], BODY[20:])

        answer = service.client.post(
            "/score", content=pieces(), headers={"Content-Length": str(len(BODY))}
        )
        assert answer.json()["scores"] == [score_of(1), score_of(2)]

    def test_one_connection_serves_one_request_after_another(self, service):
        """Who waits for the next request has not left."""
        for n in range(1, 20):
            assert service.scores(candidates=[n]) == [score_of(n)]

    def test_the_documented_fields_are_those_of_the_answer(self, service):
        """The answer is written without the schema; this is what keeps them together."""
        answer = service.score().json()
        assert set(answer) == set(ScoreAnswer.model_fields)
        ScoreAnswer.model_validate(answer, strict=True)


class TestDeadline:
    """Answers are predicted to take 10 s, so the deadline decides who is taken."""

    @pytest.mark.parametrize("name", ["X-Deadline-Ms", "x-deadline-ms", "X-DEADLINE-MS"])
    def test_a_request_may_wait_longer_than_the_settings_say(self, serve, name):
        service = serve(warm_up_took=TEN_SECONDS, deadline_s=0.03)
        # With a history: half of the settings' deadline is little for a busy machine's Redis.
        body = {"user_id": "ann", "candidates": [1], "history": []}
        with in_background() as begin, service.model.held():
            begin(service.score, deadline_ms=60_000, history=[])
            service.model.wait_until_busy()
            patient = begin(service.client.post, "/score", json=body, headers={name: "60000"})
            service.wait_for("mneme_queued_requests", 1)
        assert patient.result().status_code == 200

    @pytest.mark.parametrize(
        ("deadline_s", "deadline_ms"),
        [
            pytest.param(50.0, 1000, id="less than the settings say"),
            pytest.param(1.0, None, id="as the settings say"),
        ],
    )
    def test_a_request_waits_no_longer_than_is_said(self, serve, deadline_s, deadline_ms):
        service = serve(warm_up_took=TEN_SECONDS, deadline_s=deadline_s)
        with in_background() as begin, service.model.held():
            begin(service.score, deadline_ms=60_000)
            service.model.wait_until_busy()
            refused = service.score(deadline_ms=deadline_ms)
        assert_retry(refused, 429, "overloaded")
        assert "the deadline is in" in refused.json()["detail"]

    @pytest.mark.parametrize("deadline_ms", ["0.5", "1e3", str(MAX_DEADLINE_MS)])
    def test_any_number_up_to_a_minute_is_a_deadline(self, service, deadline_ms):
        """A short one may be missed; it is not refused as invalid."""
        assert service.score(deadline_ms=deadline_ms).status_code in (200, 429, 503)

    def test_a_bad_one_is_refused_before_it_costs_anything(self, service):
        assert_problem(service.score(deadline_ms="soon"), 422, "invalid-request")
        assert service.model.runs == []


class TestClientsThatLeave:
    @pytest.mark.parametrize(
        "request_", [ANNOUNCED + BODY, CHUNKED + chunk(BODY) + chunk(b"")], ids=["whole", "chunked"]
    )
    def test_who_leaves_while_waiting_is_counted_and_costs_no_run(self, serve, request_):
        service = serve()
        with in_background() as begin, service.model.held():
            begin(service.scores)
            service.model.wait_until_busy()
            with service.client_that_leaves(request_):
                service.wait_for("mneme_queued_requests", 1)
        service.wait_for("mneme_requests_total", 1, route="/score", status="499")
        assert service.metric("mneme_dropped_total", reason="client left") == 1
        assert service.metric("mneme_queued_requests") == 0
        assert service.metric("mneme_stage_seconds_count", stage="total") == 1
        assert service.model.batch_sizes == [1]

    @pytest.mark.parametrize(
        "request_",
        [ANNOUNCED, ANNOUNCED + BODY[:5], CHUNKED, CHUNKED + chunk(BODY)],
        ids=["before the body", "amid the body", "before the chunks", "before the last chunk"],
    )
    def test_who_leaves_before_the_body_has_come_is_not_told_what_is_missing(self, serve, request_):
        service = serve()
        with service.client_that_leaves(request_):
            pass
        service.wait_for("mneme_requests_total", 1, route="/score", status="499")
        assert answers(service, 422) == 0
        assert service.model.runs == []

    def test_who_stays_is_answered(self, serve):
        """And nothing else comes on the connection, before or after."""
        service = serve()
        with in_background() as begin, service.model.held():
            begin(service.scores)
            service.model.wait_until_busy()
            with service.client_that_leaves(ANNOUNCED + BODY) as connection:
                service.wait_for("mneme_queued_requests", 1)
                service.model.release()
                answer = connection.recv(65_536)
        assert answer.startswith(b"HTTP/1.1 200 ")
        head, body = answer.split(b"\r\n\r\n")
        assert b"content-length: %d" % len(body) in head.lower()
        assert json.loads(body)["scores"] == [score_of(1), score_of(2)]
        assert answers(service, 499) == 0


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)
WHOLE_NUMBERS = st.integers(0, 2**64) | st.sampled_from([1, 2**63 - 1, 2**63, 2**32 - 1, 2**32])
BEHAVIORS = st.fixed_dictionaries({"item_id": WHOLE_NUMBERS | JSON, "time": WHOLE_NUMBERS | JSON})
BODIES = st.fixed_dictionaries(
    {
        "user_id": st.text(max_size=130) | st.integers() | JSON,
        "candidates": st.lists(WHOLE_NUMBERS, min_size=1, max_size=4) | JSON,
    },
    optional={
        "ranking_time": WHOLE_NUMBERS | JSON,
        "arm": st.from_regex(r"[a-z0-9_-]{1,33}", fullmatch=True) | JSON,
        "history": st.lists(BEHAVIORS, max_size=3) | JSON,
        "surprise": JSON,
    },
)


@given(body=BODIES | JSON, is_ascii=st.booleans())
def test_a_body_is_read_as_every_other_route_would_read_it(body, is_ascii):
    """It is parsed by another parser, and only what that refuses is parsed as theirs is."""
    raw = json.dumps(body, ensure_ascii=is_ascii).encode(errors="surrogatepass")
    try:
        expected = ScoreBody.model_validate(json.loads(raw))
    except ValueError:
        with pytest.raises(RequestValidationError):
            _parse(raw)
    else:
        assert _parse(raw) == expected


FLOATS = [
    pytest.param(0.1, id="0.1"),
    pytest.param(1 / 3, id="a third"),
    pytest.param(1.0, id="whole"),
    pytest.param(-0.0, id="minus zero"),
    pytest.param(16_777_216.0, id="2 to the 24"),
    pytest.param(float(np.finfo(np.float32).max), id="largest"),
    pytest.param(float(np.finfo(np.float32).tiny), id="smallest normal"),
    pytest.param(1e-45, id="smallest"),
    pytest.param(float(np.nextafter(np.float32(1), np.float32(2))), id="next after 1"),
]


class TestNumbers:
    @pytest.mark.parametrize("number", FLOATS)
    def test_a_score_parses_back_to_the_very_same_float32(self, service, number):
        service.model.answers_with = number
        (score,) = json.loads(service.score().content)["scores"]
        assert isinstance(score, float)
        assert np.float32(score).tobytes() == np.float32(number).tobytes()

    def test_a_score_is_written_with_no_more_digits_than_a_float32_has(self, service):
        service.model.answers_with = 0.1
        assert b'"scores":[0.1]' in service.score().content

    def test_many_scores_are_those_of_the_model_in_its_order(self, service):
        asked = list(range(1, 91))
        assert service.scores(candidates=asked) == [score_of(c) for c in asked]
