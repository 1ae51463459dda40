"""What came of a load with a fault in its middle: counts, percentiles, recovery.

Shapes: N requests.
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import compress

import numpy as np
from numpy.typing import NDArray

from loadtest.chaos.events import Audit
from loadtest.chaos.pool import Verdict
from loadtest.open_loop import ScheduleResult

_OK = 200
_REFUSED = (429, 503)
_NO_ANSWER = 0
_TYPE_PREFIX = "urn:mneme:problem:"
# A request may be refused so whatever else goes on: for want of capacity, or of the history.
_STATED = ("overloaded", "deadline-exceeded", "history-unavailable")
# Right answers are back when, over so long, they have this share of what it was before the fault.
_WINDOW_S = 1.0
_RECOVERED_SHARE = 0.95
_LEAST_SHARE_BEFORE = 0.5


@dataclass(frozen=True, kw_only=True)
class Fault:
    """When it began, when it had been taken back, and when the phase "after" began, seconds from
    the start of the load. `notes`: what else was seen. `findings`: what should not have been.
    """

    began_s: float
    ended_s: float
    over_s: float
    notes: Sequence[str] = ()
    findings: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A row of the table.

    `fault`: in words. `rate`: requests/s that were offered outside of the fault; `held_per_s`:
    right answers a second in the phase "during", those without a history among them. Of the
    `requests`: `refused` got 429 or 503 (`refusals`: by the problem that was named), `timed_out`
    got no answer in time, `broken` lost their connection, `unsent` found nobody to connect to,
    `unexpected` got another status (`statuses`: requests by status, 0 without one), `degraded`
    were answered rightly without a history, `wrong` wrongly.
    Latencies are those of answers with 200, None without one. `recovery_s`: from the end of the
    fault until right answers with their histories were back, None where they were not. `findings`:
    all that must not be.
    """

    name: str
    fault: str
    rate: float
    seconds: float
    held_per_s: float
    requests: int
    refused: int
    refusals: dict[str, int]
    timed_out: int
    broken: int
    unsent: int
    unexpected: int
    statuses: dict[str, int]
    degraded: int
    wrong: int
    acknowledged: int
    lost: int
    doubled: int
    p99_before_s: float | None
    p99_during_s: float | None
    p99_after_s: float | None
    late_sends_s: float
    recovery_s: float | None
    notes: list[str] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)

    @property
    def failed(self) -> int:
        """Requests that were neither answered nor refused for a reason that the service states."""
        reasoned = sum(self.refusals.get(problem, 0) for problem in _STATED)
        unanswered = self.timed_out + self.broken + self.unsent
        return unanswered + self.unexpected + self.refused - reasoned


@dataclass(frozen=True, kw_only=True)
class NotRun:
    """A row that could not be had, and why."""

    name: str
    fault: str
    reason: str


def conclude(
    name: str,
    fault_words: str,
    result: ScheduleResult,
    judged: Sequence[Verdict | None],
    fault: Fault,
    audit: Audit,
    *,
    reasons: Sequence[str],
    rate: float,
) -> Outcome:
    """Return the row; `reasons`: of the first wrong answers."""
    is_right_N = np.array([verdict == "right" for verdict in judged])
    is_good_N = np.array([verdict in ("right", "degraded") for verdict in judged])
    arrivals_s, codes_N = result.arrivals_s, result.codes
    during_N = (arrivals_s >= fault.began_s) & (arrivals_s < fault.over_s)
    phases = (arrivals_s < fault.began_s, during_N, arrivals_s >= fault.over_s)
    before, during, after = (_p99_s(result, chosen_N) for chosen_N in phases)
    n_verdicts = Counter(judged)
    is_refused_N = np.isin(codes_N, _REFUSED)
    is_answered = is_refused_N | np.isin(codes_N, (_OK, _NO_ANSWER))
    recovery_s = recovery(arrivals_s, is_right_N, fault)
    findings = [*fault.findings, *reasons]
    if audit.lost or audit.doubled:
        findings.append(f"events: {audit.lost} lost, {audit.doubled} doubled")
    if audit.rejected:
        findings.append(f"events: {len(audit.rejected)} rejected, first {audit.rejected[0]}")
    share_before = float(is_right_N[phases[0]].mean()) if phases[0].any() else 0.0
    if share_before < _LEAST_SHARE_BEFORE:
        findings.append(f"only {share_before:.0%} right answers before the fault: it shows nothing")
    if recovery_s is None:
        findings.append("right answers did not come back")
    if not is_answered.all():
        found = sorted({*codes_N[~is_answered].tolist()})
        findings.append(f"unexpected statuses: {', '.join(map(str, found))}")
    return Outcome(
        name=name,
        fault=fault_words,
        rate=rate,
        seconds=result.duration_s,
        held_per_s=float(is_good_N[during_N].sum() / (fault.over_s - fault.began_s)),
        requests=len(codes_N),
        refused=int(is_refused_N.sum()),
        refusals=dict(Counter(map(problem_of, compress(result.answers, is_refused_N)))),
        timed_out=int((result.timed_out & result.sent).sum()),
        broken=int(((codes_N == _NO_ANSWER) & result.sent & ~result.timed_out).sum()),
        unsent=result.unsent,
        unexpected=int((~is_answered).sum()),
        statuses={str(status): n for status, n in result.statuses.items()},
        degraded=n_verdicts["degraded"],
        wrong=n_verdicts["wrong"],
        acknowledged=audit.acknowledged,
        lost=audit.lost,
        doubled=audit.doubled,
        p99_before_s=before,
        p99_during_s=during,
        p99_after_s=after,
        late_sends_s=result.late_sends_s,
        recovery_s=recovery_s,
        notes=[*fault.notes, f"{audit.retried} posts of events repeated"],
        findings=findings,
    )


def recovery(
    arrivals_s: NDArray[np.float64], is_right_N: NDArray[np.bool_], fault: Fault
) -> float | None:
    """Return the seconds from the end of the fault until right answers were back, or None.

    They are back where the requests that were due within the next second have at least 95 % of the
    share of right answers that those before the fault had.
    """
    before_N = arrivals_s < fault.began_s
    if not before_N.any():
        return None
    needed = _RECOVERED_SHARE * float(is_right_N[before_N].mean())
    starts = np.flatnonzero(arrivals_s >= fault.ended_s)
    ends = np.searchsorted(arrivals_s, arrivals_s + _WINDOW_S)
    # A window that the load did not fill says nothing.
    last_s = float(arrivals_s[-1])
    right_so_far = np.concatenate([[0], np.cumsum(is_right_N)])
    for first in starts.tolist():
        if arrivals_s[first] + _WINDOW_S > last_s:
            return None
        end = int(ends[first])
        if (right_so_far[end] - right_so_far[first]) / (end - first) >= needed:
            return 0.0 if first == starts[0] else float(arrivals_s[first] - fault.ended_s)
    return None


def problem_of(answer: bytes) -> str:
    """Return what an answer names as the problem, without the prefix of the project's own."""
    try:
        named: str = json.loads(answer)["type"]
    except (ValueError, KeyError, TypeError):
        return "none named"
    return named.removeprefix(_TYPE_PREFIX)


def _p99_s(result: ScheduleResult, chosen_N: NDArray[np.bool_]) -> float | None:
    if not chosen_N.any():
        return None
    p99_s = result.select(chosen_N, result.duration_s).accepted_percentile_s(99)
    return p99_s if math.isfinite(p99_s) else None
