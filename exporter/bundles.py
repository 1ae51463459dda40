"""A trained model to a bundle: convert, prove, add golden rows, write whole or not at all."""

import hashlib
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import nn

from contract import bundle
from contract.bundle import Manifest, file_entry
from contract.catalogue import Catalogue
from contract.encoding import encode, stack_candidates
from contract.features import FeatureSpec
from contract.golden import GoldenRows
from contract.records import MAX_ITEM, encode_records
from exporter.convert import OPSET, convert
from exporter.errors import ExportError
from exporter.parity import ParityRow, open_session, prove_signature, prove_values
from training.checkpoint import TrainedModel, load_model
from training.folders import staged_folder
from training.models.build import Scorer

GOLDEN_TOLERANCE = 1e-3  # TF32 and reordered sums on a GPU stay well within it
_GOLDEN_TIME = 1_700_000_000
_GOLDEN_CANDIDATES = 10
_VERSION_DIGITS = 12


def export(
    checkpoint: Path,
    target: Path,
    *,
    model_version: str | None = None,
    report: Callable[[list[ParityRow]], None] = lambda _: None,
) -> Manifest:
    """Write the bundle of a trained model to the folder `target`, which must not exist.

    `model_version`: the run's name and the head of the checkpoint's hash unless said. `report`
    receives the parity table. Raises ExportError, or CheckpointError, and then writes nothing.
    """
    trained = load_model(checkpoint)
    spec = trained.config.features
    scorer = Scorer(trained.model, trained.score_kind).eval()
    try:
        with staged_folder(target) as staging:
            convert(scorer, spec, staging / bundle.MODEL)
            session = open_session(staging / bundle.MODEL)
            prove_signature(session, spec)
            report(prove_values(session, scorer, spec, trained.catalogue.n_rows))
            np.save(staging / bundle.CATALOGUE, trained.catalogue.item_ids)
            golden_rows(scorer, spec, trained.catalogue).save(staging / bundle.GOLDEN)
            manifest = Manifest(
                format_version=bundle.FORMAT_VERSION,
                model_name=trained.config.name,
                model_version=model_version or _version(trained, checkpoint),
                score_kind=trained.score_kind,
                features=spec,
                n_items=len(trained.catalogue),
                golden_tolerance=GOLDEN_TOLERANCE,
                metrics={k: v for k, v in trained.metrics.items() if np.isfinite(v)},
                training_config=trained.config.model_dump(mode="json"),
                data_fingerprint=trained.data_fingerprint,
                produced_with={
                    "opset": str(OPSET),
                    "torch": torch.__version__,
                    "onnx": version("onnx"),
                    "onnxruntime": version("onnxruntime"),
                    "mneme": version("mneme"),
                },
                files={path.name: file_entry(path) for path in sorted(staging.iterdir())},
            )
            text = json.dumps(manifest.model_dump(mode="json"), indent=2)
            (staging / bundle.MANIFEST).write_text(text + "\n")
    except FileExistsError as error:
        raise ExportError(str(error)) from error
    return manifest


def golden_rows(scorer: nn.Module, spec: FeatureSpec, catalogue: Catalogue) -> GoldenRows:
    """Return requests of every kind that a service meets, scored by the model itself.

    Histories: empty, one behavior, half full, full, longer than the model reads, unknown items
    only, and behaviors in the future (clock skew).
    """
    rng = np.random.default_rng(0)
    known = catalogue.item_ids if len(catalogue) else np.array([1], dtype=np.int64)
    length = spec.history_length
    ages_s = rng.integers(0, 400 * 86_400, size=length + 3)

    def history(n: int, ages_s: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> bytes:
        return encode_records(rng.choice(known, n), np.sort(_GOLDEN_TIME - ages_s[:n]))

    histories = [
        b"",
        history(1, ages_s),
        history(max(1, length // 2), ages_s),
        history(length, ages_s),
        history(length + 3, ages_s),
        encode_records([MAX_ITEM, MAX_ITEM - 1], [_GOLDEN_TIME - 5, _GOLDEN_TIME]),
        history(2, np.array([-100, -1])),
    ]
    candidates = stack_candidates(
        [np.append(rng.choice(known, _GOLDEN_CANDIDATES - 1), MAX_ITEM - 2) for _ in histories]
    )
    times = np.full(len(histories), _GOLDEN_TIME, dtype=np.int64)
    inputs, _ = encode(histories, candidates, times, catalogue, spec)
    with torch.inference_mode():
        scores = scorer(*(torch.from_numpy(array) for array in inputs.as_feed().values()))
    return GoldenRows(
        histories=histories, ranking_times=times, candidates=candidates, scores=scores.numpy()
    )


def _version(trained: TrainedModel, checkpoint: Path) -> str:
    digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    return f"{trained.config.name}-{digest[:_VERSION_DIGITS]}"
