"""A checkpoint becomes a bundle that is proven equal."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto

from contract.bundle import EXPLAIN, GOLDEN, MODEL, read_catalogue, read_manifest, verify_files
from contract.encoding import encode
from contract.golden import GoldenRows
from exporter.bundles import export, golden_rows
from exporter.errors import ExportError
from exporter.parity import VALUE_TOLERANCE, ParityRow, open_session
from service.model import OnnxModel
from tests.exporter.conftest import MODELS, features_of
from training.calibration import Calibration
from training.checkpoint import TrainedModel, load_model, save_model
from training.errors import CheckpointError
from training.models.imn import IterativeMemoryNetwork


@pytest.mark.parametrize("model", MODELS)
def test_every_model_is_exported_and_equal(exported, model):
    found = exported(model)
    verify_files(found.bundle, read_manifest(found.bundle))
    assert {row.n_candidates for row in found.table} == {1, 10, 500}
    assert {row.length for row in found.table} == {1, 7, 30}
    assert max(row.max_difference for row in found.table) <= VALUE_TOLERANCE
    assert found.manifest.score_kind == ("affinity" if model == "popularity" else "probability")


def test_the_manifest_says_where_the_model_comes_from(exported):
    manifest = read_manifest(exported().bundle)
    assert manifest.model_name == "tiny"
    assert manifest.model_version.startswith("tiny-")
    assert manifest.metrics == {"auc": 0.7}  # what is no number is left out
    assert manifest.training_config["model"]["name"] == "imn"
    assert manifest.data_fingerprint == "fingerprint"
    assert {"opset", "onnxruntime", "torch"} <= manifest.produced_with.keys()
    assert manifest.features.history_length == 30
    assert manifest.calibration == "none"


def test_features_of_items_are_constants_of_the_graph(exported):
    """A request sends ids only."""
    found = exported("imn with enhancement and features")
    graph = onnx.load(found.bundle / MODEL).graph
    constants = [onnx.numpy_helper.to_array(weight) for weight in graph.initializer]
    rows = torch.arange(load_model(found.checkpoint).catalogue.n_rows)
    for of_row in features_of(rows).values():
        assert any(np.array_equal(of_row, constant) for constant in constants)


@pytest.mark.parametrize("model", ["imn", "imn with enhancement and features"])
def test_golden_rows_are_what_the_graph_gives(exported, model):
    bundle = exported(model).bundle
    manifest = read_manifest(bundle)
    golden = GoldenRows.load(bundle / GOLDEN)
    lengths = [len(raw) // 12 for raw in golden.histories]
    assert 0 in lengths
    assert max(lengths) > 30
    inputs, corrupt = encode(
        golden.histories,
        golden.candidates,
        golden.ranking_times,
        read_catalogue(bundle, manifest),
        manifest.features,
    )
    assert not corrupt.any()
    assert (inputs.candidate_items == 1).any()  # unknown candidates are among them
    (scores,) = open_session(bundle / MODEL).run(None, inputs.as_feed())
    np.testing.assert_allclose(scores, golden.scores, atol=1e-6)
    assert len(np.unique(golden.scores)) > golden.scores.size / 2  # they tell models apart


def test_a_model_of_one_behavior_can_be_exported(checkpoint, tmp_path):
    """IMN, whose weights of behaviors have an axis of one too."""
    export(checkpoint(history_length=1), tmp_path / "bundle")
    verify_files(tmp_path / "bundle", read_manifest(tmp_path / "bundle"))


CALIBRATIONS = {
    "platt": Calibration("platt", slope=2.5, knots=[0.0], values=[-1.5]),
    # As many knots as there may be, steep and flat in turns, where an untrained model's logits are.
    "isotonic": Calibration(
        "isotonic",
        slope=0.7,
        knots=(0.011 * np.arange(-32, 32)).tolist(),
        values=(-2 + np.cumsum(np.tile([0.2, 1e-4], 32))).tolist(),
    ),
}


def calibrate(path: Path, calibration: Calibration) -> TrainedModel:
    """Put a calibration into a checkpoint of the fixture's, and return it without."""
    plain = load_model(path)
    trained = replace(plain, calibration=calibration)
    rows = torch.arange(trained.catalogue.n_rows)
    save_model(path, trained, item_counts=rows, features_of_row=None)
    return plain


@pytest.mark.parametrize("method", CALIBRATIONS)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_calibration_is_in_the_graph(checkpoint, tmp_path, method, precision):
    """Of which the service knows nothing: it scores the golden rows, which are the scorer's."""
    path = checkpoint("youtube_dnn")
    plain = calibrate(path, CALIBRATIONS[method])
    table: list[ParityRow] = []
    export(path, tmp_path / "bundle", precision=precision, report=table.extend)
    assert max(row.max_difference for row in table) <= VALUE_TOLERANCE
    model = OnnxModel(tmp_path / "bundle")
    assert model.manifest.calibration == method

    golden = GoldenRows.load(tmp_path / "bundle" / GOLDEN)
    before = golden_rows(plain.scorer(), plain.config.features, plain.catalogue)
    logits = torch.logit(torch.from_numpy(before.scores))
    expected = torch.sigmoid(CALIBRATIONS[method](logits)).numpy()
    np.testing.assert_allclose(golden.scores, expected, atol=1e-5)
    assert np.abs(golden.scores - before.scores).mean() > 0.01


@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16"])
@pytest.mark.parametrize(
    ("model", "n_passes"), [("imn", 2), ("imn with enhancement and features", 3)]
)
def test_imn_is_exported_with_a_graph_that_explains(exported, model, n_passes, precision):
    """The same scores, and the weights that the model tells; fp16 rounds both."""
    found = exported(model, precision)
    assert found.manifest.explains
    assert EXPLAIN in read_manifest(found.bundle).files
    trained = load_model(found.checkpoint)
    golden = GoldenRows.load(found.bundle / GOLDEN)
    inputs, _ = encode(
        golden.histories,
        golden.candidates,
        golden.ranking_times,
        trained.catalogue,
        found.manifest.features,
    )
    scores_BC, weights_BCPL = open_session(found.bundle / EXPLAIN).run(None, inputs.as_feed())
    (scored_BC,) = open_session(found.bundle / MODEL).run(None, inputs.as_feed())
    np.testing.assert_allclose(scores_BC, scored_BC, atol=1e-3 if precision == "fp16" else 1e-6)
    assert weights_BCPL.shape == (*scores_BC.shape, n_passes, 30)
    assert isinstance(trained.model, IterativeMemoryNetwork)
    with torch.no_grad():
        _, expected = trained.model.explain(*map(torch.from_numpy, inputs.as_feed().values()))
    np.testing.assert_allclose(
        weights_BCPL, expected.numpy(), atol=5e-3 if precision == "fp16" else 1e-6
    )
    is_padding_BL = inputs.history_items == 0
    assert (weights_BCPL.transpose(0, 3, 1, 2)[is_padding_BL] == 0).all()
    assert (weights_BCPL.transpose(0, 3, 1, 2)[~is_padding_BL] > 0).all()


@pytest.mark.parametrize("model", ["imn in segments", "youtube_dnn", "popularity"])
def test_what_has_no_weights_of_behaviors_is_exported_without(exported, model):
    found = exported(model)
    assert not found.manifest.explains
    assert not (found.bundle / EXPLAIN).exists()


def test_a_version_can_be_named(checkpoint, tmp_path):
    export(checkpoint("popularity"), tmp_path / "bundle", model_version="tuesday")
    assert read_manifest(tmp_path / "bundle").model_version == "tuesday"


def test_an_existing_bundle_is_not_touched(checkpoint, tmp_path):
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "in-use").touch()
    with pytest.raises(ExportError, match="bundle exists: name a new folder"):
        export(checkpoint(), tmp_path / "bundle")
    assert [path.name for path in (tmp_path / "bundle").iterdir()] == ["in-use"]


def test_a_broken_checkpoint_leaves_nothing_behind(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="not readable as a checkpoint"):
        export(tmp_path / "model.pt", tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_a_failed_proof_leaves_nothing_behind(checkpoint, tmp_path):
    path = checkpoint("popularity")

    def refuse(_table):
        raise ExportError("refused")

    with pytest.raises(ExportError, match="refused"):
        export(path, tmp_path / "bundle", report=refuse)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


@pytest.mark.parametrize("model", MODELS)
def test_a_float16_bundle_is_served(exported, model):
    manifest = OnnxModel(exported(model, "fp16").bundle).manifest  # scores the golden rows
    assert manifest.precision == "fp16"
    assert manifest.model_version.endswith("-fp16")
    assert manifest.auc_change is None
    assert 1e-3 <= manifest.golden_tolerance < 1e-2


def test_a_float16_bundle_has_half_the_size(checkpoint, tmp_path):
    path = checkpoint("youtube_dnn", n_items=50_000)
    graphs = {}
    for precision in ("fp32", "fp16"):
        export(path, tmp_path / precision, precision=precision)
        graphs[precision] = tmp_path / precision / MODEL
    weights = onnx.load(graphs["fp16"]).graph.initializer
    assert TensorProto.FLOAT16 in {weight.data_type for weight in weights}
    assert TensorProto.FLOAT not in {weight.data_type for weight in weights}
    assert 0.5 < graphs["fp16"].stat().st_size / graphs["fp32"].stat().st_size < 0.6


def test_a_tf32_bundle_differs_in_its_manifest_only(exported):
    fp32, tf32 = exported().manifest, exported(precision="tf32").manifest
    assert tf32.files == fp32.files  # size and hash of graph, catalogue and golden rows
    assert (fp32.precision, tf32.precision) == ("fp32", "tf32")
    assert tf32.model_version == f"{fp32.model_version}-tf32"
    OnnxModel(exported(precision="tf32").bundle)


@pytest.mark.parametrize("precision", ["tf32", "fp16"])
def test_the_change_in_auc_is_measured(trained_checkpoint, world_log, tmp_path, precision):
    reported: list[tuple[float, float]] = []
    manifest = export(
        trained_checkpoint,
        tmp_path / "bundle",
        precision=precision,
        log=world_log,
        report_aucs=lambda *aucs: reported.append(aucs),
    )
    [(fp32, variant)] = reported
    assert fp32 == pytest.approx(load_model(trained_checkpoint).metrics["auc"], abs=1e-9)
    assert manifest.auc_change == variant - fp32
    assert abs(variant - fp32) < 0.01
    assert read_manifest(tmp_path / "bundle").auc_change == manifest.auc_change


def test_another_log_than_the_run_s_is_refused(checkpoint, world_log, tmp_path):
    path = checkpoint()
    with pytest.raises(ExportError, match=r"log has fingerprint \w+, .*model\.pt was trained"):
        export(path, tmp_path / "bundle", precision="fp16", log=world_log)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_fp32_has_nothing_to_compare_with(checkpoint, world_log, tmp_path):
    with pytest.raises(ExportError, match="fp32 has nothing to compare with"):
        export(checkpoint(), tmp_path / "bundle", log=world_log)
