"""The feature spec."""

import pytest
from pydantic import ValidationError

from contract.features import DAYS, HOURS, FeatureSpec, Granularity
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
