"""Threads that give way, and rise again."""

import os
import threading
from threading import get_native_id

import pytest

from service.priority import give_way, in_background, may_rise, rise


def own_policy() -> int:
    return os.sched_getscheduler(get_native_id())


def test_what_is_in_the_background_gives_way_with_the_threads_that_it_starts():
    def both() -> tuple[int, int]:
        inherited: list[int] = []
        thread = threading.Thread(target=lambda: inherited.append(own_policy()))
        thread.start()
        thread.join()
        return own_policy(), inherited[0]

    before = own_policy()
    assert in_background(both) == (os.SCHED_IDLE, os.SCHED_IDLE)
    assert own_policy() == before


def test_what_fails_in_the_background_fails_for_who_asked():
    with pytest.raises(ZeroDivisionError):
        in_background(lambda: 1 // 0)


def test_all_threads_rise_where_it_is_allowed():
    told, may_end = threading.Event(), threading.Event()
    threads: list[int] = []

    def behind() -> None:
        give_way()
        threads.append(get_native_id())
        told.set()
        may_end.wait()

    thread = threading.Thread(target=behind)
    thread.start()
    told.wait()
    try:
        rise()
        expected = os.SCHED_OTHER if may_rise() else os.SCHED_IDLE
        assert os.sched_getscheduler(threads[0]) == expected
    finally:
        may_end.set()
        thread.join()
