"""The pool of requests, and the judge of their answers."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from contract.bundle import read_manifest
from contract.records import RECORD_BYTES, decode_records
from exporter.bundles import export
from loadtest.chaos.errors import ChaosError
from loadtest.chaos.pool import Checker, expect, make_pool
from tests.exporter.conftest import checkpoint as checkpoint
from tests.service.tiny_bundle import HISTORY_LENGTH

FULL = 1


def answer(expected, number, **changes):
    """Return the right answer to a request, but for `changes`."""
    body = {
        "scores": expected.scores[number].tolist(),
        "version": expected.version,
        "history_length": int(expected.lengths[number]),
        "degraded": False,
    }
    return json.dumps({**body, **changes}).encode()


def test_the_same_bundle_gives_the_same_pool(bundles, pool):
    again = make_pool(bundles[0], 30, 5)
    assert again.bodies() == pool.bodies()
    assert again.values("history") == pool.values("history")


def test_histories_are_empty_short_and_longer_than_the_model_reads(pool, expected):
    lengths = {len(raw) // RECORD_BYTES for raw in pool.rows.histories}
    assert {0, HISTORY_LENGTH + 3} < lengths
    assert set(expected[0].lengths.tolist()) == {min(n, HISTORY_LENGTH) for n in lengths}
    assert len(pool.values("history")) == sum(bool(raw) for raw in pool.rows.histories)
    for raw in pool.rows.histories:
        times = decode_records(raw)["time"].astype(np.int64)
        assert (np.diff(times) >= 0).all()


def test_two_versions_answer_differently(expected):
    first, second = expected
    assert (first.version, second.version) == ("tiny-1", "tiny-2")
    differences = np.abs(first.scores - second.scores).max(axis=1)
    assert (differences > first.tolerance).all()


def test_a_bundle_that_does_not_look_at_histories_proves_nothing(checkpoint, tmp_path):
    export(checkpoint("popularity"), tmp_path / "bundle")
    with pytest.raises(ChaosError, match="only 0% of the requests get other scores"):
        expect(tmp_path / "bundle", make_pool(tmp_path / "bundle", 10, 3), tmp_path)


def test_the_answers_of_both_versions_are_right_and_counted(expected):
    checker = Checker(expected, may_degrade=False)
    for number in range(30):
        for one in expected:
            assert checker.check(number, answer(one, number)) == "right"
    assert checker.versions == {"tiny-1": 30, "tiny-2": 30}
    assert checker.reasons == []


def moved(expected, number, tolerances):
    scores = expected.scores[number].astype(np.float64)
    scores[2] += tolerances * expected.tolerance
    return scores.tolist()


def test_a_score_within_the_tolerance_is_right_and_one_beyond_is_wrong(expected):
    checker = Checker(expected, may_degrade=False)
    first = expected[0]
    near = answer(first, FULL, scores=moved(first, FULL, 0.5))
    assert checker.check(FULL, near) == "right"
    far = answer(first, FULL, scores=moved(first, FULL, 1.5))
    assert checker.check(FULL, far) == "wrong"
    assert checker.reasons == [f"request {FULL}: scores differ by {1.5 * first.tolerance:.2e}"]


def test_one_wrong_expectation_is_found(expected):
    """The other way round: a service that answers as ever, and a wrong recomputation."""
    first = expected[0]
    scores = first.scores.copy()
    scores[FULL, 0] += 2 * first.tolerance
    checker = Checker([replace(first, scores=scores)], may_degrade=False)
    assert checker.check(FULL, answer(first, FULL)) == "wrong"
    assert checker.check(FULL + 1, answer(first, FULL + 1)) == "right"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"version": "tiny-3"}, "version 'tiny-3' is none that was published"),
        ({"version": "tiny-2"}, "scores differ by"),
        ({"history_length": 0}, f"read 0 behaviors, expected {HISTORY_LENGTH}"),
        ({"scores": [0.5]}, r"\(1,\) scores, expected \(5,\)"),
        ({"scores": [float("nan")] * 5}, "scores differ by nan"),
        ({"scores": None}, "scores, expected"),
        ({"scores": [{}] * 5}, "not an answer"),
        ({"degraded": True}, "degraded, where the policy is to refuse"),
    ],
)
def test_any_other_answer_is_wrong_and_says_why(expected, changes, reason):
    checker = Checker(expected, may_degrade=False)
    assert checker.check(FULL, answer(expected[0], FULL, **changes)) == "wrong"
    assert len(checker.reasons) == 1
    assert re.search(reason, checker.reasons[0])


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"scores": [1,', b"\xff"])
def test_what_is_no_answer_is_wrong(expected, body):
    assert Checker(expected, may_degrade=True).check(FULL, body) == "wrong"


def test_a_degraded_answer_has_the_scores_without_a_history(expected):
    checker = Checker(expected, may_degrade=True)
    first = expected[0]
    cold = {"degraded": True, "history_length": 0, "scores": first.cold[FULL].tolist()}
    assert checker.check(FULL, answer(first, FULL, **cold)) == "degraded"
    warm = {"degraded": True, "history_length": 0}
    assert checker.check(FULL, answer(first, FULL, **warm)) == "wrong"
    silent = {**cold, "degraded": False}
    assert checker.check(FULL, answer(first, FULL, **silent)) == "wrong"


def test_only_the_first_reasons_are_kept(expected):
    checker = Checker(expected, may_degrade=False)
    for number in range(30):
        checker.check(number, b"")
    assert len(checker.reasons) == 5


def test_the_tolerance_is_tighter_than_that_for_other_devices(bundles, expected):
    assert expected[0].tolerance < read_manifest(bundles[0]).golden_tolerance / 5


def test_the_largest_difference_of_right_answers_is_kept(expected):
    checker = Checker(expected, may_degrade=False)
    first = expected[0]
    for tolerances in (0.5, 0.25, 3.0):
        checker.check(FULL, answer(first, FULL, scores=moved(first, FULL, tolerances)))
    assert checker.largest_difference == pytest.approx(0.5 * first.tolerance, rel=1e-3)
