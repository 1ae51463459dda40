"""Who runs on the device next: several arms share it, each in proportion to its weight.

Start-time fair queueing (Goyal, Vin and Cheng, "Start-Time Fair Queuing", SIGCOMM 1996): a turn
begins at a virtual time, its seat's own clock goes on by seconds / weight, and the seat whose next
turn begins earliest comes next. A seat that nobody competes with gets everything, one that was idle
has saved nothing up, and while two are busy their seconds on the device are as their weights,
whatever a turn takes. What a turn will take need not be known.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType


def _nothing_waits() -> float:
    return 0.0


class Seat:
    """One arm's place at the device, to be taken like a lock: first come, first served.

    `weight`: its part, next to the other seats' weights. `waiting_s`: asked for the seconds of all
    turns that wait here, by what others are told of their own wait.
    """

    def __init__(self, device: "SharedDevice", weight: float) -> None:
        self.weight = weight
        self.waiting_s: Callable[[], float] = _nothing_waits
        # The device's notes: who waits, when the next turn begins and the latest one ended (both in
        # virtual time), and the seconds that it took.
        self.waiting: deque[asyncio.Future[None]] = deque()
        self.begins = 0.0
        self.ended = 0.0
        self.latest_s = 0.0
        self._device = device

    async def acquire(self) -> None:
        """Return when the device is this seat's."""
        await self._device.acquire(self)

    def release(self) -> None:
        """End the turn."""
        self._device.release(self)

    async def __aenter__(self) -> None:
        await self.acquire()

    async def __aexit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self.release()

    def expect(self, seconds: float) -> None:
        """Say what the present turn will take, for those who ask when the device is free."""
        self._device.busy_until = time.perf_counter() + seconds

    def free_at(self, now: float, own_s: float) -> float:
        """Return when the device will have had time for all but `own_s` seconds of this seat's.

        It is through with the present turn and, meanwhile, with as much of what waits elsewhere as
        fairness grants: as many seconds as its weight is to this one's, and one turn more.
        """
        others_s = sum(
            min(seat.waiting_s(), own_s * seat.weight / self.weight + seat.latest_s)
            for seat in self._device.seats
            if seat is not self
        )
        return max(now, self._device.busy_until) + others_s

    def leave(self) -> None:
        """Give the place up; nobody may be waiting here."""
        self._device.seats.remove(self)


class SharedDevice:
    """One device and those who take turns on it, all within one event loop.

    `busy_until`: when the present turn is expected to end, on the clock of `time.perf_counter`.
    """

    def __init__(self) -> None:
        self.seats: list[Seat] = []
        self.busy_until = 0.0
        self._holder: Seat | None = None
        self._virtual = 0.0
        self._began = 0.0

    def seat(self, weight: float) -> Seat:
        """Return a new place."""
        self.seats.append(Seat(self, weight))
        return self.seats[-1]

    async def acquire(self, seat: Seat) -> None:
        """Return when the device is the seat's."""
        if not seat.waiting and seat is not self._holder:
            # No earlier than what runs: idleness does not pay.
            seat.begins = max(self._virtual, seat.ended)
        if self._holder is None:
            self._grant(seat)
            return
        granted = asyncio.get_running_loop().create_future()
        seat.waiting.append(granted)
        try:
            await granted
        except asyncio.CancelledError:
            if granted.cancelled():
                seat.waiting.remove(granted)
            else:  # the turn had just begun
                self.release(seat)
            raise

    def release(self, seat: Seat) -> None:
        """End the seat's turn and begin the next one."""
        seat.latest_s = time.perf_counter() - self._began
        seat.ended = seat.begins = self._virtual + seat.latest_s / seat.weight
        self._holder = None
        self.busy_until = 0.0
        waiting = [one for one in self.seats if not all(each.done() for each in one.waiting)]
        if waiting:
            # Of equal ones the first in the list: the order in which they took their places.
            following = min(waiting, key=lambda one: one.begins)
            self._grant(following)
            # What is done has been cancelled, and its task not come to know of it yet.
            granted = next(each for each in following.waiting if not each.done())
            following.waiting.remove(granted)
            granted.set_result(None)

    def _grant(self, seat: Seat) -> None:
        self._holder = seat
        self._virtual = seat.begins
        self._began = time.perf_counter()
