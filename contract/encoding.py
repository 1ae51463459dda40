"""Raw histories and candidates to model inputs: the one encoding of training and of serving.

Shapes: B requests, C candidates, L history length, G granularities.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from contract.buckets import elapsed_units, time_buckets
from contract.catalogue import Catalogue
from contract.features import FeatureSpec
from contract.records import MIN_ITEM, PADDING_ITEM, RECORD_BYTES, in_time_order, stack_records

_BLOCK_BEHAVIORS = 8192


@dataclass(frozen=True, kw_only=True)
class ModelInputs:
    """The three inputs of every model, int64; 0 pads all of them.

    `history_items` [B, L]: catalogue rows, right-aligned, so that the newest behavior always
    stands in the last column. `history_buckets` [B, L, G]. `candidate_items` [B, C]: rows.
    """

    history_items: NDArray[np.int64]
    history_buckets: NDArray[np.int64]
    candidate_items: NDArray[np.int64]

    def as_feed(self) -> dict[str, NDArray[np.int64]]:
        """Return the inputs under the names that an exported graph gives them."""
        return {
            "history_items": self.history_items,
            "history_buckets": self.history_buckets,
            "candidate_items": self.candidate_items,
        }


def history_buckets(
    times_BL: NDArray[np.generic],
    valid_BL: NDArray[np.bool_],
    ranking_times_B: NDArray[np.int64],
    spec: FeatureSpec,
) -> NDArray[np.int64]:
    """Return the time buckets [B, L, G] of behaviors at `times_BL`, 0 where not valid.

    Elapsed time is measured back from the ranking time of each row, in seconds.
    """
    elapsed_BL = ranking_times_B[:, None] - times_BL.astype(np.int64)
    elapsed_BL *= valid_BL
    buckets_BLG = np.empty((*times_BL.shape, len(spec.granularities)), dtype=np.int64)
    for g, granularity in enumerate(spec.granularities):
        on_scale = time_buckets if granularity.scale == "doubling" else elapsed_units
        buckets_BLG[:, :, g] = on_scale(elapsed_BL, granularity.unit_s, granularity.n_buckets)
    return buckets_BLG


def stack_candidates(
    candidates: Sequence[NDArray[np.int64]], width: int | None = None
) -> NDArray[np.int64]:
    """Return item ids [B, width], padded with 0 on the right; `width` defaults to the longest."""
    longest = max((len(row) for row in candidates), default=0)
    stacked_BC = np.full(
        (len(candidates), longest if width is None else width), PADDING_ITEM, dtype=np.int64
    )
    for b, row in enumerate(candidates):
        stacked_BC[b, : len(row)] = row
    return stacked_BC


def encode(
    histories: Sequence[bytes],
    candidates_BC: NDArray[np.int64],
    ranking_times_B: NDArray[np.int64],
    catalogue: Catalogue,
    spec: FeatureSpec,
    length: int | None = None,
) -> tuple[ModelInputs, NDArray[np.bool_]]:
    """Encode B raw histories (whole records, as they are stored) and their candidates.

    `length`: columns of the history, `spec.history_length` unless said; the behaviors that were
    stored last are kept, and encoded by time. Returns the inputs and `corrupt_B`: whether a row
    holds an item id below 1, which no writer of histories produces; the scores of such a row mean
    nothing.
    """
    length = spec.history_length if length is None else length
    n_rows = len(histories)
    history_items = np.empty((n_rows, length), dtype=np.int64)
    buckets_BLG = np.empty((n_rows, length, len(spec.granularities)), dtype=np.int64)
    corrupt_B = np.empty(n_rows, dtype=np.bool_)
    # A few rows at a time: what is made on the way then stays in the processor's cache.
    step = max(1, _BLOCK_BEHAVIORS // max(1, length))
    for first in range(0, n_rows, step):
        block = slice(first, first + step)
        _encode_histories(
            histories[block],
            ranking_times_B[block],
            catalogue,
            spec,
            out=(history_items[block], buckets_BLG[block], corrupt_B[block]),
        )
    inputs = ModelInputs(
        history_items=history_items,
        history_buckets=buckets_BLG,
        candidate_items=catalogue.rows(candidates_BC),
    )
    return inputs, corrupt_B


def _encode_histories(
    histories: Sequence[bytes],
    ranking_times_B: NDArray[np.int64],
    catalogue: Catalogue,
    spec: FeatureSpec,
    *,
    out: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]],
) -> None:
    rows_BL, buckets_BLG, corrupt_B = out
    length = rows_BL.shape[1]
    records_BL = in_time_order(stack_records(histories, length))
    items_BL = np.ascontiguousarray(records_BL["item"])
    n_valid_B = np.array([len(raw) // RECORD_BYTES for raw in histories], dtype=np.int64)
    valid_BL = np.arange(length) >= length - n_valid_B[:, None]
    ((items_BL < MIN_ITEM) & valid_BL).any(axis=1, out=corrupt_B)
    rows_BL[:] = catalogue.rows(items_BL)
    buckets_BLG[:] = history_buckets(records_BL["time"], valid_BL, ranking_times_B, spec)
