"""What a bundle must answer, computed without the service."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from contract.bundle import MODEL, OUTPUT_NAME, read_catalogue, read_manifest, verify_files
from contract.encoding import encode
from contract.golden import GoldenRows
from exporter.parity import open_session

_BATCH = 16


def score(bundle: Path, rows: GoldenRows) -> NDArray[np.float32]:
    """Return the scores float32 [N, C] of N requests; those that `rows` holds are not looked at.

    Raises BundleError or ExportError where the bundle cannot be read.
    """
    manifest = read_manifest(bundle)
    verify_files(bundle, manifest)
    catalogue = read_catalogue(bundle, manifest)
    session = open_session(bundle / MODEL)
    scores_NC = np.empty(rows.candidates.shape, dtype=np.float32)
    for first in range(0, len(rows.histories), _BATCH):
        block = slice(first, first + _BATCH)
        inputs, _ = encode(
            rows.histories[block],
            rows.candidates[block],
            rows.ranking_times[block],
            catalogue,
            manifest.features,
        )
        (scores_NC[block],) = session.run([OUTPUT_NAME], inputs.as_feed())
    return scores_NC
