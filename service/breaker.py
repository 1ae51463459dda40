"""A circuit breaker: what has failed again and again is left alone for a while."""

import random
import time
from collections.abc import Callable
from enum import IntEnum

# Failures without a success between them that open it.
MAX_FAILURES = 5
# Seconds that it stays open; each time up to half of it more, so that not all come back at once.
OPEN_S = 0.5


class BreakerState(IntEnum):
    """Closed lets every call pass, open none, half-open one: the probe."""

    CLOSED = 0
    HALF_OPEN = 1
    OPEN = 2


class CircuitBreaker:
    """Counts failures in a row. `on_change`: hears the new state and, of a failure, why.

    Every call that `allows` let pass ends in one of `succeeded`, `failed` and `gave_up`.
    """

    def __init__(
        self,
        *,
        on_change: Callable[[BreakerState, str], None],
        max_failures: int = MAX_FAILURES,
        open_s: float = OPEN_S,
    ) -> None:
        self._on_change = on_change
        self._max_failures = max_failures
        self._open_s = open_s
        self._n_failures = 0
        self._probe_from = 0.0
        self.state = BreakerState.CLOSED

    def allows(self) -> bool:
        """Return whether a call may be made; the first after the pause is the probe."""
        if self.state is BreakerState.CLOSED:
            return True
        if self.state is BreakerState.OPEN and time.monotonic() >= self._probe_from:
            self._change(BreakerState.HALF_OPEN, "")
            return True
        return False

    def succeeded(self) -> None:
        """Close it."""
        self._n_failures = 0
        if self.state is not BreakerState.CLOSED:
            self._change(BreakerState.CLOSED, "")

    def failed(self, reason: str) -> None:
        """Count a failure; a failed probe opens it again at once."""
        self._n_failures += 1
        is_probe = self.state is BreakerState.HALF_OPEN
        if is_probe or (
            self.state is BreakerState.CLOSED and self._n_failures >= self._max_failures
        ):
            pause_s = self._open_s * random.uniform(1.0, 1.5)  # noqa: S311  # no secret
            self._probe_from = time.monotonic() + pause_s
            self._change(BreakerState.OPEN, reason)

    def gave_up(self) -> None:
        """Forget a call that says nothing of what was called; after a probe, the next one is."""
        if self.state is BreakerState.HALF_OPEN:
            self._change(BreakerState.OPEN, "the probe was given up")

    def _change(self, state: BreakerState, reason: str) -> None:
        self.state = state
        self._on_change(state, reason)
