"""How much is asked of a device in one run, as long as it has the memory for it."""

import asyncio
from math import ceil

# What one run failed for may have been somebody else's need for the moment.
_REGROWTH_S = 30.0
_REGROWTH = 1.25


class MemoryLimit:
    """What was set, `largest`, or less after a run for which there was no memory.

    It grows back by a quarter every `regrowth_s` seconds, and falls again where that was too much.
    To be used within a running event loop.

    `value`: at present.
    """

    def __init__(self, largest: int, *, regrowth_s: float = _REGROWTH_S) -> None:
        self.value = largest
        self._largest = largest
        self._regrowth_s = regrowth_s
        self._growth: asyncio.TimerHandle | None = None

    def lower(self, failed: int) -> bool:
        """Fall to half of what has failed; return whether that is less than before."""
        lowered = max(1, failed // 2)
        if lowered >= self.value:
            return False
        self.value = lowered
        if self._growth is not None:
            self._growth.cancel()
        self._wait()
        return True

    def _wait(self) -> None:
        self._growth = asyncio.get_running_loop().call_later(self._regrowth_s, self._grow)

    def _grow(self) -> None:
        self.value = min(self._largest, ceil(_REGROWTH * self.value))
        if self.value < self._largest:
            self._wait()
