"""The feature spec: everything that decides how raw histories become model inputs."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

HOUR_S = 3600
DAY_S = 24 * HOUR_S


class Granularity(BaseModel):
    """One unit in which elapsed time is bucketed; it has an embedding table of its own."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: Annotated[str, Field(min_length=1)]
    unit_s: Annotated[int, Field(ge=1)]
    n_buckets: Annotated[int, Field(ge=1, le=64)]


# Times are uint32 seconds, so these tables hold every bucket that can occur: clipping only ever
# meets histories that a spec with smaller tables asks for.
HOURS = Granularity(name="hours", unit_s=HOUR_S, n_buckets=22)
DAYS = Granularity(name="days", unit_s=DAY_S, n_buckets=17)


class FeatureSpec(BaseModel):
    """How a history is encoded: its length L and the G granularities of elapsed time."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    history_length: Annotated[int, Field(ge=1, le=100_000)] = 1000
    granularities: Annotated[tuple[Granularity, ...], Field(min_length=1)] = (HOURS, DAYS)

    @model_validator(mode="after")
    def _names_are_unique(self) -> "FeatureSpec":
        names = [granularity.name for granularity in self.granularities]
        if len(set(names)) < len(names):
            raise ValueError(f"granularities must have different names, got {names}")
        return self
