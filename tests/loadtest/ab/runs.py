"""Runs of an A/B test made by hand or by dice, for the tests of what is made of them."""

import datetime
from typing import Any

import numpy as np
import polars as pl

from loadtest.ab.visits import SCHEMA, Run

STARTED = datetime.datetime(2026, 1, 31, 12, tzinfo=datetime.UTC)


def run_of(baseline: str = "din", **stated_shares: float) -> Run:
    shares = stated_shares or {"imn": 0.5, "din": 0.5}
    return Run(started=STARTED, stated_shares=shares, baseline=baseline, settings={"visits": 7})


def visit(user_id: str = "1", arm: str | None = "din", **changes: Any) -> dict[str, Any]:
    """Return a visit that was shown five items and clicked none, unless `changes` says more."""
    usual: dict[str, Any] = {
        "user_id": user_id,
        "arm": arm,
        "version": None if arm is None else "v1",
        "at_s": 1.0,
        "latency_s": 0.01,
        "status": 200,
        "n_shown": 5,
        "clicked_items": [],
        "clicked_categories": [],
    }
    return usual | changes


def failed(user_id: str = "1", arm: str | None = None, **changes: Any) -> dict[str, Any]:
    """Return a visit that was refused."""
    return visit(user_id, arm, **({"status": 503, "latency_s": None, "n_shown": 0} | changes))


def clicks(*items: int) -> dict[str, Any]:
    """Return clicks on items whose category is their last digit."""
    return {"clicked_items": list(items), "clicked_categories": [item % 10 for item in items]}


def frame(*visits: dict[str, Any]) -> pl.DataFrame:
    return pl.DataFrame(visits, schema=SCHEMA)


def drawn_visits(
    seed: int, *, n_users: int, shares: dict[str, float], **ctrs: float
) -> pl.DataFrame:
    """Draw visits: users come one to six times, and differ in how much they like to click."""
    rng = np.random.default_rng(seed)
    names = list(shares)
    arms = rng.choice(names, size=n_users, p=list(shares.values()))
    likings = rng.beta(2.0, 6.0, size=n_users)
    visits = []
    for user, arm in enumerate(arms):
        chance = likings[user] * ctrs.get(arm, 1.0)
        for _ in range(rng.integers(1, 7)):
            clicked = np.flatnonzero(rng.random(5) < chance) + 10 * rng.integers(1, 9)
            visits.append(
                visit(
                    str(user),
                    str(arm),
                    at_s=float(rng.uniform(0, 100)),
                    latency_s=float(rng.gamma(4.0, 0.002)),
                    **clicks(*clicked.tolist()),
                )
            )
    return frame(*visits)
