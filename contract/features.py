"""The feature spec: everything that decides how raw histories become model inputs."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

HOUR_S = 3600
DAY_S = 24 * HOUR_S


MAX_TABLE_BUCKETS = 64
MAX_ELAPSED_UNITS = 1 << 32


class Granularity(BaseModel):
    """One unit in which elapsed time is told.

    On the doubling scale a model has one embedding for each of `n_buckets` buckets. On the linear
    scale the "bucket" is the whole number of elapsed units itself, below `n_buckets`: for models
    that compare the times of two behaviors, which buckets would have lost.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: Annotated[str, Field(min_length=1)]
    unit_s: Annotated[int, Field(ge=1)]
    n_buckets: Annotated[int, Field(ge=1, le=MAX_ELAPSED_UNITS)]
    scale: Literal["doubling", "linear"] = "doubling"

    @model_validator(mode="after")
    def _table_is_small(self) -> "Granularity":
        if self.scale == "doubling" and self.n_buckets > MAX_TABLE_BUCKETS:
            raise ValueError(
                f"n_buckets: a doubling scale has at most {MAX_TABLE_BUCKETS}, "
                f"{self.name} asks for {self.n_buckets}"
            )
        return self


# Times are uint32 seconds, so these tables hold every bucket that can occur: clipping only ever
# meets histories that a spec with smaller tables asks for.
HOURS = Granularity(name="hours", unit_s=HOUR_S, n_buckets=22)
DAYS = Granularity(name="days", unit_s=DAY_S, n_buckets=17)
AGE_SECONDS = Granularity(name="age_seconds", unit_s=1, n_buckets=MAX_ELAPSED_UNITS, scale="linear")


class FeatureSpec(BaseModel):
    """How a history is encoded: its length L and the G granularities of elapsed time."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    history_length: Annotated[int, Field(ge=1, le=100_000)] = 1000
    granularities: Annotated[tuple[Granularity, ...], Field(min_length=1, max_length=16)] = (
        HOURS,
        DAYS,
    )

    @model_validator(mode="after")
    def _names_are_unique(self) -> "FeatureSpec":
        names = [granularity.name for granularity in self.granularities]
        if len(set(names)) < len(names):
            raise ValueError(f"granularities must have different names, got {names}")
        return self
