"""What Linux's prctl(2) does for a process, and Python has no name for."""

import ctypes
import os

_SET_NAME = 15
_SET_CHILD_SUBREAPER = 36


def name_process(name: str) -> None:
    """Name this thread, and so the process where it is the first: at most 15 bytes, for `top`."""
    _prctl(_SET_NAME, name.encode())


def adopt_orphans() -> None:
    """Become the parent of all descendants whose own parent ends."""
    _prctl(_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, value: int | bytes) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if library.prctl(option, value, 0, 0, 0):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
