"""What a bundle must answer, by its graph alone."""

import shutil

import numpy as np
import pytest

from contract.bundle import GOLDEN, MODEL
from contract.errors import BundleError
from contract.golden import GoldenRows
from exporter.__main__ import main
from exporter.scoring import score
from tests.service.tiny_bundle import flip_a_byte


@pytest.fixture
def bundle(exported):
    return exported().bundle


def test_golden_rows_get_their_golden_scores(bundle):
    golden = GoldenRows.load(bundle / GOLDEN)
    np.testing.assert_allclose(score(bundle, golden), golden.scores, atol=1e-5)


def test_the_command_replaces_the_scores_of_a_file(bundle, tmp_path, capsys):
    golden = GoldenRows.load(bundle / GOLDEN)
    asked, scored = tmp_path / "asked.npz", tmp_path / "scored.npz"
    # More than one block.
    GoldenRows(
        histories=[*golden.histories] * 3,
        ranking_times=np.tile(golden.ranking_times, 3),
        candidates=np.tile(golden.candidates, (3, 1)),
        scores=np.zeros((3 * len(golden.histories), golden.candidates.shape[1]), np.float32),
    ).save(asked)
    assert main(["score", str(bundle), str(asked), str(scored)]) == 0
    expected = np.tile(golden.scores, (3, 1))
    np.testing.assert_allclose(GoldenRows.load(scored).scores, expected, atol=1e-5)
    assert f"{scored}: {len(expected)} requests scored" in capsys.readouterr().out


def test_an_altered_bundle_is_refused(bundle, capsys, tmp_path):
    altered = shutil.copytree(bundle, tmp_path / "altered")
    flip_a_byte(altered / MODEL)
    with pytest.raises(BundleError, match=r"model\.onnx has sha256"):
        score(altered, GoldenRows.load(altered / GOLDEN))
    asked = ["score", str(altered), str(altered / GOLDEN), str(tmp_path / "scored.npz")]
    assert main(asked) == 2
    assert "model.onnx has sha256" in capsys.readouterr().err
    assert not (tmp_path / "scored.npz").exists()
