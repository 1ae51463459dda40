"""The highest request rate that a server holds, by doubling and bisecting."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from loadtest.open_loop import LoadResult

_ATTEMPTS = 2
_HALVINGS = 6


@dataclass(frozen=True, kw_only=True, eq=False)
class Probe:
    """One measurement at `rate` requests a second, and whether it held."""

    rate: float
    result: LoadResult
    held: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class RateSearch:
    """`rate`: highest rate that held, in requests a second; 0 when none did, `result` is None then.
    `result`: of the probe that held there. `probes`: all of them, in order, for the log.
    """

    rate: float
    result: LoadResult | None
    probes: tuple[Probe, ...]


def highest_rate(
    measure: Callable[[float], LoadResult],
    *,
    holds: Callable[[LoadResult], bool],
    low: float,
    high: float,
    precision: float = 0.05,
) -> RateSearch:
    """Search for the highest rate (requests a second) at which `holds(measure(rate))`.

    Doubles from `low` until a rate fails or `high` holds, then bisects geometrically until the
    lowest failed rate is within a factor 1 + `precision` of the highest held one. Where `low`
    itself fails, it is halved up to six times first. A rate fails only when it fails twice in a
    row: on a machine with other work, one bad second must not decide. The result is therefore a
    little kinder than a single probe. Raises ValueError for impossible bounds.
    """
    if not 0 < low <= high < math.inf:
        raise ValueError(f"needs 0 < low <= high, both finite, got low {low} and high {high}")
    if not precision > 0:
        raise ValueError(f"precision must be positive, got {precision}")
    probes: list[Probe] = []

    def held_at(rate: float) -> bool:
        for _ in range(_ATTEMPTS):
            result = measure(rate)
            probes.append(Probe(rate=rate, result=result, held=holds(result)))
            if probes[-1].held:
                return True
        return False

    held, failed = _bracket(held_at, low, high)
    while held > 0 and failed > held * (1 + precision):
        middle = math.sqrt(held * failed)
        if held_at(middle):
            held = middle
        else:
            failed = middle
    best = next((probe for probe in probes if probe.held and probe.rate == held), None)
    return RateSearch(rate=held, result=best.result if best else None, probes=tuple(probes))


def _bracket(held_at: Callable[[float], bool], low: float, high: float) -> tuple[float, float]:
    """Return a held and a failed rate: equal when `high` holds, 0 and a rate when none does."""
    if held_at(low):
        held = low
        while held < high:
            rate = min(2 * held, high)
            if not held_at(rate):
                return held, rate
            held = rate
        return held, held
    failed = low
    for _ in range(_HALVINGS):
        if held_at(failed / 2):
            return failed / 2, failed
        failed /= 2
    return 0.0, failed
