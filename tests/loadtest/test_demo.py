"""The demo's own promises; `make demo ONCE=1` runs all of it."""

import pytest

from loadtest.__main__ import main


def test_a_folder_of_somebody_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.tex").touch()
    assert main(["demo", "--once", "--folder", str(tmp_path)]) == 2
    assert "holds files that are not of a demo" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").exists()


def test_a_log_that_is_not_there_ends_the_demo_with_its_name(tmp_path, capfd):
    missing = tmp_path / "missing.csv"
    folder = tmp_path / "demo"
    assert main(["demo", "--once", "--data", str(missing), "--folder", str(folder)]) == 2
    error = capfd.readouterr().err
    assert f"{missing}: no such file or folder" in error
    assert "training prepare" in error


@pytest.mark.parametrize("flag", ["--users", "--seed"])
def test_an_impossible_world_is_refused_by_name(tmp_path, capsys, flag):
    assert main(["world", str(tmp_path / "log.parquet"), flag, "-1"]) == 2
    assert f"{flag[2:]} must be at least" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
