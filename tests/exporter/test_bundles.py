"""A checkpoint becomes a bundle that is proven equal."""

import numpy as np
import pytest

from contract.bundle import GOLDEN, MODEL, read_catalogue, read_manifest, verify_files
from contract.encoding import encode
from contract.golden import GoldenRows
from exporter.bundles import export
from exporter.errors import ExportError
from exporter.parity import VALUE_TOLERANCE, ParityRow, open_session
from tests.exporter.conftest import MODELS
from training.errors import CheckpointError


@pytest.mark.parametrize("model", MODELS)
def test_every_model_is_exported_and_equal(checkpoint, tmp_path, model):
    table: list[ParityRow] = []
    manifest = export(checkpoint(model), tmp_path / "bundle", report=table.extend)
    verify_files(tmp_path / "bundle", read_manifest(tmp_path / "bundle"))
    assert {row.n_candidates for row in table} == {1, 10, 500}
    assert {row.length for row in table} == {1, 7, 30}
    assert max(row.max_difference for row in table) <= VALUE_TOLERANCE
    assert manifest.score_kind == ("affinity" if model == "popularity" else "probability")


def test_the_manifest_says_where_the_model_comes_from(checkpoint, tmp_path):
    export(checkpoint(), tmp_path / "bundle")
    manifest = read_manifest(tmp_path / "bundle")
    assert manifest.model_name == "tiny"
    assert manifest.model_version.startswith("tiny-")
    assert manifest.metrics == {"auc": 0.7}  # what is no number is left out
    assert manifest.training_config["model"]["name"] == "imn"
    assert manifest.data_fingerprint == "fingerprint"
    assert {"opset", "onnxruntime", "torch"} <= manifest.produced_with.keys()
    assert manifest.features.history_length == 30


def test_golden_rows_are_what_the_graph_gives(checkpoint, tmp_path):
    export(checkpoint(), tmp_path / "bundle")
    manifest = read_manifest(tmp_path / "bundle")
    golden = GoldenRows.load(tmp_path / "bundle" / GOLDEN)
    lengths = [len(raw) // 12 for raw in golden.histories]
    assert 0 in lengths
    assert max(lengths) > 30
    inputs, corrupt = encode(
        golden.histories,
        golden.candidates,
        golden.ranking_times,
        read_catalogue(tmp_path / "bundle", manifest),
        manifest.features,
    )
    assert not corrupt.any()
    assert (inputs.candidate_items == 1).any()  # unknown candidates are among them
    (scores,) = open_session(tmp_path / "bundle" / MODEL).run(None, inputs.as_feed())
    np.testing.assert_allclose(scores, golden.scores, atol=1e-6)
    assert len(np.unique(golden.scores)) > golden.scores.size / 2  # they tell models apart


def test_a_model_of_one_behavior_can_be_exported(checkpoint, tmp_path):
    export(checkpoint(history_length=1), tmp_path / "bundle")
    verify_files(tmp_path / "bundle", read_manifest(tmp_path / "bundle"))


def test_a_version_can_be_named(checkpoint, tmp_path):
    export(checkpoint(), tmp_path / "bundle", model_version="tuesday")
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
    path = checkpoint()

    def refuse(_table):
        raise ExportError("refused")

    with pytest.raises(ExportError, match="refused"):
        export(path, tmp_path / "bundle", report=refuse)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]
