"""Histories as bytes in Redis and as files of a prepared log, written by hand.

Nothing here calls the code under test: a wire format is proven by bytes made without it.
"""

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

DAY_S = 86_400
NOW = 1_700_000_000

Behaviors = Sequence[tuple[int, int]]


def records(*behaviors: tuple[int, int]) -> bytes:
    """Return (item, time)s as a history holds them."""
    return b"".join(struct.pack("<qI", item, time) for item, time in behaviors)


def steps(*items: int, start: int = NOW) -> list[tuple[int, int]]:
    """Return behaviors on the items, one a second."""
    return [(item, start + second) for second, item in enumerate(items)]


def write_log(folder: Path, histories: Mapping[str, Behaviors]) -> Path:
    """Write the files that contract/history_log.py describes."""
    folder.mkdir()
    raw = [records(*behaviors) for behaviors in histories.values()]
    ids = [user_id.encode() for user_id in histories]
    (folder / "behaviors.bin").write_bytes(b"".join(raw))
    (folder / "user_ids.bin").write_bytes(b"".join(ids))
    np.save(folder / "behavior_offsets.npy", _ends([len(one) // 12 for one in raw]))
    np.save(folder / "user_id_offsets.npy", _ends([len(one) for one in ids]))
    header = {
        "format_version": 1,
        "source": "by hand",
        "fingerprint": "f",
        "n_users": len(histories),
        "n_behaviors": sum(map(len, histories.values())),
        "n_impressions": 0,
        "n_items": 0,
        "has_labels": False,
        "has_probabilities": False,
        "has_categories": False,
    }
    (folder / "log.json").write_text(json.dumps(header))
    return folder


def _ends(lengths: list[int]) -> np.ndarray:
    return np.cumsum([0, *lengths], dtype=np.int64)
