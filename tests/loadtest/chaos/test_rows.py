"""A fault of each kind, short: it is made, counted, and nothing wrong is found.

All of them take minutes: `python -m loadtest chaos --seconds 4`.
"""

from dataclasses import replace

import pytest

from loadtest.chaos.errors import ChaosError
from loadtest.chaos.rows import ROWS

BY_NAME = {row.name: row for row in ROWS}
SHORT = ("sigterm", "bad-bundle", "redis-killed", "redis-killed-cold", "slow-clients")


def show(bench, name):
    row = BY_NAME[name]
    try:
        return row.show(bench, row.name, row.fault)
    except ChaosError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", SHORT)
def test_nothing_wrong_is_found(bench, name):
    outcome, watched = show(bench, name)
    assert outcome.findings == []
    assert (outcome.wrong, outcome.lost, outcome.doubled) == (0, 0, 0)
    assert outcome.recovery_s is not None
    assert outcome.acknowledged > 0
    assert outcome.requests == len(watched.verdicts) > 100
    right = watched.verdicts.count("right")
    assert right > 50
    answered = right + outcome.degraded
    assert answered + outcome.refused + outcome.failed == outcome.requests
    assert len(watched.requests()) == outcome.requests
    policy = {"redis-killed": "refuse", "redis-killed-cold": "cold"}.get(name)
    if policy is not None:
        assert (outcome.statuses.get("503", 0) > 0) == (policy == "refuse")
        assert (outcome.degraded > 0) == (policy == "cold")


def test_a_wrong_expectation_is_found_in_a_whole_row(bench):
    """One score of one request of thirty: every thirtieth answer."""
    served, other = bench.expected
    scores = served.scores.copy()
    scores[7, 1] += 3 * served.tolerance
    outcome, watched = show(
        replace(bench, expected=(replace(served, scores=scores), other)), "redis-full"
    )
    n_asked = len(range(7, outcome.requests, 30))
    assert outcome.wrong == watched.verdicts.count("wrong") > 0
    assert outcome.wrong <= n_asked
    assert outcome.findings[0].startswith("request 7: scores differ by")


def test_a_disk_cannot_be_full_without_something_to_write(bench):
    row = BY_NAME["disk-full"]
    with pytest.raises(ChaosError, match=r"there is no model\.pt beside"):
        row.show(replace(bench, checkpoint=None), row.name, row.fault)
