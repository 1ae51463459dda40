"""A trained model to a bundle: convert, prove, add golden rows, write whole or not at all."""

import hashlib
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from torch import nn

from contract import bundle
from contract.bundle import Manifest, Precision, file_entry
from contract.catalogue import Catalogue
from contract.encoding import encode, stack_candidates
from contract.features import FeatureSpec
from contract.golden import GoldenRows
from contract.records import MAX_ITEM, encode_records
from exporter.convert import OPSET, convert
from exporter.errors import ExportError
from exporter.parity import (
    VALUE_TOLERANCE,
    ParityRow,
    open_session,
    prove_explanations,
    prove_signature,
    prove_values,
)
from exporter.precision import (
    MIN_TOLERANCE,
    aucs_on_test_part,
    emulate,
    halve,
    measured_tolerance,
)
from training.checkpoint import TrainedModel, load_model
from training.config import NextItemModelConfig
from training.data.log import PreparedLog
from training.folders import staged_folder
from training.models.build import Explainer, Scorer, explains

_GOLDEN_TIME = 1_700_000_000
_GOLDEN_CANDIDATES = 10
_VERSION_DIGITS = 12


def export(
    checkpoint: Path,
    target: Path,
    *,
    model_version: str | None = None,
    precision: Precision = "fp32",
    log: Path | None = None,
    report: Callable[[list[ParityRow]], None] = lambda _: None,
    report_aucs: Callable[[float, float], None] = lambda _fp32, _variant: None,
) -> Manifest:
    """Write the bundle of a trained model to the folder `target`, which must not exist.

    `model_version`: the run's name, the head of the checkpoint's hash and a precision other than
    fp32, unless said. `log`: the prepared log of the run; on its test part the AUC of a variant is
    compared with that of the fp32 model, and `report_aucs` receives both. `report` receives the
    parity table of the fp32 graph. Golden scores are those of the fp32 model, whatever the
    precision. Raises ExportError, CheckpointError or HistoryLogError, and then writes nothing.
    """
    trained = load_model(checkpoint)
    prepared = None if log is None else _open_log(log, precision, trained, checkpoint)
    spec, n_rows = trained.config.features, trained.catalogue.n_rows
    scorer = trained.scorer()
    tolerance, auc_change = MIN_TOLERANCE, None
    try:
        with staged_folder(target) as staging:
            convert(scorer, spec, staging / bundle.MODEL)
            session = open_session(staging / bundle.MODEL)
            prove_signature(session, spec)
            report(prove_values(session, scorer, spec, n_rows))
            if precision == "fp16":
                halve(staging / bundle.MODEL)
                session = open_session(staging / bundle.MODEL)
                prove_signature(session, spec)
            if precision != "fp32":
                variant = emulate(scorer, precision)
                tolerance = measured_tolerance(precision, [session, variant], scorer, spec, n_rows)
                if prepared is not None:
                    aucs = aucs_on_test_part(trained, prepared, [scorer, variant])
                    report_aucs(*aucs)
                    auc_change = aucs[1] - aucs[0]
            if explains(trained.model):
                _explain_graph(scorer, session, spec, n_rows, staging, precision, tolerance)
            np.save(staging / bundle.CATALOGUE, trained.catalogue.item_ids)
            golden_rows(scorer, spec, trained.catalogue).save(staging / bundle.GOLDEN)
            manifest = Manifest(
                format_version=bundle.FORMAT_VERSION,
                model_name=trained.config.name,
                model_version=model_version or _version(trained, checkpoint, precision),
                score_kind=trained.score_kind,
                features=spec,
                n_items=len(trained.catalogue),
                golden_tolerance=tolerance,
                precision=precision,
                auc_change=auc_change,
                calibration="none" if trained.calibration is None else trained.calibration.method,
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


def _explain_graph(
    scorer: Scorer,
    scoring_graph: ort.InferenceSession,
    spec: FeatureSpec,
    n_rows: int,
    folder: Path,
    precision: Precision,
    golden_tolerance: float,
) -> None:
    """Write the explain graph of a model, in the precision of the scoring graph, and prove it."""
    path, explainer = folder / bundle.EXPLAIN, Explainer(scorer).eval()
    convert(explainer, spec, path, (bundle.OUTPUT_NAME, bundle.WEIGHTS_NAME))
    if precision == "fp16":
        halve(path)
    graph = open_session(path)
    prove_signature(graph, spec, n_passes=explainer.n_passes)
    tolerance = golden_tolerance if precision == "fp16" else VALUE_TOLERANCE
    prove_explanations(graph, scoring_graph, explainer, spec, n_rows, tolerance=tolerance)


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


def _open_log(
    log: Path, precision: Precision, trained: TrainedModel, checkpoint: Path
) -> PreparedLog:
    if precision == "fp32":
        raise ExportError("a log is for measuring tf32 or fp16: fp32 has nothing to compare with")
    if isinstance(trained.config.model, NextItemModelConfig):
        raise ExportError(
            f"a log is for measuring the AUC of click models: {trained.config.model.name} is a "
            "next-item model"
        )
    prepared = PreparedLog(log)
    if (found := prepared.header.fingerprint) != trained.data_fingerprint:
        raise ExportError(
            f"{log} has fingerprint {found}, {checkpoint} was trained on {trained.data_fingerprint}"
        )
    return prepared


def _version(trained: TrainedModel, checkpoint: Path, precision: Precision) -> str:
    digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    suffix = "" if precision == "fp32" else f"-{precision}"
    return f"{trained.config.name}-{digest[:_VERSION_DIGITS]}{suffix}"
