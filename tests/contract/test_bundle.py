"""The bundle on disk: what is refused, and that the message names the file."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from contract import bundle
from contract.bundle import (
    Manifest,
    file_entry,
    read_catalogue,
    read_manifest,
    verify_files,
)
from contract.errors import BundleError
from contract.features import FeatureSpec


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A bundle whose graph is no graph: nothing here looks into it."""
    np.save(tmp_path / bundle.CATALOGUE, np.array([3, 5], dtype=np.int64))
    (tmp_path / bundle.MODEL).write_bytes(b"a graph")
    (tmp_path / bundle.GOLDEN).write_bytes(b"golden rows")
    manifest = Manifest(
        format_version=1,
        model_name="m",
        model_version="m-1",
        score_kind="probability",
        features=FeatureSpec(history_length=10),
        n_items=2,
        golden_tolerance=1e-3,
        metrics={"auc": 0.7},
        training_config={},
        data_fingerprint="f",
        produced_with={},
        files={name: file_entry(tmp_path / name) for name in bundle.REQUIRED_FILES},
    )
    (tmp_path / bundle.MANIFEST).write_text(manifest.model_dump_json())
    return tmp_path


def change(folder: Path, **changes: Any) -> None:
    path = folder / bundle.MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_whole_bundle_is_accepted(folder):
    manifest = read_manifest(folder)
    verify_files(folder, manifest)
    assert read_catalogue(folder, manifest).item_ids.tolist() == [3, 5]
    assert manifest.features.history_length == 10


def test_a_bundle_from_before_precisions_is_fp32(folder):
    path = folder / bundle.MANIFEST
    fields = json.loads(path.read_text())
    del fields["precision"], fields["auc_change"]
    path.write_text(json.dumps(fields))
    manifest = read_manifest(folder)
    assert (manifest.precision, manifest.auc_change) == ("fp32", None)


def test_one_from_before_calibrations_has_none(folder):
    path = folder / bundle.MANIFEST
    fields = json.loads(path.read_text())
    del fields["calibration"]
    path.write_text(json.dumps(fields))
    assert read_manifest(folder).calibration == "none"


def test_an_explain_graph_may_be_among_the_files_and_is_checked_as_they_are(folder):
    assert not read_manifest(folder).explains
    path = folder / bundle.EXPLAIN
    path.write_bytes(b"another graph")
    files = json.loads((folder / bundle.MANIFEST).read_text())["files"]
    change(folder, files={**files, bundle.EXPLAIN: file_entry(path).model_dump()})
    manifest = read_manifest(folder)
    assert manifest.explains
    verify_files(folder, manifest)
    path.write_bytes(b"a graph, altered")
    with pytest.raises(BundleError, match=r"explain\.onnx has 16 bytes"):
        verify_files(folder, manifest)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(BundleError, match="nowhere: no such folder"):
        read_manifest(tmp_path / "nowhere")


def test_a_missing_manifest_is_named(folder):
    (folder / bundle.MANIFEST).unlink()
    with pytest.raises(BundleError, match=r"manifest\.json is missing"):
        read_manifest(folder)


def test_a_half_written_manifest_is_refused(folder):
    path = folder / bundle.MANIFEST
    path.write_text(path.read_text()[:100])
    with pytest.raises(BundleError, match=r"manifest\.json is not readable"):
        read_manifest(folder)


@pytest.mark.parametrize("version", [0, 2, None, "1"])
def test_another_format_version_is_refused(folder, version):
    change(folder, format_version=version)
    with pytest.raises(BundleError, match=f"format version {version!r}, this program reads"):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"surprise": 1}, "surprise: Extra inputs", id="unknown key"),
        pytest.param({"score_kind": "rank"}, "score_kind: Input should be", id="unknown kind"),
        pytest.param({"n_items": -1}, "n_items: Input should be", id="negative count"),
        pytest.param({"precision": "fp8"}, "precision: Input should be", id="unknown precision"),
        pytest.param({"calibration": "beta"}, "calibration: Input", id="unknown calibration"),
        pytest.param({"files": {}}, "model.onnx, catalogue.npy, golden.npz must be", id="no files"),
    ],
)
def test_a_field_that_is_not_allowed_is_named(folder, changes, message):
    change(folder, **changes)
    with pytest.raises(BundleError, match=message):
        read_manifest(folder)


@pytest.mark.parametrize("name", ["../model.onnx", "/etc/passwd", "a/b", "..", "manifest.json"])
def test_files_outside_of_the_folder_cannot_be_listed(folder, name):
    files = json.loads((folder / bundle.MANIFEST).read_text())["files"]
    change(folder, files={**files, name: files[bundle.MODEL]})
    with pytest.raises(BundleError, match="is not a plain file name"):
        read_manifest(folder)


@pytest.mark.parametrize("name", bundle.REQUIRED_FILES)
def test_each_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(BundleError, match=f"{name} is missing"):
        verify_files(folder, read_manifest(folder))


@pytest.mark.parametrize("name", bundle.REQUIRED_FILES)
def test_one_flipped_byte_is_found(folder, name):
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(BundleError, match=f"{name} has sha256 .* was altered"):
        verify_files(folder, read_manifest(folder))


def test_a_truncated_file_is_found(folder):
    path = folder / bundle.MODEL
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleError, match=r"model\.onnx has 6 bytes, manifest\.json says 7"):
        verify_files(folder, read_manifest(folder))


def test_a_catalogue_of_another_size_is_refused(folder):
    change(folder, n_items=3)
    with pytest.raises(BundleError, match=r"catalogue\.npy holds 2 items, manifest\.json says 3"):
        read_catalogue(folder, read_manifest(folder))


def test_a_catalogue_that_is_no_array_is_refused(folder):
    (folder / bundle.CATALOGUE).write_bytes(b"nothing")
    with pytest.raises(BundleError, match=r"catalogue\.npy: "):
        read_catalogue(folder, read_manifest(folder))
