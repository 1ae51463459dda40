"""The feature spec."""

import pytest
from pydantic import ValidationError

from contract.features import (
    AGE_SECONDS,
    DAYS,
    HOURS,
    MAX_ELAPSED_UNITS,
    MAX_TABLE_BUCKETS,
    FeatureSpec,
    Granularity,
)
from contract.records import MAX_TIME


@pytest.mark.parametrize("granularity", [HOURS, DAYS], ids=lambda g: g.name)
def test_the_default_tables_hold_every_bucket_that_can_occur(granularity):
    assert (MAX_TIME // granularity.unit_s).bit_length() == granularity.n_buckets - 1


def test_granularities_need_different_names():
    with pytest.raises(ValidationError, match="different names"):
        FeatureSpec(granularities=(HOURS, HOURS))


@pytest.mark.parametrize("length", [0, -1, 100_001])
def test_the_history_length_has_bounds(length):
    with pytest.raises(ValidationError, match="history_length"):
        FeatureSpec(history_length=length)


def test_unknown_keys_are_errors():
    with pytest.raises(ValidationError, match="Extra inputs"):
        Granularity.model_validate({"name": "x", "unit_s": 1, "n_buckets": 1, "rows": 3})


def test_ages_in_seconds_tell_every_time_that_can_occur():
    assert AGE_SECONDS.scale == "linear"
    assert AGE_SECONDS.unit_s == 1
    assert AGE_SECONDS.n_buckets == MAX_TIME + 1


def test_the_scale_doubles_unless_said():
    assert Granularity(name="x", unit_s=1, n_buckets=4).scale == "doubling"


@pytest.mark.parametrize("n_buckets", [1, MAX_TABLE_BUCKETS])
def test_a_doubling_scale_has_a_table_that_is_small(n_buckets):
    assert Granularity(name="x", unit_s=1, n_buckets=n_buckets).n_buckets == n_buckets


def test_a_large_table_is_refused():
    with pytest.raises(ValidationError, match="n_buckets: a doubling scale has at most 64, x asks"):
        Granularity(name="x", unit_s=1, n_buckets=MAX_TABLE_BUCKETS + 1)


def test_a_linear_scale_needs_no_table_and_may_be_as_long_as_time():
    one = Granularity(name="x", unit_s=1, n_buckets=MAX_ELAPSED_UNITS, scale="linear")
    assert one.n_buckets == 1 << 32
    with pytest.raises(ValidationError, match="n_buckets"):
        Granularity(name="x", unit_s=1, n_buckets=MAX_ELAPSED_UNITS + 1, scale="linear")


def test_another_scale_is_refused():
    with pytest.raises(ValidationError, match="'doubling' or 'linear'"):
        Granularity.model_validate({"name": "x", "unit_s": 1, "n_buckets": 1, "scale": "log"})


def test_a_spec_is_the_same_after_json():
    """As a bundle keeps it."""
    spec = FeatureSpec(history_length=7, granularities=(HOURS, AGE_SECONDS))
    assert FeatureSpec.model_validate_json(spec.model_dump_json()) == spec
