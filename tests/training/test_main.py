"""`python -m training prepare`, what becomes of its features of items, and output cut short."""

import os
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from training.__main__ import main
from training.checkpoint import load_model
from training.data.log import PreparedLog
from training.trainer import MODEL

RUN = """
name = "tiny"
[data]
samples = "negatives"
[model]
name = "youtube_dnn"
embedding_dim = 4
head_units = [4]
item_features = ["brand", "author"]
[train]
max_epochs = 1
"""


@pytest.fixture
def log_file(tmp_path: Path) -> Path:
    """A log of 40 behaviors with eight items, of three brands and two authors."""
    item = [1 + row * 3 % 8 for row in range(40)]
    path = tmp_path / "log.csv"
    pl.DataFrame(
        {
            "user": [row % 5 for row in range(40)],
            "item": item,
            "timestamp": range(40),
            "brand_id": [one % 3 for one in item],
            "author": ["eco" if one < 5 else "woolf" for one in item],
        }
    ).write_csv(path)
    return path


def prepare(log_file: Path, *options: str) -> int:
    return main(["prepare", str(log_file), str(log_file.with_name("log")), *options])


def test_features_are_called_like_their_columns_unless_said(log_file):
    assert prepare(log_file, "--item-feature", "brand=brand_id", "--item-feature", "author") == 0
    features = PreparedLog(log_file.with_name("log")).item_features
    assert {name: rows.tolist() for name, rows in features.items()} == {
        "author": [1, 1, 1, 1, 2, 2, 2, 2],
        "brand": [2, 3, 1, 2, 3, 1, 2, 3],
    }


def test_a_missing_column_is_refused_in_one_line(log_file, capsys):
    assert prepare(log_file, "--item-feature", "brand") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {log_file}: no column 'brand' for item feature brand; it has")
    assert error.count("\n") == 1
    assert not log_file.with_name("log").exists()


def test_a_second_log_comes_before_the_first(log_file, tmp_path):
    earlier = tmp_path / "earlier.csv"
    earlier.write_text("user,item,timestamp,nth\n2,77,,1\n2,78,0,2\n")
    assert prepare(log_file, "--history", str(earlier), "--history-column", "order=nth") == 0
    log = PreparedLog(log_file.with_name("log"))
    user = [log.user_id(index) for index in range(len(log))].index("2")
    of_user = log.behaviors["item"][log.behavior_offsets[user] : log.behavior_offsets[user + 1]]
    assert of_user.tolist()[:3] == [77, 78, 7]


def test_a_trained_model_keeps_the_features_that_it_reads(log_file, tmp_path):
    prepare(log_file, "--item-feature", "brand=brand_id", "--item-feature", "author")
    (tmp_path / "run.toml").write_text(RUN)
    log, run = tmp_path / "log", tmp_path / "run"
    assert main(["train", str(tmp_path / "run.toml"), str(log), str(run), "--no-progress"]) == 0
    model = load_model(run / MODEL).model
    assert model.get_buffer("items.features.0.of_row").tolist() == [0, 0, 2, 3, 1, 2, 3, 1, 2, 3]
    assert model.get_buffer("items.features.1.of_row").tolist() == [0, 0, 1, 1, 1, 1, 2, 2, 2, 2]


def test_a_feature_that_the_log_has_not_is_refused_in_one_line(log_file, tmp_path, capsys):
    prepare(log_file, "--item-feature", "author")
    (tmp_path / "run.toml").write_text(RUN)
    log, run = tmp_path / "log", tmp_path / "run"
    assert main(["train", str(tmp_path / "run.toml"), str(log), str(run), "--no-progress"]) == 2
    expected = "error: model.item_features: the log has no 'brand'; it has author\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize("stderr_too", [False, True], ids=["stdout", "stdout and stderr"])
def test_output_that_nobody_reads_ends_the_command_quietly(log_file, tmp_path, stderr_too):
    """As of `| head`, which is gone by then: a pipe whose other end is closed."""
    prepare(log_file, "--item-feature", "brand=brand_id", "--item-feature", "author")
    (tmp_path / "run.toml").write_text(RUN)
    log, run = tmp_path / "log", tmp_path / "run"
    end, pipe = os.pipe()
    os.close(end)
    try:
        ended = subprocess.run(
            [sys.executable, "-m", "training", "train", tmp_path / "run.toml", log, run],
            stdout=pipe,
            stderr=pipe if stderr_too else subprocess.PIPE,
            text=True,
        )
    finally:
        os.close(pipe)
    assert ended.returncode == 1
    if not stderr_too:
        assert "epoch 1/1" in ended.stderr
        assert "BrokenPipe" not in ended.stderr
        assert "Traceback" not in ended.stderr
