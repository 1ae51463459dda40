"""Reading what others have written: plain files only, and arrays without pickles.

A named pipe or a device in place of a file would be waited for or read for ever, and a symbolic
link lets a folder name a file that is none of its own.
"""

import errno
import os
import stat
import zlib
from pathlib import Path
from tokenize import TokenError
from typing import Any, BinaryIO
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

# What numpy and zipfile raise for bytes that are no array, beside OSError and ValueError: a header
# is parsed as Python, and sizes are believed until the memory for them is asked for.
_BROKEN_ARRAY = (
    BadZipFile,
    EOFError,
    KeyError,
    MemoryError,
    NotImplementedError,
    OverflowError,
    RecursionError,
    RuntimeError,
    SyntaxError,
    TokenError,
    TypeError,
    zlib.error,
)


def open_plain(path: Path, *, follow_links: bool = False) -> BinaryIO:
    """Open a file for reading; OSError unless it is a plain file, and no link where not allowed."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # or a pipe is waited for
    try:
        descriptor = os.open(path, flags if follow_links else flags | os.O_NOFOLLOW)
    except ValueError as error:  # NUL within the name
        raise OSError(errno.EINVAL, str(error)) from error
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "a symbolic link, expected the file itself") from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a plain file")
    return os.fdopen(descriptor, "rb")


def read_plain(path: Path, *, max_bytes: int, follow_links: bool = False) -> bytes:
    """Return what a plain file holds; OSError unless it is one of at most `max_bytes` bytes."""
    with open_plain(path, follow_links=follow_links) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise OSError(errno.EFBIG, f"more than {max_bytes:,} bytes")
    return content


def read_array(file: Any) -> NDArray[Any]:
    """Return the array of an open .npy file; ValueError where it is none, or holds pickles."""
    try:
        return np.lib.format.read_array(file, allow_pickle=False)
    except _BROKEN_ARRAY as error:
        raise ValueError(f"no array: {type(error).__name__}: {error}") from error
