"""A real bundle in onnxruntime: what is accepted, and what is refused with the file's name."""

import json
import logging
import re
import shutil
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from contract.bundle import CATALOGUE, EXPLAIN, GOLDEN, MANIFEST, MODEL
from contract.catalogue import FIRST_ROW
from contract.encoding import encode
from contract.errors import BundleError
from contract.golden import GoldenRows
from service.model import OnnxModel
from service.shapes import Shape, shape_grid
from tests.service.dummy_model import OUT_OF_MEMORY
from tests.service.logged import Logged
from tests.service.tiny_bundle import (
    HISTORY_LENGTH,
    ITEM_IDS,
    change_manifest,
    flip_a_byte,
    list_file,
)


def golden_with(bundle, **changes):
    """Replace arrays of golden.npz, and let the manifest list the new file."""
    with np.load(bundle / GOLDEN) as arrays:
        changed: dict[str, Any] = {**arrays, **changes}
    np.savez_compressed(bundle / GOLDEN, **changed)
    list_file(bundle, GOLDEN)


def golden_scores(bundle) -> np.ndarray:
    scores: np.ndarray = GoldenRows.load(bundle / GOLDEN).scores
    return scores


class TestGoodBundle:
    def test_it_is_loaded_with_what_its_manifest_says(self, good_bundle):
        model = OnnxModel(good_bundle)
        assert model.manifest.model_name == "tiny"
        assert model.manifest.model_version == "tiny-1"
        assert model.manifest.score_kind == "probability"
        assert model.manifest.features.history_length == HISTORY_LENGTH
        assert model.catalogue.item_ids.tolist() == ITEM_IDS.tolist()

    @pytest.mark.parametrize("threads", [1, 2])
    def test_it_scores_its_golden_rows(self, good_bundle, threads):
        model = OnnxModel(good_bundle, threads=threads)
        golden = GoldenRows.load(good_bundle / GOLDEN)
        inputs, _ = encode(
            golden.histories,
            golden.candidates,
            golden.ranking_times,
            model.catalogue,
            model.manifest.features,
        )
        scores = model.run(inputs)
        assert scores.dtype == np.float32
        assert scores.shape == golden.candidates.shape
        np.testing.assert_allclose(scores, golden.scores, atol=1e-6)

    @pytest.mark.parametrize("shape", [(1, 1, 1), (3, 2, 5), (2, HISTORY_LENGTH, 40)])
    def test_it_scores_batches_of_any_shape(self, good_bundle, shape):
        """B requests, L behaviors, C candidates: all three are free."""
        n_requests, length, n_candidates = shape
        model = OnnxModel(good_bundle)
        inputs, _ = encode(
            [b""] * n_requests,
            np.full((n_requests, n_candidates), ITEM_IDS[0]),
            np.zeros(n_requests, dtype=np.int64),
            model.catalogue,
            model.manifest.features,
            length=length,
        )
        assert model.run(inputs).shape == (n_requests, n_candidates)

    @pytest.mark.parametrize("shape", [Shape(1, 1, 1), Shape(4, 100, HISTORY_LENGTH)])
    def test_it_runs_the_arrays_that_it_gave(self, good_bundle, shape):
        model = OnnxModel(good_bundle)
        inputs = model.inputs(shape)
        empty = model.run(inputs)
        assert empty.shape == (shape.batch, shape.candidates)
        inputs.candidate_items[:] = FIRST_ROW
        assert not np.array_equal(model.run(inputs), empty)

    def test_its_batches_are_padded_to_the_grid_of_its_device(self, good_bundle):
        model = OnnxModel(good_bundle)
        assert model.shapes.lengths == shape_grid("cpu", HISTORY_LENGTH).lengths
        assert model.shapes.round_up(7, 7, HISTORY_LENGTH) == Shape(8, 8, HISTORY_LENGTH)

    @pytest.mark.parametrize("max_work", [1, 10**9], ids=["small batches only", "all"])
    def test_a_warm_up_measures_batches_of_several_sizes(self, good_bundle, max_work):
        """Fewer than two sizes would not tell the fixed cost from the cost of work."""
        measured = OnnxModel(good_bundle).warm_up(max_work)
        works = {work for work, _ in measured}
        assert {1, 100 * HISTORY_LENGTH} <= works
        assert (4 * 100 * HISTORY_LENGTH in works) == (max_work > 1)
        assert all(seconds > 0 for _, seconds in measured)

    def test_a_difference_within_the_tolerance_is_accepted(self, bundle):
        """Another device sums in another order."""
        golden_with(bundle, scores=golden_scores(bundle) + np.float32(0.5e-3))
        OnnxModel(bundle)


class TestRefused:
    def refuse(self, bundle, message, **options):
        with pytest.raises(BundleError, match=message):
            OnnxModel(bundle, **options)

    def test_a_missing_folder(self, tmp_path):
        self.refuse(tmp_path / "nowhere", "nowhere: no such folder")

    def test_a_file_in_place_of_the_folder(self, tmp_path):
        (tmp_path / "bundle").write_bytes(b"")
        self.refuse(tmp_path / "bundle", "bundle: no such folder")

    def test_a_missing_manifest(self, bundle):
        (bundle / MANIFEST).unlink()
        self.refuse(bundle, r"manifest\.json is missing")

    @pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
    def test_a_half_written_manifest(self, bundle, share):
        text = (bundle / MANIFEST).read_bytes()
        (bundle / MANIFEST).write_bytes(text[: int(share * len(text))])
        self.refuse(bundle, r"manifest\.json is not readable")

    @pytest.mark.parametrize("version", [0, 2, "1", None])
    def test_an_unknown_format_version(self, bundle, version):
        change_manifest(bundle, format_version=version)
        self.refuse(
            bundle,
            rf"manifest\.json has format version {version!r}, this program reads version 1",
        )

    def test_a_field_that_this_program_does_not_know(self, bundle):
        change_manifest(bundle, quantised=True)
        self.refuse(bundle, r"manifest\.json: quantised: Extra inputs are not permitted")

    @pytest.mark.parametrize("name", ["../model.onnx", "/etc/passwd", "a/b", ".."])
    def test_a_manifest_that_lists_files_elsewhere(self, bundle, name):
        list_file(bundle, name, like=MODEL)
        self.refuse(
            bundle, rf"manifest\.json: .*files: '{re.escape(name)}' is not a plain file name"
        )

    @pytest.mark.parametrize("name", [MODEL, CATALOGUE, GOLDEN])
    def test_a_missing_file(self, bundle, name):
        (bundle / name).unlink()
        self.refuse(bundle, f"{name} is missing")

    @pytest.mark.parametrize("name", [MODEL, CATALOGUE, GOLDEN])
    def test_one_flipped_byte(self, bundle, name):
        flip_a_byte(bundle / name)
        self.refuse(bundle, rf"{name} has sha256 .*, manifest\.json says .* was altered")

    @pytest.mark.parametrize("name", [MODEL, CATALOGUE, GOLDEN])
    def test_a_truncated_file(self, bundle, name):
        content = (bundle / name).read_bytes()
        (bundle / name).write_bytes(content[:-1])
        self.refuse(
            bundle,
            f"{name} has {len(content) - 1} bytes, manifest.json says {len(content)}",
        )

    def test_a_catalogue_of_another_size(self, bundle):
        np.save(bundle / CATALOGUE, ITEM_IDS[:-1])
        list_file(bundle, CATALOGUE)
        self.refuse(bundle, r"catalogue\.npy holds 49 items, manifest\.json says 50")

    @pytest.mark.parametrize(
        ("ids", "reason"),
        [
            pytest.param(ITEM_IDS[::-1], "once, in ascending order", id="descending"),
            pytest.param(ITEM_IDS.astype(np.float64), "vector of int64, got float64", id="floats"),
            pytest.param(ITEM_IDS - 10, "item id 0, expected at least 1", id="from 0"),
        ],
    )
    def test_a_catalogue_that_is_none(self, bundle, ids, reason):
        np.save(bundle / CATALOGUE, ids)
        list_file(bundle, CATALOGUE)
        self.refuse(bundle, rf"catalogue\.npy: .*{reason}")

    @pytest.mark.parametrize("name", [MODEL, CATALOGUE, GOLDEN])
    def test_garbage_that_the_manifest_lists_correctly(self, bundle, name):
        (bundle / name).write_bytes(b"garbage")
        list_file(bundle, name)
        self.refuse(bundle, name)

    def test_a_graph_for_other_features(self, bundle):
        features = json.loads((bundle / MANIFEST).read_text())["features"]
        change_manifest(
            bundle, features={**features, "granularities": features["granularities"][:1]}
        )
        self.refuse(bundle, r"model\.onnx has \(name, type, axes, granularities\) .*, expected")


class TestRefusedByItsGoldenRows:
    """All hashes are right: only scoring the rows on this very device finds these."""

    def refuse(self, bundle, message):
        with pytest.raises(BundleError, match=message):
            OnnxModel(bundle)

    def test_one_score_that_is_off(self, bundle):
        scores = golden_scores(bundle)
        scores[3, 4] += 2e-3
        golden_with(bundle, scores=scores)
        self.refuse(bundle, r"model\.onnx differs from golden\.npz by up to .*, allowed are 1e-03")

    def test_the_difference_is_told(self, bundle):
        golden_with(bundle, scores=golden_scores(bundle) + np.float32(0.25))
        self.refuse(bundle, r"by up to 2\.50e-01, allowed are 1e-03")

    def test_a_catalogue_of_other_items(self, bundle):
        """As many, so that every embedding would belong to a wrong item."""
        np.save(bundle / CATALOGUE, ITEM_IDS + 1)
        list_file(bundle, CATALOGUE)
        self.refuse(bundle, r"model\.onnx differs from golden\.npz")

    def test_time_buckets_of_another_unit(self, bundle):
        features = json.loads((bundle / MANIFEST).read_text())["features"]
        features["granularities"][0]["unit_s"] = 60
        change_manifest(bundle, features=features)
        self.refuse(bundle, r"model\.onnx (differs from|cannot score) golden\.npz")

    def test_rows_that_do_not_fit_together(self, bundle):
        golden_with(bundle, scores=golden_scores(bundle)[:, :-1])
        self.refuse(bundle, r"golden\.npz: candidates \(7, 10\) and scores \(7, 9\) must be")


@pytest.mark.skipif(
    "CUDAExecutionProvider" in ort.get_available_providers(), reason="this machine has CUDA"
)
def test_a_gpu_is_never_replaced_by_the_cpu_silently(good_bundle):
    """And the operator hears what is missing, not what onnxruntime thinks of its nodes."""
    with pytest.raises(BundleError, match="CUDAExecutionProvider"):
        OnnxModel(good_bundle, provider="cuda")


class TestWarmUp:
    """On a device with little memory: so many pairs of candidate and behavior."""

    @pytest.fixture
    def model(self, good_bundle, monkeypatch):
        model = OnnxModel(good_bundle, threads=1)
        run = model.run

        def with_memory_for(pairs: int) -> OnnxModel:
            def run_if_it_fits(inputs):
                if inputs.candidate_items.size * inputs.history_items.shape[1] > pairs:
                    raise OUT_OF_MEMORY
                return run(inputs)

            monkeypatch.setattr(model, "run", run_if_it_fits)
            return model

        return with_memory_for

    def test_shapes_that_do_not_fit_are_left_out_and_told(self, model):
        found = Logged()
        with found.listening(logging.WARNING, personal_data=False):
            took = model(100 * HISTORY_LENGTH).warm_up(10**9)
        works = [work for work, _ in took]
        assert max(works) == 100 * HISTORY_LENGTH
        assert 4 * HISTORY_LENGTH in works
        (event,) = found.events("shapes-left-out")
        assert event["shapes"] == 1
        assert event["smallest_work"] == 4 * 100 * HISTORY_LENGTH

    def test_where_not_even_one_request_fits_the_bundle_is_refused(self, model):
        message = "no memory for one request of 100 candidates and 8 behaviors: .*requested buffer"
        with pytest.raises(BundleError, match=message):
            model(100 * HISTORY_LENGTH - 1).warm_up(10**9)

    def test_another_failure_is_not_taken_for_it(self, model, monkeypatch):
        model = model(10**9)

        def fail(inputs):
            raise RuntimeError(f"broken by {inputs.candidate_items.size}")

        monkeypatch.setattr(model, "run", fail)
        with pytest.raises(RuntimeError, match="broken by"):
            model.warm_up(10**9)


class TestExplainGraph:
    def test_there_may_be_none(self, good_bundle):
        assert OnnxModel(good_bundle).explain is None

    def test_one_that_gives_no_weights_is_refused(self, bundle):
        shutil.copy(bundle / MODEL, bundle / EXPLAIN)
        list_file(bundle, EXPLAIN)
        with pytest.raises(BundleError, match=r"explain\.onnx has \(name, type, axes\)"):
            OnnxModel(bundle)
