"""Answers of `POST /score` are read, or refused by what is wrong with them."""

import json

import pytest

from loadtest.ab.answer import AnswerError, read_answer

GOOD = {"scores": [0.5, 1], "arm": "imn", "version": "imn-1", "degraded": False}


def test_scores_arm_and_version_are_read():
    answer = read_answer(json.dumps(GOOD).encode(), n_candidates=2, arms={"imn", "din"})
    assert (answer.arm, answer.version, answer.scores.tolist()) == ("imn", "imn-1", [0.5, 1.0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"<html>", "scores, arm and version is expected, got <html>", id="html"),
        pytest.param(b"\xff", "scores, arm and version is expected", id="bytes"),
        pytest.param(b"[1, 2]", r"is expected, got \[1, 2\]", id="list"),
        pytest.param(b'{"scores": [1, 2], "version": "v"}', "arm and version is", id="no arm"),
    ],
)
def test_what_is_no_answer_is_refused(content, message):
    with pytest.raises(AnswerError, match=message):
        read_answer(content, n_candidates=2, arms={"imn"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"arm": "new"}, r"arm 'new' is none of .* \(din, imn\)", id="unknown arm"),
        pytest.param({"arm": None}, "arm None is none of", id="arm null"),
        pytest.param({"version": 1}, "version must be a text", id="version"),
        pytest.param({"scores": [1]}, "2 finite scores are expected, got 1", id="too few"),
        pytest.param({"scores": [1, 2, 3]}, "2 finite scores are expected, got 3", id="too many"),
        pytest.param({"scores": [1, None]}, "2 finite scores are expected", id="null"),
        pytest.param({"scores": [1, float("nan")]}, "2 finite scores are expected", id="nan"),
        pytest.param({"scores": "12"}, "2 finite scores are expected", id="text"),
    ],
)
def test_a_wrong_part_is_named(changes, message):
    content = json.dumps(GOOD | changes).encode()
    with pytest.raises(AnswerError, match=message):
        read_answer(content, n_candidates=2, arms={"imn", "din"})
