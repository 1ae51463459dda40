"""When requests are due: stages of a rate that holds or ramps, and the arrivals drawn from them.

A schedule is written as stages, in order, parted by commas:

    100x10          100 requests/s for 10 s
    100-500x20      a ramp: from 100 to 500 requests/s, linearly, within 20 s
    2000x0.5        a spike is a short stage
    0x5             a pause

so that "100x10,100-500x20,2000x2,500x10" warms up, climbs, is hit for two seconds and recovers.

Arrivals come by inversion: those of a process of rate 1 are drawn over the expected number of
requests, and each is put where the integral of the rate reaches it (Çinlar, "Introduction to
Stochastic Processes", 1975, section 4.7). That is exact for ramps too.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

Arrivals = Literal["poisson", "bursty", "constant"]
ARRIVALS: tuple[Arrivals, ...] = get_args(Arrivals)

_NUMBER = r"(\d+(?:\.\d+)?)"
_STAGE = re.compile(rf"{_NUMBER}(?:-{_NUMBER})?x{_NUMBER}")


class ScheduleError(ValueError):
    """A schedule that cannot be understood, or that holds no request."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """`duration_s` seconds in which the rate goes from `first_rate` to `last_rate`, linearly.

    Rates are requests a second, 0 or more. Raises ScheduleError for others.
    """

    first_rate: float
    last_rate: float
    duration_s: float

    def __post_init__(self) -> None:
        if not (0 <= self.first_rate < math.inf and 0 <= self.last_rate < math.inf):
            raise ScheduleError(
                "rates must be 0 or more and finite, "
                f"got {self.first_rate:g} and {self.last_rate:g} requests a second"
            )
        if not 0 < self.duration_s < math.inf:
            raise ScheduleError(
                f"a stage must last more than 0 seconds and not forever, got {self.duration_s:g}"
            )

    @property
    def requests(self) -> float:
        """Return the expected number of requests."""
        return (self.first_rate + self.last_rate) / 2 * self.duration_s

    def __str__(self) -> str:
        ramp = "" if self.first_rate == self.last_rate else f"-{self.last_rate:g}"
        return f"{self.first_rate:g}{ramp}x{self.duration_s:g}"


@dataclass(frozen=True, kw_only=True)
class Bursts:
    """How bursty arrivals swing around the stated rate: a two-state Markov-modulated Poisson
    process (Fischer and Meier-Hellstern, "The Markov-modulated Poisson process cookbook",
    Performance Evaluation 18, 1993), whose long-run mean is the stated rate.

    `factor`: rate within a burst over the stated one. `share`: of the time that is burst.
    `length_s`: mean length of a burst; lengths of bursts and of the calm between are exponential.
    A drawn schedule is scaled to its stated number of requests: what happened to fall into more or
    longer bursts than usual is not a higher load. Raises ScheduleError where the calm would need a
    negative rate.
    """

    factor: float = 4.0
    share: float = 0.1
    length_s: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ScheduleError(f"the share of bursts must be within 0 .. 1, got {self.share:g}")
        if not 1 <= self.factor <= 1 / self.share:
            raise ScheduleError(
                f"the factor of bursts must be within 1 .. 1 / share ({1 / self.share:g}), "
                f"got {self.factor:g}"
            )
        if not 0 < self.length_s < math.inf:
            raise ScheduleError(
                f"the mean length of a burst must be positive seconds, got {self.length_s:g}"
            )

    @property
    def calm_factor(self) -> float:
        """Return the rate outside of bursts over the stated one."""
        return (1 - self.share * self.factor) / (1 - self.share)

    @property
    def calm_length_s(self) -> float:
        """Return the mean length of the calm between two bursts, in seconds."""
        return self.length_s * (1 - self.share) / self.share


def steady(rate: float, duration_s: float) -> tuple[Stage, ...]:
    """Return the schedule of one rate (requests a second) that holds for `duration_s` seconds."""
    return (Stage(first_rate=rate, last_rate=rate, duration_s=duration_s),)


def parse_stages(text: str) -> tuple[Stage, ...]:
    """Read stages as this module's docstring writes them; raises ScheduleError that names the
    one that is wrong.
    """
    stages: list[Stage] = []
    for part in text.split(","):
        found = _STAGE.fullmatch(part.strip())
        if found is None:
            raise ScheduleError(
                f"stage {part.strip()!r} is not RATExSECONDS (100x10) or a ramp "
                "RATE-RATExSECONDS (100-500x20)"
            )
        first, last, seconds = found.groups()
        stages.append(
            Stage(
                first_rate=float(first), last_rate=float(last or first), duration_s=float(seconds)
            )
        )
    return tuple(stages)


def draw_arrivals(
    stages: Sequence[Stage],
    arrivals: Arrivals,
    seed: int,
    bursts: Bursts = Bursts(),
) -> NDArray[np.float64]:
    """Return when requests are due, in seconds from the start, ascending, float64 [N].

    "poisson" has independent arrivals, as a crowd of people makes them: N varies around the
    expected number. "bursty" is the same with a rate that swings as `bursts` says. "constant" has a
    request whenever the integral of the rate reaches the next whole number, at a steady rate every
    1 / rate seconds, and does not read `seed`. Raises ScheduleError where no request is due.
    """
    rng = np.random.default_rng(seed)
    swung = _with_bursts(stages, bursts, rng) if arrivals == "bursty" else stages
    expected = np.array([stage.requests for stage in swung])
    ends = np.cumsum(expected)
    total = float(ends[-1])
    if arrivals == "constant":
        units = np.arange(math.ceil(total - 1e-9), dtype=np.float64)
    else:
        # Bursts whose calm has no rate may all miss a short schedule.
        n = rng.poisson(sum(stage.requests for stage in stages)) if total else 0
        units = np.sort(rng.uniform(0.0, total, n))
    if not len(units):
        raise ScheduleError(f"no request falls into the schedule {','.join(map(str, stages))}")

    stage_N = np.searchsorted(ends, units, side="right")
    first = np.array([stage.first_rate for stage in swung])
    duration_s = np.array([stage.duration_s for stage in swung])
    slope = (np.array([stage.last_rate for stage in swung]) - first) / duration_s
    # The positive root of first * t + slope * t^2 / 2 = unit, in the form that does not cancel.
    unit_N = np.maximum(units - (ends - expected)[stage_N], 0.0)
    first_N = first[stage_N]
    below_N = first_N + np.sqrt(np.maximum(first_N**2 + 2 * slope[stage_N] * unit_N, 0.0))
    within_s = np.divide(2 * unit_N, below_N, out=np.zeros_like(unit_N), where=below_N > 0)
    # Exactly the ends of the stages before, so that what is due on an edge is not put before it.
    starts_s = np.concatenate([[0.0], np.cumsum(duration_s)[:-1]])
    due_s: NDArray[np.float64] = starts_s[stage_N] + np.minimum(within_s, duration_s[stage_N])
    return due_s


def _with_bursts(
    stages: Sequence[Stage], bursts: Bursts, rng: np.random.Generator
) -> tuple[Stage, ...]:
    """Cut stages where bursts begin and end, and scale their rates."""
    cut: list[Stage] = []
    is_burst = bool(rng.random() < bursts.share)
    left_s = rng.exponential(bursts.length_s if is_burst else bursts.calm_length_s)
    for stage in stages:
        slope = (stage.last_rate - stage.first_rate) / stage.duration_s
        remaining_s = stage.duration_s
        while remaining_s > 0:
            length_s = min(left_s, remaining_s)
            factor = bursts.factor if is_burst else bursts.calm_factor
            start_s = stage.duration_s - remaining_s
            first, last = (
                factor * max(stage.first_rate + slope * at_s, 0.0)
                for at_s in (start_s, start_s + length_s)
            )
            if length_s > 0:
                cut.append(Stage(first_rate=first, last_rate=last, duration_s=length_s))
            remaining_s -= length_s
            left_s -= length_s
            if left_s <= 0:
                is_burst = not is_burst
                left_s = rng.exponential(bursts.length_s if is_burst else bursts.calm_length_s)
    return tuple(cut)
