"""The bodies of a load, against the distributions that were asked for."""

import argparse
import json
import math
from collections import Counter

import numpy as np
import pytest

from loadtest.traffic import (
    LogNormal,
    Traffic,
    TrafficError,
    Uniform,
    add_flags,
    parse_sizes,
    read_catalogue,
    traffic_of,
)

NOW = 1_700_000_000


def traffic(**settings) -> Traffic:
    return Traffic(
        **{
            "population": 10,
            "user_id": "user-{}",
            "zipf": 0.0,
            "candidates": Uniform(least=3, most=3),
            "history": None,
            "item_ids": (1, 1000),
            **settings,
        }
    )


def bodies(n=200, seed=1, **settings):
    return [json.loads(body) for body in traffic(**settings).bodies(n, seed=seed, now=NOW)]


def of_flags(*flags: str) -> Traffic:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return traffic_of(parser.parse_args(flags))


# Sizes.


def test_sizes_are_fixed_a_range_or_log_normal():
    assert parse_sizes("100", least=1) == Uniform(least=100, most=100)
    assert parse_sizes("0-50", least=0) == Uniform(least=0, most=50)
    assert parse_sizes("lognormal:200:0.8:1000", least=1) == LogNormal(
        median=200.0, sigma=0.8, least=1, most=1000
    )


@pytest.mark.parametrize(
    "text",
    ["", "0", "-5", "5-3", "ten", "1.5", "lognormal:200", "lognormal:0:1:9", "lognormal:9:-1:9"],
)
def test_what_is_no_distribution_of_sizes_is_refused(text):
    with pytest.raises(TrafficError, match="no distribution of sizes from 1 up: expected 100"):
        parse_sizes(text, least=1)


def test_a_range_is_drawn_with_both_its_ends():
    drawn = Uniform(least=2, most=4).draw(np.random.default_rng(1), 3000)
    assert {size: pytest.approx(1000, abs=150) for size in (2, 3, 4)} == Counter(drawn.tolist())


def test_log_normal_sizes_have_their_median_and_stay_within_their_bounds():
    drawn = LogNormal(median=100.0, sigma=1.0, least=1, most=500).draw(
        np.random.default_rng(1), 20_000
    )
    assert np.median(drawn) == pytest.approx(100, rel=0.05)
    assert np.mean(drawn < 100 / math.e) == pytest.approx(0.159, abs=0.02)
    assert 1 <= drawn.min() < drawn.max() == 500


# Bodies.


def test_a_body_asks_for_distinct_candidates_of_a_stored_user():
    for body in bodies(candidates=Uniform(least=5, most=20)):
        assert body.keys() == {"user_id", "candidates"}
        assert body["user_id"] in {f"user-{number}" for number in range(10)}
        assert 5 <= len(body["candidates"]) <= 20
        assert len(set(body["candidates"])) == len(body["candidates"])
        assert all(1 <= item <= 1000 for item in body["candidates"])


def test_a_history_in_the_body_is_as_long_as_asked_and_ends_before_now():
    lengths = set()
    for body in bodies(history=Uniform(least=0, most=6)):
        times = [behavior["time"] for behavior in body["history"]]
        lengths.add(len(times))
        assert times == sorted(times)
        assert all(NOW - 365 * 86_400 <= time < NOW for time in times)
        assert all(1 <= behavior["item_id"] <= 1000 for behavior in body["history"])
    assert lengths == set(range(7))


def test_without_skew_all_users_are_equally_active():
    counts = Counter(body["user_id"] for body in bodies(n=10_000))
    assert len(counts) == 10
    assert all(count == pytest.approx(1000, abs=160) for count in counts.values())


def test_with_skew_the_activity_of_users_falls_as_their_rank_to_the_exponent():
    counts = Counter(body["user_id"] for body in bodies(n=20_000, zipf=1.0))
    first = counts["user-0"]
    assert counts["user-1"] == pytest.approx(first / 2, rel=0.1)
    assert counts["user-4"] == pytest.approx(first / 5, rel=0.15)


def test_bodies_follow_the_seed():
    assert bodies(seed=1) == bodies(seed=1) != bodies(seed=2)


def test_candidates_are_taken_from_a_catalogue():
    catalogue = np.array([5, 70, 10**12, 2**63 - 1])
    seen = {item for body in bodies(item_ids=catalogue) for item in body["candidates"]}
    assert seen == set(catalogue.tolist())


def test_ids_of_thirteen_digits_are_kept_exactly():
    low, high = 10**12, 10**13 - 1
    items = [item for body in bodies(item_ids=(low, high)) for item in body["candidates"]]
    assert all(low <= item <= high for item in items)
    assert len(set(items)) == len(items)


def test_the_arm_is_in_the_body_where_one_is_named():
    assert all(body["arm"] == "imn" for body in bodies(arm="imn"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"population": 0}, "at least one user, got 0"),
        ({"user_id": "user"}, "needs one {}, got 'user'"),
        ({"user_id": "u" * 128 + "{}"}, "must have 1 .. 128 bytes"),
        ({"zipf": -1.0}, "0 or more, got -1"),
        ({"zipf": math.nan}, "0 or more, got nan"),
        ({"item_ids": (1, 2)}, "3 distinct candidates were asked for, but there are only 2"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(settings, message):
    with pytest.raises(TrafficError, match=message):
        traffic(**settings)


# Flags.


def test_flags_describe_a_traffic(tmp_path):
    np.save(tmp_path / "catalogue.npy", np.arange(1, 501))
    found = of_flags(
        *("--population", "7", "--user-id", "u{}", "--zipf", "0.8", "--candidates", "1-500"),
        *("--history", "0-1000", "--catalogue", str(tmp_path), "--arm", "imn"),
    )
    assert found.population == 7
    assert found.user_id == "u{}"
    assert found.zipf == 0.8
    assert found.candidates == Uniform(least=1, most=500)
    assert found.history == Uniform(least=0, most=1000)
    assert isinstance(found.item_ids, np.ndarray)
    assert found.item_ids.tolist() == list(range(1, 501))
    assert found.arm == "imn"


def test_without_flags_histories_are_the_stored_ones():
    found = of_flags()
    assert found.history is None
    assert found.arm is None
    assert found.item_ids == (1, 100_000)


@pytest.mark.parametrize("text", ["5-3", "0-10", "ids", f"1-{2**63}"])
def test_what_is_no_range_of_item_ids_is_refused(text):
    with pytest.raises(TrafficError, match="is no range of item ids: expected LOWEST-HIGHEST"):
        of_flags("--item-ids", text)


def test_a_catalogue_that_is_missing_or_another_file_is_refused_by_name(tmp_path):
    with pytest.raises(TrafficError, match=r"catalogue\.npy is not readable as a catalogue"):
        read_catalogue(tmp_path)
    np.save(tmp_path / "floats.npy", np.ones(3))
    with pytest.raises(TrafficError, match=r"floats\.npy is no catalogue: expected a vector"):
        read_catalogue(tmp_path / "floats.npy")
