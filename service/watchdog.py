"""Ends a process whose device or event loop does not come back, so that another takes its place.

A run that hangs in a driver, or a loop that waits for something that never comes, can be cancelled
by nobody inside, and after some faults a GPU serves a process no more: all of that ends with the
process. Whoever supervises it starts it anew.
"""

import asyncio
import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Literal, Protocol

from service.logs import log_event

_log = logging.getLogger(__name__)

# What the process ends with: sysexits' "temporary failure, try again". Nothing else here uses it.
WEDGED = os.EX_TEMPFAIL
# How often it looks: so many times within `wedged_s`, and every second at least.
_LOOKS = 10
_LONGEST_PAUSE_S = 1.0
# So many runs in a row fail because of the device, and not of what was asked.
_MANY_FAILURES = 10
# What hangs may be the pipe that stderr is.
_TELLING_S = 1.0


_What = Literal["device hangs", "device fails", "event loop hangs"]


class Watched(Protocol):
    """What a device's thread says of itself.

    `running_since`: tells the present run from all others, None between two. `failures`: runs in a
    row that failed, `failing_since`: tells this row from all others, None where the latest run did
    not fail.
    """

    running_since: float | None
    failing_since: float | None
    failures: int


class Watchdog:
    """A thread that looks after the device's thread and after the event loop.

    `wedged_s`: seconds that a run, or one turn of the event loop, may take at most, or for which
    every run may fail. `end`: ends the process with a code.

    Time counts only while this thread runs too: a process that was stopped, a machine that slept,
    or a session that is built while nobody else gets the interpreter is no reason to end.
    """

    def __init__(
        self,
        device: Watched,
        *,
        wedged_s: float,
        end: Callable[[int], object] = os._exit,
    ) -> None:
        self._device = device
        self._wedged_s = wedged_s
        self._pause_s = min(_LONGEST_PAUSE_S, wedged_s / _LOOKS)
        self._end = end
        self._run_s = self._failing_s = 0.0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    @property
    def suspects_device(self) -> bool:
        """Whether half of the time is over: who can ask elsewhere had better do so."""
        return max(self._run_s, self._failing_s) >= self._wedged_s / 2

    def start(self) -> None:
        """Begin to look, from within the event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        run: float | None = None
        row: float | None = None
        silent_s = 0.0
        answered = self._ask_loop()
        while not self._stopped.wait(self._pause_s):
            before, run = run, self._device.running_since
            goes_on = run is not None and run == before
            self._run_s = self._run_s + self._pause_s if goes_on else 0.0
            before, row = row, self._device.failing_since
            goes_on = row is not None and row == before and self._device.failures >= _MANY_FAILURES
            self._failing_s = self._failing_s + self._pause_s if goes_on else 0.0
            if answered.is_set():
                silent_s = 0.0
                answered = self._ask_loop()
            else:
                silent_s += self._pause_s
            if self._run_s >= self._wedged_s:
                self._give_up("device hangs", self._run_s)
            elif self._failing_s >= self._wedged_s:
                self._give_up("device fails", self._failing_s)
            elif silent_s >= self._wedged_s:
                self._give_up("event loop hangs", silent_s)

    def _ask_loop(self) -> threading.Event:
        answered = threading.Event()
        self._loop.call_soon_threadsafe(answered.set)
        return answered

    def _give_up(self, what: _What, seconds: float) -> None:
        telling = threading.Thread(target=_tell, args=(what, seconds), daemon=True)
        telling.start()
        telling.join(_TELLING_S)
        self._stopped.set()
        self._end(WEDGED)


def _tell(what: _What, seconds: float) -> None:
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    stacks = {
        names.get(ident, str(ident)): "".join(traceback.format_stack(frame)).rstrip()
        for ident, frame in sys._current_frames().items()
        if ident != threading.get_ident()
    }
    log_event(_log, logging.ERROR, "wedged", what=what, seconds=round(seconds, 3), stacks=stacks)
