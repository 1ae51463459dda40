"""What Linux's prctl(2) does for a process, and Python has no name for."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

_SET_NAME = 15
_SET_CHILD_SUBREAPER = 36
_GET_CHILD_SUBREAPER = 37


def name_process(name: str) -> None:
    """Name this thread, and so the process where it is the first: at most 15 bytes, for `top`."""
    _prctl(_SET_NAME, name.encode())


@contextmanager
def adopting_orphans() -> Iterator[None]:
    """Become, for as long, the parent of all descendants whose own parent ends."""
    found = ctypes.c_int()
    _prctl(_GET_CHILD_SUBREAPER, ctypes.byref(found))
    _prctl(_SET_CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        _prctl(_SET_CHILD_SUBREAPER, found.value)


def _prctl(option: int, value: object) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if library.prctl(option, value, 0, 0, 0):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
