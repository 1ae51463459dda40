"""Golden rows on disk."""

import numpy as np
import pytest

from contract.errors import BundleError
from contract.golden import GoldenRows
from contract.records import encode_records


def rows(n: int = 2) -> GoldenRows:
    return GoldenRows(
        histories=[encode_records([1, 2], [3, 4]), b""][:n],
        ranking_times=np.array([10, 11], dtype=np.int64)[:n],
        candidates=np.array([[1, 2, 3], [4, 5, 0]], dtype=np.int64)[:n],
        scores=np.array([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]], dtype=np.float32)[:n],
    )


def test_loading_gives_back_what_was_saved(tmp_path):
    rows().save(tmp_path / "golden.npz")
    loaded = GoldenRows.load(tmp_path / "golden.npz")
    assert list(loaded.histories) == list(rows().histories)
    assert loaded.ranking_times.tolist() == [10, 11]
    assert loaded.candidates.tolist() == rows().candidates.tolist()
    assert loaded.scores.tolist() == rows().scores.tolist()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(BundleError, match=r"golden\.npz: not readable"):
        GoldenRows.load(tmp_path / "golden.npz")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a zip"], ids=["empty", "garbage"])
def test_garbage_is_refused(tmp_path, content):
    (tmp_path / "golden.npz").write_bytes(content)
    with pytest.raises(BundleError, match=r"golden\.npz: not readable"):
        GoldenRows.load(tmp_path / "golden.npz")


def test_pickles_are_not_loaded(tmp_path):
    np.savez(tmp_path / "golden.npz", records=np.array([print], dtype=object))
    with pytest.raises(BundleError, match="not readable"):
        GoldenRows.load(tmp_path / "golden.npz")


def test_no_rows_prove_nothing(tmp_path):
    rows(0).save(tmp_path / "golden.npz")
    with pytest.raises(BundleError, match="0 histories"):
        GoldenRows.load(tmp_path / "golden.npz")


def test_lengths_must_add_up(tmp_path):
    rows().save(tmp_path / "golden.npz")
    arrays = dict(np.load(tmp_path / "golden.npz"))
    np.savez(tmp_path / "golden.npz", **{**arrays, "lengths_bytes": np.array([12, 0])})
    with pytest.raises(BundleError, match="do not add up"):
        GoldenRows.load(tmp_path / "golden.npz")


def test_scores_must_fit_candidates(tmp_path):
    rows().save(tmp_path / "golden.npz")
    arrays = dict(np.load(tmp_path / "golden.npz"))
    np.savez(tmp_path / "golden.npz", **{**arrays, "scores": arrays["scores"][:, :2]})
    with pytest.raises(BundleError, match="two matrices of one shape"):
        GoldenRows.load(tmp_path / "golden.npz")
