"""`python -m training compare-clicks`: what stands on the pages is what the run folders say."""

import json
import re
from pathlib import Path

import pytest
import torch

from tests.training.comparison.click_runs import IMN, write_run
from tests.training.comparison.pages import figures, tables
from tests.training.runs import run_config
from training.__main__ import main
from training.comparison.click_costs import ClickCost
from training.data.log import PreparedLog
from training.distributed import Worker
from training.trainer import METRICS, train


@pytest.fixture(scope="module")
def pages(world_log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the pages over three trained runs and two made-up ones."""
    folder = tmp_path_factory.mktemp("click")
    log = PreparedLog(world_log)
    imn = {"name": "imn", "embedding_dim": 4, "iterations": 3, "head_units": [8]}
    for name, model, seed in (
        ("imn-1", imn, 1),
        ("imn-2", imn, 2),
        ("youtube", {"name": "youtube_dnn", "embedding_dim": 4, "head_units": [8]}, 1),
    ):
        config = run_config(model=model, max_epochs=1, seed=seed)
        worker = Worker(device=torch.device("cpu"))
        train(config, log, folder / name, worker, show_progress=False)
    negatives = {"samples": "negatives"}
    write_run(folder / "negatives", log, data=negatives)
    write_run(folder / "softmax", log, {**IMN, "weights": "softmax"}, data=negatives)
    (folder / "other.json").write_text('{"figures": {"retrieval_us": 23.25}}')
    arguments = ["--log", f"world={world_log}", "--cite", str(folder / "other.json")]
    targets = ["--page", str(folder / "click.md"), "--html", str(folder / "click.html")]
    names = ("imn-1", "imn-2", "youtube", "negatives", "softmax")
    runs = [str(folder / name) for name in names]
    assert main(["compare-clicks", *runs, *arguments, *targets]) == 0
    return folder


def outcome(folder: Path) -> dict[str, float]:
    test: dict[str, float] = json.loads((folder / METRICS).read_text().splitlines()[-1])
    return test


def test_figures_are_those_of_the_runs(pages):
    named, test = figures(pages / "click.md"), outcome(pages / "youtube")
    for end, metric in (
        ("auc", "auc"),
        ("gauc", "gauc"),
        ("log_loss", "log_loss"),
        ("ece", "expected_calibration_error"),
    ):
        assert named[f"world_youtube_dnn_{end}"] == test[metric]
    assert named["world_ceiling_auc"] == test["ceiling_auc"]
    aucs = [outcome(pages / name)["auc"] for name in ("imn-1", "imn-2")]
    assert named["world_imn_3p_auc"] == pytest.approx(sum(aucs) / 2)
    assert "world_imn_3p_auc_sd" in named
    assert named["world_negatives_imn_3p_softmax_auc"] == 0.7
    assert named["world_imn_3p_entropy_pass3"] > 0
    assert named["retrieval_us"] == 23.25


def test_sections_stand_in_order(pages):
    found = tables(pages / "click.md")
    assert list(found) == [
        "AUC by model",
        "Metrics on world",
        "Metrics on world_negatives",
        "Ablations on world_negatives",
        "Iterations on world",
        "Iterations on world_negatives",
        "Attention of IMN-3P on world",
        "Attention of IMN-3P on world_negatives",
        "From other.md",
    ]
    youtube = next(row for row in found["Metrics on world"] if row["model"] == "YouTube DNN")
    assert youtube["AUC"] == f"{outcome(pages / 'youtube')['auc']:.4f}"
    assert youtube["ended by"] == "shortened: max_epochs = 1"


def test_the_html_page_has_its_plots_and_refers_to_nothing(pages):
    page = (pages / "click.html").read_text()
    assert page.count("<svg") == 5
    assert "http" not in page
    assert not re.search(r"(src|href)=\"(?!#)", page)
    for section in tables(pages / "click.md"):
        assert f"<h2>{section}</h2>" in page


def test_the_command_names_no_place_of_this_machine(pages):
    command = json.loads((pages / "click.json").read_text())["command"]
    assert command == (
        "python -m training compare-clicks imn-1 imn-2 youtube negatives softmax --log world=log "
        "--page click.md --html click.html --cite other.json"
    )
    assert str(pages) not in (pages / "click.md").read_text()


def test_costs_are_measured_where_they_are_asked_for(world_log, tmp_path, monkeypatch):
    write_run(tmp_path / "a", PreparedLog(world_log))
    measured = []

    def click_costs(subjects, *, device):
        measured.append((list(subjects), device.type))
        cost = ClickCost(steps_per_s=1.0, score_ms=1.0, step_bytes=1)
        return {name: {50: cost, 100: cost} for name in subjects}

    monkeypatch.setattr("training.comparison.click_measurements.click_costs", click_costs)
    arguments = ["compare-clicks", str(tmp_path / "a"), "--log", f"world={world_log}", "--costs"]
    targets = ["--page", str(tmp_path / "a.md"), "--html", str(tmp_path / "a.html")]
    assert main([*arguments, *targets]) == 0
    assert measured == [(["imn_3p"], "cpu")]
    assert figures(tmp_path / "a.md")["imn_3p_steps_per_s_L50"] == 1.0
    assert "--costs --device cpu" in (tmp_path / "a.md").read_text()


@pytest.mark.parametrize(
    ("logs", "message"),
    [
        (["LOG"], r"--log .*log: expected NAME=FOLDER"),
        (["=LOG"], r"--log =.*log: expected NAME=FOLDER"),
        (["a=LOG", "a=LOG"], r"--log a=.*log: a is .*log already"),
        (["A=LOG"], r"--log A: expected a name of lower-case letters, .*"),
    ],
)
def test_a_wrong_log_ends_in_one_clear_line(world_log, tmp_path, capsys, logs, message):
    write_run(tmp_path / "a", PreparedLog(world_log))
    given = [word for log in logs for word in ("--log", log.replace("LOG", str(world_log)))]
    targets = ["--page", str(tmp_path / "a.md"), "--html", str(tmp_path / "a.html")]
    assert main(["compare-clicks", str(tmp_path / "a"), *given, *targets]) == 2
    assert re.fullmatch(rf"error: {message}\n", capsys.readouterr().err)
