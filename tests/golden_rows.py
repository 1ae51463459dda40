"""Reads tests/golden/encoding.json, the rows that bind training and serving together."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from contract.catalogue import Catalogue
from contract.features import FeatureSpec

_FILE = Path(__file__).parent / "golden" / "encoding.json"


@dataclass(frozen=True, kw_only=True)
class GoldenRow:
    """One raw request and what it must become."""

    name: str
    history: bytes
    candidates: NDArray[np.int64]
    history_items: list[int]
    history_buckets: list[list[int]]
    candidate_items: list[int]
    serving_only: bool


def _read() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(_FILE.read_text())
    return content


RANKING_TIME: int = _read()["ranking_time"]
SPEC = FeatureSpec.model_validate_json(json.dumps(_read()["features"]))
CATALOGUE = Catalogue(np.array(_read()["item_ids"], dtype=np.int64))
ROWS = [
    GoldenRow(
        name=row["name"],
        history=bytes.fromhex(row["history"]),
        candidates=np.array(row["candidates"], dtype=np.int64),
        history_items=row["history_items"],
        history_buckets=row["history_buckets"],
        candidate_items=row["candidate_items"],
        serving_only=row.get("serving_only", False),
    )
    for row in _read()["rows"]
]
