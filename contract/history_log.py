"""The history log: every user's history in one memory-mapped file, ready for the online store.

`python -m training prepare` writes it, training gathers batches from it and
`python -m service backfill` copies it into Redis, run by run.

    log.json                 format version, counts, fingerprint of the source
    behaviors.bin            records (contract.records), user by user, each user's oldest first
    behavior_offsets.npy     int64 [users + 1]: user u's records are offsets[u] .. offsets[u+1]
    user_ids.bin             UTF-8 of all user ids, concatenated
    user_id_offsets.npy      int64 [users + 1], bytes
"""

import json
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from contract.errors import HistoryLogError
from contract.files import open_plain, read_array
from contract.records import RECORD, RECORD_BYTES

FORMAT_VERSION = 1
HEADER = "log.json"
BEHAVIORS = "behaviors.bin"
BEHAVIOR_OFFSETS = "behavior_offsets.npy"
USER_IDS = "user_ids.bin"
USER_ID_OFFSETS = "user_id_offsets.npy"


class LogHeader(BaseModel):
    """What log.json says; training keeps more files beside the ones of this page."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int
    source: str
    fingerprint: str
    n_users: Annotated[int, Field(ge=0)]
    n_behaviors: Annotated[int, Field(ge=0)]
    n_impressions: Annotated[int, Field(ge=0)]
    n_items: Annotated[int, Field(ge=0)]
    has_labels: bool
    has_probabilities: bool
    has_categories: bool


class HistoryLog:
    """Read access to the histories in `folder`; nothing is loaded before it is asked for.

    Raises HistoryLogError when a file is missing or does not fit the header.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.header = _read_header(folder)
        size = RECORD_BYTES * self.header.n_behaviors
        self.behaviors: NDArray[np.void] = map_file(folder / BEHAVIORS, RECORD, size)
        self.behavior_offsets = read_offsets(
            folder / BEHAVIOR_OFFSETS, self.header.n_users, self.header.n_behaviors
        )
        self._user_ids = map_file(folder / USER_IDS, np.dtype(np.uint8))
        self._user_id_offsets = read_offsets(
            folder / USER_ID_OFFSETS, self.header.n_users, self._user_ids.size
        )

    def __len__(self) -> int:
        """Return the number of users."""
        return self.header.n_users

    def user_id(self, user: int) -> str:
        """Return the id of the user with index `user`; HistoryLogError where it is no text."""
        start, end = self._user_id_offsets[user : user + 2]
        try:
            return self._user_ids[start:end].tobytes().decode()
        except UnicodeDecodeError as error:
            raise HistoryLogError(
                f"{self.folder / USER_IDS}: user {user} has no id in UTF-8: {error}"
            ) from error

    def history(self, user: int, newest: int | None = None) -> bytes:
        """Return the records of one user, oldest first; the `newest` ones only, where given."""
        start, end = self.behavior_offsets[user : user + 2]
        if newest is not None:
            start = max(start, end - newest)
        return self.behaviors[start:end].tobytes()


def _read_header(folder: Path) -> LogHeader:
    path = folder / HEADER
    try:
        raw = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise HistoryLogError(f"{folder} is not a prepared log: {HEADER} is missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise HistoryLogError(f"{path} is not readable: {error}") from error
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if version != FORMAT_VERSION:
        raise HistoryLogError(
            f"{path} has format version {version!r}, this program reads version {FORMAT_VERSION}"
        )
    try:
        return LogHeader.model_validate(raw)
    except ValidationError as error:
        raise HistoryLogError(f"{path}: {error}") from error


def map_file(
    path: Path, dtype: np.dtype[np.generic], size_bytes: int | None = None
) -> NDArray[np.void]:
    """Return a read-only map of a file; HistoryLogError unless it has `size_bytes` bytes."""
    try:
        found = path.stat().st_size
    except OSError as error:
        raise HistoryLogError(f"{path} is not readable: {error}") from error
    if size_bytes is not None and found != size_bytes:
        raise HistoryLogError(f"{path} has {found} bytes, {HEADER} says {size_bytes}")
    if not found:  # an empty file cannot be mapped
        return np.empty(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r")


def read_offsets(path: Path, n_runs: int, total: int) -> NDArray[np.int64]:
    """Return int64 [n_runs + 1]; HistoryLogError unless they divide `total` entries into runs."""
    try:
        with open_plain(path, follow_links=True) as file:
            offsets = read_array(file)
    except (OSError, ValueError) as error:
        raise HistoryLogError(f"{path} is not readable: {error}") from error
    if (
        offsets.dtype != np.int64
        or offsets.shape != (n_runs + 1,)
        or offsets[0] != 0
        or offsets[-1] != total
        or (np.diff(offsets) < 0).any()
    ):
        raise HistoryLogError(f"{path} does not divide {total} entries into {n_runs} runs")
    checked: NDArray[np.int64] = offsets
    return checked
