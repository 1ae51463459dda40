"""Golden rows: raw histories, candidates and the scores they must get, on any device."""

import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from contract.errors import BundleError, RecordError
from contract.files import open_plain, read_array
from contract.records import check_length

# What is in the file: type and axes.
_ARRAYS: dict[str, tuple[type[np.generic], int]] = {
    "records": (np.uint8, 1),
    "lengths_bytes": (np.int64, 1),
    "ranking_times": (np.int64, 1),
    "candidates": (np.int64, 2),
    "scores": (np.float32, 2),
}
# A few rows of 100,000 behaviors; a small file can unpack to any size.
_MAX_BYTES = 64 << 20
# What zipfile raises beside ValueError: a missing member, encryption, an unknown compression.
_BROKEN_ZIP = (
    EOFError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)


@dataclass(frozen=True, kw_only=True)
class GoldenRows:
    """N scored requests: `histories` (raw records), `ranking_times` int64 [N] (unix seconds),
    `candidates` int64 item ids [N, C] (0 pads) and `scores` float32 [N, C].
    """

    histories: Sequence[bytes]
    ranking_times: NDArray[np.int64]
    candidates: NDArray[np.int64]
    scores: NDArray[np.float32]

    def save(self, path: Path) -> None:
        """Write the rows as an .npz of plain arrays."""
        np.savez_compressed(
            path,
            records=np.frombuffer(b"".join(self.histories), dtype=np.uint8),
            lengths_bytes=np.array([len(raw) for raw in self.histories], dtype=np.int64),
            ranking_times=self.ranking_times,
            candidates=self.candidates,
            scores=self.scores,
        )

    @classmethod
    def load(cls, path: Path) -> "GoldenRows":
        """Read rows written by `save`; raises BundleError that names the file otherwise."""
        try:
            with open_plain(path) as file:
                records, lengths, ranking_times, candidates, scores = _read_arrays(file)
                rows = cls(
                    histories=_split(records.tobytes(), lengths),
                    ranking_times=ranking_times,
                    candidates=candidates,
                    scores=scores,
                )
        except (OSError, ValueError) as error:
            raise BundleError(f"{path.name}: not readable as golden rows: {error}") from error
        n = len(rows.histories)
        if rows.candidates.ndim != 2 or rows.scores.shape != rows.candidates.shape:
            raise BundleError(
                f"{path.name}: candidates {rows.candidates.shape} and scores {rows.scores.shape} "
                "must be two matrices of one shape"
            )
        if not n or rows.ranking_times.shape != (n,) or len(rows.candidates) != n:
            raise BundleError(
                f"{path.name}: {n} histories, {len(rows.ranking_times)} ranking times and "
                f"{len(rows.candidates)} candidate rows, expected one number above 0"
            )
        if not np.isfinite(rows.scores).all():
            raise BundleError(f"{path.name}: a score is not finite")
        return rows


def _read_arrays(file: BinaryIO) -> list[NDArray[Any]]:
    """Return the arrays in the order of `_ARRAYS`; ValueError unless all are as expected."""
    try:
        with zipfile.ZipFile(file) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
            if size > _MAX_BYTES:
                raise ValueError(f"{size:,} bytes, expected at most {_MAX_BYTES:,}")
            arrays = [_read_member(archive, name, *of) for name, of in _ARRAYS.items()]
    except _BROKEN_ZIP as error:
        raise ValueError(f"no .npz file: {error}") from error
    return arrays


def _read_member(
    archive: zipfile.ZipFile, name: str, dtype: type[np.generic], axes: int
) -> NDArray[Any]:
    with archive.open(f"{name}.npy") as member:
        array = read_array(member)
    if array.dtype != dtype or array.ndim != axes:
        raise ValueError(
            f"{name} are {array.dtype} of {array.ndim} axes, expected {np.dtype(dtype)} of {axes}"
        )
    return array


def _split(records: bytes, lengths_bytes: NDArray[np.int64]) -> list[bytes]:
    ends = np.cumsum(lengths_bytes)
    # Each of them first: a sum may wrap around.
    outside = (lengths_bytes < 0) | (lengths_bytes > len(records))
    if outside.any() or int(lengths_bytes.sum()) != len(records):
        raise ValueError("the record lengths do not add up to the records")
    histories = [records[end - size : end] for end, size in zip(ends, lengths_bytes, strict=True)]
    for raw in histories:
        try:
            check_length(len(raw))
        except RecordError as error:
            raise ValueError(str(error)) from error
    return histories
