"""The answer of `POST /score`, as far as a simulation relies on it."""

import json
import math
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_SHOWN_CHARS = 300


class AnswerError(ValueError):
    """An answer that a service of this interface does not give."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Answer:
    """`arm` and `version` of the model that answered; `scores` float64 [C]."""

    arm: str
    version: str
    scores: NDArray[np.float64]


def read_answer(content: bytes, *, n_candidates: int, arms: Collection[str]) -> Answer:
    """Return the answer; AnswerError unless it has a score for each candidate and a known arm."""
    shown = content[:_SHOWN_CHARS].decode(errors="replace")
    try:
        raw = json.loads(content)
        arm, version, scores = raw["arm"], raw["version"], raw["scores"]
    except (ValueError, TypeError, KeyError) as error:
        raise AnswerError(
            f"POST /score: an answer with scores, arm and version is expected, got {shown}"
        ) from error
    if arm not in arms:
        raise AnswerError(
            f"POST /score: arm {arm!r} is none of those that should answer "
            f"({', '.join(sorted(arms))}); were the experiments changed while the run went on?"
        )
    if not isinstance(version, str):
        raise AnswerError(f"POST /score: version must be a text, got {shown}")
    are_scores = isinstance(scores, list) and all(
        isinstance(score, int | float) and math.isfinite(score) for score in scores
    )
    if not are_scores or len(scores) != n_candidates:
        raise AnswerError(
            f"POST /score: {n_candidates} finite scores are expected, "
            f"got {len(scores) if are_scores else 'something else'}: {shown}"
        )
    return Answer(arm=arm, version=version, scores=np.asarray(scores, dtype=np.float64))
