"""What is made of a load with a fault in its middle."""

import json

import numpy as np
import pytest

from loadtest.chaos.events import Audit
from loadtest.chaos.outcome import Fault, conclude, recovery
from loadtest.chaos.pool import Verdict
from loadtest.open_loop import ScheduleResult

NOTHING_LOST = Audit(acknowledged=7, lost=0, doubled=0, retried=2, rejected=[])
# Ten requests a second for ten seconds; the fault lasts from 3.0 to 5.0.
ARRIVALS_S = np.arange(100) / 10
FAULT = Fault(began_s=3.0, ended_s=5.0, over_s=6.0, notes=["noted"])


def refusal(problem):
    return json.dumps({"type": f"urn:mneme:problem:{problem}"}).encode()


def result_of(codes, latencies_s=0.01, sent=True, timed_out=False, answers=None):
    codes = np.array(codes, dtype=np.int16)
    n = len(codes)
    return ScheduleResult(
        rate=10.0,
        duration_s=10.0,
        arrivals_s=ARRIVALS_S[:n],
        latencies_s=np.where(codes == 200, latencies_s, np.inf),
        send_delays_s=np.zeros(n),
        statuses={int(code): int((codes == code).sum()) for code in np.unique(codes)},
        unsent=int((~np.broadcast_to(sent, n)).sum()),
        codes=codes,
        waited=np.zeros(n, np.bool_),
        sent=np.broadcast_to(sent, n),
        timed_out=np.broadcast_to(timed_out, n),
        answers=[b""] * n if answers is None else answers,
    )


def row_of(codes, *, wrong=(), fault=FAULT, audit=NOTHING_LOST, **options):
    result = result_of(codes, **options)
    judged: list[Verdict | None] = [None if code != 200 else "right" for code in codes]
    for number in wrong:
        judged[number] = "wrong"
    reasons = ["request 1: wrong"] if wrong else []
    return conclude("row", "words", result, judged, fault, audit, reasons=reasons, rate=10.0)


def test_every_kind_of_failure_is_counted_apart():
    codes = [200] * 100
    sent, timed_out = np.ones(100, np.bool_), np.zeros(100, np.bool_)
    codes[30:36] = [429, 503, 0, 0, 0, 500]
    sent[33], timed_out[34] = False, True
    answers = [b""] * 100
    answers[30:32] = [refusal("overloaded"), refusal("history-unavailable")]
    row = row_of(codes, sent=sent, timed_out=timed_out, answers=answers)
    counts = (row.refused, row.timed_out, row.broken, row.unsent, row.unexpected)
    assert counts == (2, 1, 1, 1, 1)
    assert row.refusals == {"overloaded": 1, "history-unavailable": 1}
    assert row.failed == 4
    assert row.statuses == {"0": 3, "200": 94, "429": 1, "500": 1, "503": 1}
    assert row.findings == ["unexpected statuses: 500"]
    assert row.notes == ["noted", "2 posts of events repeated"]
    # 30 requests are due within the three seconds of the phase; 24 of them are answered.
    assert row.held_per_s == pytest.approx(24 / 3)


@pytest.mark.parametrize("answer", [b"", b"gone", b"[]", b"{}", refusal("shutting-down")])
def test_a_refusal_for_another_reason_is_a_failure(answer):
    codes, answers = [200] * 100, [b""] * 100
    codes[40], answers[40] = 503, answer
    row = row_of(codes, answers=answers)
    assert (row.refused, row.failed) == (1, 1)


def test_percentiles_are_those_of_each_phase():
    latencies_s = np.full(100, 0.01)
    latencies_s[30:60] = 0.2
    latencies_s[60:] = 0.03
    row = row_of([200] * 100, latencies_s=latencies_s)
    assert (row.p99_before_s, row.p99_during_s, row.p99_after_s) == (0.01, 0.2, 0.03)


def test_a_phase_without_an_answer_has_no_percentile():
    codes = [200] * 100
    codes[30:60] = [503] * 30
    row = row_of(codes)
    assert row.p99_during_s is None
    assert row.held_per_s == 0


def test_what_is_wrong_lost_or_doubled_is_a_finding():
    audit = Audit(acknowledged=9, lost=1, doubled=2, retried=0, rejected=["422 no"])
    row = row_of([200] * 100, wrong=[1], audit=audit)
    assert row.wrong == 1
    assert (row.lost, row.doubled, row.acknowledged) == (1, 2, 9)
    assert row.findings == [
        "request 1: wrong",
        "events: 1 lost, 2 doubled",
        "events: 1 rejected, first 422 no",
    ]


def test_a_load_that_is_not_answered_before_the_fault_shows_nothing():
    row = row_of([429] * 100)
    assert "only 0% right answers before the fault" in row.findings[0]


def test_recovery_counts_from_the_end_of_the_fault_to_the_first_good_second():
    """Wrong again at 7.0, alone: within the second that begins at 6.2 it is one of ten."""
    is_right = np.ones(100, np.bool_)
    is_right[30:62] = False
    assert recovery(ARRIVALS_S, is_right, FAULT) == pytest.approx(1.2)
    is_right[70] = False
    assert recovery(ARRIVALS_S, is_right, FAULT) == pytest.approx(2.1)


def test_what_was_never_away_recovers_at_once():
    assert recovery(ARRIVALS_S, np.ones(100, np.bool_), FAULT) == 0.0


def test_the_share_is_that_of_before_the_fault():
    """Every other answer is right, but for the fault: in the second from 5.9 five of ten are."""
    is_right = np.arange(100) % 2 == 0
    is_right[30:60] = False
    assert recovery(ARRIVALS_S, is_right, FAULT) == pytest.approx(0.9)


def test_what_does_not_come_back_has_no_recovery():
    is_right = np.ones(100, np.bool_)
    is_right[30:] = False
    assert recovery(ARRIVALS_S, is_right, FAULT) is None
    assert "right answers did not come back" in row_of([200] * 30 + [503] * 70).findings


def test_a_second_that_the_load_did_not_fill_is_no_recovery():
    is_right = np.ones(100, np.bool_)
    is_right[30:95] = False
    assert recovery(ARRIVALS_S, is_right, FAULT) is None
