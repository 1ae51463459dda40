"""Threads that give way to all others of the machine, and may rise again.

Linux schedules threads, not processes: a process can open a model in a thread that gives way while
its others are as before. A thread inherits from the one that starts it.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import get_native_id
from typing import TypeVar

_ResultT = TypeVar("_ResultT")


def give_way() -> None:
    """Let this thread, and those that it starts, run where no other wants to."""
    os.sched_setscheduler(get_native_id(), os.SCHED_IDLE, os.sched_param(0))


def in_background(work: Callable[[], _ResultT]) -> _ResultT:
    """Do work in a thread that gives way, and return its result."""
    with ThreadPoolExecutor(1, initializer=give_way) as thread:
        return thread.submit(work).result()


def may_rise() -> bool:
    """Return whether a thread of this process that gave way may undo it."""
    return in_background(lambda: _rise(get_native_id()))


def rise() -> None:
    """Undo it in all threads of this process."""
    for thread in Path("/proc/self/task").iterdir():
        with suppress(ProcessLookupError):  # it has just ended
            _rise(int(thread.name))


def _rise(thread: int) -> bool:
    if os.sched_getscheduler(thread) != os.SCHED_IDLE:
        return True
    try:
        os.sched_setscheduler(thread, os.SCHED_OTHER, os.sched_param(0))
    except PermissionError:
        return False
    return True
