"""Bundles that are made to do harm: all of them are refused, by a reason, without harm.

Their hashes are right: whoever makes a bundle makes its manifest, too.
"""

import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from contract.bundle import CATALOGUE, GOLDEN, MANIFEST, MODEL
from contract.errors import BundleError
from service.model import OnnxModel
from tests.contract.test_files import Creates, npy_of
from tests.service.tiny_bundle import change_manifest, list_file

FILES = [MODEL, CATALOGUE, GOLDEN]


def refuse(bundle: Path, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        OnnxModel(bundle)


class TestManifest:
    @pytest.mark.parametrize(
        "name",
        [
            "",
            ".",
            "..",
            "/etc/passwd",
            "../x",
            "a/b",
            "a\\b",
            "C:x",
            "a\0b",
            "a\nb",
            "é",
            ".x",
            "x" * 200,
        ],
        ids=repr,
    )
    def test_only_plain_names_are_read(self, bundle, name):
        list_file(bundle, name, like=MODEL)
        refuse(bundle, r"manifest\.json: .*is not a plain file name")

    @pytest.mark.parametrize(
        "content",
        [
            pytest.param(b"[" * 100_000, id="deep"),
            pytest.param(b'{"format_version":1,"a":' + b"[" * 150 + b"]" * 150 + b"}", id="nested"),
            pytest.param(b'{"format_version":' + b"1" * 5000 + b"}", id="huge number"),
            pytest.param(b" " * (2 << 20), id="huge"),
            pytest.param(b'{"format_version": 1}\0', id="NUL"),
            pytest.param('{"format_version": 1}'.encode("utf-16"), id="UTF-16"),
            pytest.param(b'{"format_version": 1, "\\ud800": 1}', id="half a character"),
            pytest.param(b"\xff\xfe\xfd", id="noise"),
        ],
    )
    def test_what_is_no_manifest_is_refused(self, bundle, content):
        (bundle / MANIFEST).write_bytes(content)
        refuse(bundle, r"manifest\.json")

    @pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
    @pytest.mark.parametrize("field", ["golden_tolerance", "auc_change", "metrics"])
    def test_numbers_are_finite(self, bundle, field, number):
        """A tolerance without end would accept any graph."""
        value = '{"auc": N}' if field == "metrics" else "N"
        text = json.dumps({**json.loads((bundle / MANIFEST).read_text()), field: "@"})
        (bundle / MANIFEST).write_text(text.replace('"@"', value.replace("N", number)))
        refuse(bundle, rf"manifest\.json: {field}.*finite")

    def test_a_thousand_errors_are_told_in_ten(self, bundle):
        change_manifest(bundle, **{f"field-{n:04d}": n for n in range(1000)})
        with pytest.raises(BundleError) as refused:
            OnnxModel(bundle)
        assert str(refused.value).count("field-") == 10


class TestFiles:
    @pytest.mark.parametrize("name", [MANIFEST, *FILES])
    def test_links_are_not_followed(self, bundle, tmp_path, name):
        outside = tmp_path / "outside"
        (bundle / name).rename(outside)
        (bundle / name).symlink_to(outside)
        refuse(bundle, rf"{name}.*a symbolic link, expected the file itself")

    @pytest.mark.parametrize("name", [MANIFEST, *FILES])
    def test_pipes_are_not_waited_for(self, bundle, name):
        (bundle / name).unlink()
        os.mkfifo(bundle / name)
        refuse(bundle, rf"{name}.*not a plain file")

    @pytest.mark.parametrize("name", [MANIFEST, *FILES])
    def test_folders_are_no_files(self, bundle, name):
        (bundle / name).unlink()
        (bundle / name).mkdir()
        refuse(bundle, rf"{name}.*not a plain file")

    def test_a_folder_that_is_a_link_is_a_bundle(self, bundle, tmp_path):
        """That is how a deployment names the one in force."""
        (tmp_path / "current").symlink_to(bundle)
        OnnxModel(tmp_path / "current")


class TestPickles:
    def test_a_catalogue_that_is_one_is_refused_and_not_run(self, bundle, tmp_path):
        np.save(bundle / CATALOGUE, np.array([Creates(tmp_path / "made")]), allow_pickle=True)
        list_file(bundle, CATALOGUE)
        refuse(bundle, r"catalogue\.npy: Object arrays cannot be loaded")
        assert not (tmp_path / "made").exists()

    @pytest.mark.parametrize("name", ["records", "scores", "another"])
    def test_golden_rows_that_are_some_are_refused_and_not_run(self, bundle, tmp_path, name):
        with np.load(bundle / GOLDEN) as arrays:
            members = {**arrays, name: np.array([Creates(tmp_path / "made")])}
        if name == "another":
            del members["scores"]
        np.savez(bundle / GOLDEN, **members)
        list_file(bundle, GOLDEN)
        refuse(bundle, r"golden\.npz: not readable as golden rows")
        assert not (tmp_path / "made").exists()

    def test_a_pickle_in_place_of_the_archive_is_refused_and_not_run(self, bundle, tmp_path):
        np.array([Creates(tmp_path / "made")]).dump(bundle / GOLDEN)
        list_file(bundle, GOLDEN)
        refuse(bundle, r"golden\.npz: not readable as golden rows")
        assert not (tmp_path / "made").exists()


class TestSizes:
    def test_a_catalogue_that_declares_2_to_the_60_rows(self, bundle):
        (bundle / CATALOGUE).write_bytes(npy_of(f"({2**60},)"))
        list_file(bundle, CATALOGUE)
        refuse(bundle, r"catalogue\.npy: .*too big")

    def test_golden_rows_that_declare_them(self, bundle):
        with zipfile.ZipFile(bundle / GOLDEN, "w") as archive:
            archive.writestr("records.npy", npy_of(f"({2**60},)", "'|u1'"))
        list_file(bundle, GOLDEN)
        refuse(bundle, r"golden\.npz: not readable as golden rows: .*(too big|Unable to allocate)")

    def test_golden_rows_that_unpack_to_a_gigabyte(self, bundle):
        """A megabyte of them on disk."""
        with zipfile.ZipFile(bundle / GOLDEN, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in ("records", "lengths_bytes", "ranking_times", "candidates"):
                with archive.open(f"{name}.npy", "w") as member:
                    for _ in range(16):
                        member.write(bytes(1 << 20))
            archive.writestr("scores.npy", bytes(1 << 20))
        list_file(bundle, GOLDEN)
        refuse(bundle, r"golden\.npz: .*bytes, expected at most 67,108,864")

    def test_lengths_whose_sum_wraps_around(self, bundle):
        with np.load(bundle / GOLDEN) as arrays:
            members = {**arrays, "lengths_bytes": np.array([2**62] * 4 + [len(arrays["records"])])}
        np.savez(bundle / GOLDEN, **members)
        list_file(bundle, GOLDEN)
        refuse(bundle, r"golden\.npz: .*do not add up")

    @pytest.mark.parametrize(
        ("name", "array"),
        [
            ("scores", np.array([["a"]])),
            ("scores", np.array([[1.0]])),
            ("ranking_times", np.array([1.5])),
            ("candidates", np.array([1])),
            ("lengths_bytes", np.array([12.0])),
            ("records", np.zeros(1, dtype=[("a", "<i8")])),
        ],
        ids=["text", "another float", "times in fractions", "one axis", "lengths", "records"],
    )
    def test_golden_rows_of_other_types(self, bundle, name, array):
        with np.load(bundle / GOLDEN) as arrays:
            members = {**arrays, name: array}
        np.savez(bundle / GOLDEN, **members)
        list_file(bundle, GOLDEN)
        refuse(bundle, rf"golden\.npz: not readable as golden rows: {name} are .*, expected ")

    @pytest.mark.parametrize("score", [np.inf, -np.inf, np.nan])
    def test_golden_scores_that_are_not_finite(self, bundle, score):
        """Any score lies within a relative tolerance of infinity."""
        with np.load(bundle / GOLDEN) as arrays:
            members = {**arrays, "scores": np.full_like(arrays["scores"], score)}
        np.savez(bundle / GOLDEN, **members)
        list_file(bundle, GOLDEN)
        refuse(bundle, r"golden\.npz: a score is not finite")


@pytest.fixture
def external(bundle) -> Path:
    """A bundle whose graph keeps one of its tables in a file of its own, as large ones do."""
    graph = onnx.load(bundle / MODEL)
    onnx.save_model(
        graph,
        bundle / MODEL,
        save_as_external_data=True,
        location="model.onnx.data",
        size_threshold=200,
    )
    list_file(bundle, MODEL)
    list_file(bundle, "model.onnx.data")
    return Path(bundle)


def point_to(bundle: Path, location: str) -> None:
    """Let every table of the graph lie at `location`."""
    graph = onnx.load(bundle / MODEL, load_external_data=False)
    for tensor in graph.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    (bundle / MODEL).write_bytes(graph.SerializeToString())
    list_file(bundle, MODEL)


class TestGraphs:
    def test_tables_may_lie_beside_the_graph(self, external):
        OnnxModel(external)

    @pytest.mark.parametrize("by", ["..", "an absolute path", "a link", "a link to a folder"])
    def test_tables_outside_of_the_folder_are_not_opened(self, external, tmp_path, by):
        """onnxruntime refuses them itself, since which version is not said: the oldest that
        pyproject.toml allows does.
        """
        outside = tmp_path / "outside"
        outside.mkdir()
        shutil.copy(external / "model.onnx.data", outside / "data")
        (external / "file-link").symlink_to(outside / "data")
        (external / "folder-link").symlink_to(outside)
        locations = {
            "..": "../outside/data",
            "an absolute path": str(outside / "data"),
            "a link": "file-link",
            "a link to a folder": "folder-link/data",
        }
        point_to(external, locations[by])
        refuse(external, r"model\.onnx cannot be loaded .*(escapes model dir|Absolute path not)")

    def test_a_pipe_in_place_of_a_table_is_not_waited_for(self, external):
        os.mkfifo(external / "pipe")
        point_to(external, "pipe")
        refuse(external, r"model\.onnx cannot be loaded")

    def test_a_device_in_place_of_a_table_is_not_read(self, external):
        point_to(external, "/dev/zero")
        refuse(external, r"model\.onnx cannot be loaded .*Absolute path not allowed")

    def test_a_table_that_is_shorter_than_the_graph_says(self, external):
        (external / "model.onnx.data").write_bytes(b"short")
        list_file(external, "model.onnx.data")
        refuse(external, r"model\.onnx cannot be loaded")

    def test_operators_of_others_are_not_known(self, bundle):
        graph = onnx.load(bundle / MODEL)
        graph.graph.node[0].domain = "com.example"
        graph.opset_import.append(helper.make_opsetid("com.example", 1))
        (bundle / MODEL).write_bytes(graph.SerializeToString())
        list_file(bundle, MODEL)
        refuse(bundle, r"model\.onnx cannot be loaded .*com\.example:.* is not a registered")

    def test_a_table_that_declares_2_to_the_60_rows(self, bundle):
        graph = onnx.load(bundle / MODEL)
        graph.graph.initializer[0].dims[:] = [2**60]
        (bundle / MODEL).write_bytes(graph.SerializeToString())
        list_file(bundle, MODEL)
        refuse(bundle, r"model\.onnx cannot be loaded")
