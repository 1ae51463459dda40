"""What an A/B simulation is to do: written into `run.json` by the one who starts it, read from
there by the processes of its people.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from loadtest.ab.people import Habits

_DAY_S = 86_400
# After so long the people give up waiting for an answer.
TIMEOUT_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """`world`: file of the world; `url`: of the service. `users`: people at a time, each of whom
    waits for an answer before the next visit (a closed loop), spread over `processes` evenly.

    The run ends after `visits` in all or after `run_time_s`, whichever comes first. `rate`: visits
    a second in all, held by constant pacing as long as answers come quickly enough; without it,
    visits follow each other at once. `deadline_ms`: sent as `X-Deadline-Ms`.
    The clock of the run is the world's: it starts `start_days` after the histories end and goes
    `speedup` times as fast as the real one.
    `ui_port`: where Locust's web page is; the person there starts and ends the run, and `visits`
    and `run_time_s` must be None then.
    Raises ValueError for what cannot be.
    """

    world: str
    url: str
    users: int = 10
    processes: int = 1
    visits: int | None = None
    run_time_s: float | None = None
    rate: float | None = None
    deadline_ms: float | None = None
    start_days: float = 0.0
    speedup: float = 1440.0
    ui_port: int | None = None
    habits: Habits = field(default_factory=Habits)

    def __post_init__(self) -> None:
        for name in ("users", "processes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.users % self.processes:
            raise ValueError(
                f"users must be a multiple of processes ({self.processes}), got {self.users}"
            )
        for name in ("run_time_s", "rate", "deadline_ms", "speedup"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive, got {value}")
        if not 0 <= self.start_days < math.inf:
            raise ValueError(f"start_days must be 0 or more, got {self.start_days}")
        ends = self.visits is not None or self.run_time_s is not None
        if ends == (self.ui_port is not None):
            raise ValueError(
                "visits or run_time_s must say when the run ends; on Locust's web page the person "
                "there ends it, and neither must be given"
            )
        if self.visits is not None and self.visits < self.users:
            raise ValueError(f"visits must be at least users ({self.users}), got {self.visits}")

    def quota(self, number: int) -> float:
        """Return how many visits the user `number` (from 0) makes; infinity where none is set."""
        if self.visits is None:
            return math.inf
        return self.visits // self.users + (number < self.visits % self.users)

    def world_time_s(self, history_end_s: int, at_s: float) -> int:
        """Return the world's time (unix seconds) when the run is `at_s` old."""
        return history_end_s + int(self.start_days * _DAY_S + at_s * self.speedup)

    def as_settings(self) -> dict[str, Any]:
        """Return all settings by name, as JSON can say them."""
        named = asdict(self)
        return {**named.pop("habits"), **named}

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> "Plan":
        """Return what `as_settings` described; other settings are left aside."""
        own = {one.name: settings[one.name] for one in fields(cls) if one.name != "habits"}
        return cls(**own, habits=Habits(**{one.name: settings[one.name] for one in fields(Habits)}))
