"""Taking values from the bytes that a fuzzer makes; what is missing is zero."""

import atexit
import shutil
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
from numpy.typing import NDArray


def scratch_folder() -> Path:
    """Return a new folder that goes with the process."""
    folder = Path(mkdtemp(prefix="mneme-fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


class Pieces:
    """Bytes that are taken from the front."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def byte(self) -> int:
        """Return a number below 256."""
        return self.take(1)[0]

    def take(self, n_bytes: int) -> bytes:
        """Return so many bytes."""
        taken = self._data[self._at : self._at + n_bytes]
        self._at += n_bytes
        return taken.ljust(n_bytes, b"\0")

    def int64s(self, n: int) -> NDArray[np.int64]:
        """Return so many numbers of the whole range."""
        return np.frombuffer(self.take(8 * n), dtype="<i8").astype(np.int64)

    def rest(self) -> bytes:
        """Return what is left."""
        taken = self._data[self._at :]
        self._at = len(self._data)
        return taken

    def parts(self, n: int) -> list[bytes]:
        """Return what is left in so many parts, each but the last after its length in two bytes."""
        lengths = [int.from_bytes(self.take(2), "little") for _ in range(n - 1)]
        found = []
        for length in lengths:
            part = self._data[self._at : self._at + length]
            self._at += length
            found.append(part)
        return [*found, self.rest()]


def joined(*parts: bytes) -> bytes:
    """Return the bytes from which `Pieces.parts` makes these parts."""
    lengths = [len(part).to_bytes(2, "little") for part in parts[:-1]]
    return b"".join([*lengths, *parts])
