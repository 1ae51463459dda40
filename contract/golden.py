"""Golden rows: raw histories, candidates and the scores they must get, on any device."""

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from contract.errors import BundleError, RecordError
from contract.records import check_length


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
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                records = arrays["records"].tobytes()
                lengths = arrays["lengths_bytes"]
                rows = cls(
                    histories=_split(records, lengths),
                    ranking_times=arrays["ranking_times"],
                    candidates=arrays["candidates"],
                    scores=arrays["scores"],
                )
        except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
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
        return rows


def _split(records: bytes, lengths_bytes: NDArray[np.int64]) -> list[bytes]:
    ends = np.cumsum(lengths_bytes)
    if (lengths_bytes < 0).any() or int(lengths_bytes.sum()) != len(records):
        raise ValueError("the record lengths do not add up to the records")
    histories = [records[end - size : end] for end, size in zip(ends, lengths_bytes, strict=True)]
    for raw in histories:
        try:
            check_length(len(raw))
        except RecordError as error:
            raise ValueError(str(error)) from error
    return histories
