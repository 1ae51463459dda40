"""The page about a run: its table and its curves show what was measured, and nothing else."""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.training.runs import run_config
from training.config import RunConfig
from training.report import write_report

CLICK = {"auc": 0.75, "gauc": 0.5, "log_loss": 0.25, "n_samples": 1000.0}
RANKED = {"full_ndcg10": 0.125, "full_hr10": 0.375, "full_mrr10": 0.0625, "n_samples": 900.0}
SAMPLED = {"pop100_ndcg10": 0.125, "pop100_hr10": 0.375, "n_samples": 900.0}


def lines_of(
    metrics: dict[str, float], *, n_epochs: int = 4, validate_every: int = 1
) -> list[dict[str, Any]]:
    """Return lines of metrics.jsonl, the last epoch always validated."""
    epochs: list[dict[str, Any]] = []
    for epoch in range(n_epochs):
        validated = (epoch + 1) % validate_every == 0 or epoch + 1 == n_epochs
        line = {"part": "valid", "epoch": epoch, "train_loss": 3.0 - epoch / 2}
        epochs.append({**line, **(metrics if validated else {})})
    return [*epochs, {"part": "test", **metrics}]


def page_of(tmp_path: Path, lines: list[dict[str, Any]], **options: str) -> str:
    write_report(tmp_path / "report.html", config(), lines, **options)
    return (tmp_path / "report.html").read_text()


def config() -> RunConfig:
    return run_config(model={"name": "sasrec", "dropout": 0.375})


def tables(page: str) -> list[list[list[str]]]:
    """Return the cells of each row of each table."""
    return [
        [
            re.findall(r"<t[hd]>(.*?)</t[hd]>", row)
            for row in re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)
        ]
        for table in re.findall(r"<table>(.*?)</table>", page, re.DOTALL)
    ]


def points(page: str) -> list[int]:
    """Return how many points each curve has; other marks are not clipped to a frame."""
    groups = re.findall(r"<g clip-path=\"url\(#\w+\)\">(.*?)</g>", page, re.DOTALL)
    return [group.count("<use") for group in groups]


@pytest.mark.parametrize(
    ("metrics", "metric", "watched"),
    [
        pytest.param(CLICK, "auc", ["auc", "gauc"], id="clicks"),
        pytest.param(RANKED, "full_ndcg10", ["full_ndcg10", "full_hr10"], id="next items"),
        pytest.param(SAMPLED, "pop100_ndcg10", ["pop100_ndcg10"], id="sampled negatives"),
    ],
)
class TestEveryKind:
    def test_the_tables_hold_what_was_measured(self, tmp_path, metrics, metric, watched):
        test, epochs = tables(page_of(tmp_path, lines_of(metrics), metric=metric))
        assert test == [
            [name, f"{value:.0f}" if name == "n_samples" else f"{value:.4f}"]
            for name, value in metrics.items()
        ]
        assert epochs[0] == ["epoch", "training loss", *(f"validation {name}" for name in watched)]
        values = [f"{metrics[name]:.4f}" for name in watched]
        losses = ["3.0000", "2.5000", "2.0000", "1.5000"]
        assert epochs[1:] == [[str(n + 1), loss, *values] for n, loss in enumerate(losses)]

    def test_epochs_without_a_validation_are_empty_there(self, tmp_path, metrics, metric, watched):
        del watched
        lines = lines_of(metrics, n_epochs=5, validate_every=2)
        _, epochs = tables(page_of(tmp_path, lines, metric=metric))
        empty = [not any(row[2:]) for row in epochs[1:]]
        assert empty == [True, False, True, False, False]

    def test_the_page_needs_no_other_file(self, tmp_path, metrics, metric, watched):
        del watched
        page = page_of(tmp_path, lines_of(metrics), metric=metric)
        assert "<svg" in page
        assert "test-run" in page
        assert "0.375" in page  # the settings
        assert not re.search(r"(src|href)=.http", page)


def title(metric: str) -> str:
    return f"<!-- {metric} -->"


class TestCurves:
    """matplotlib writes every text beside its drawing, as a comment."""

    def test_are_named_by_what_validation_watched(self, tmp_path):
        page = page_of(tmp_path, lines_of(RANKED), metric="full_ndcg10")
        assert title("full_ndcg10") in page
        assert title("AUC") not in page
        assert title("AUC") in page_of(tmp_path, lines_of(CLICK))

    def test_ranked_models_have_no_loss_of_validation(self, tmp_path):
        """One curve of the loss and one of the metric; click models have two of the loss."""
        assert points(page_of(tmp_path, lines_of(RANKED), metric="full_ndcg10")) == [4, 4]
        assert points(page_of(tmp_path, lines_of(CLICK))) == [4, 4, 4]

    def test_hold_every_validation_where_not_every_epoch_has_one(self, tmp_path):
        page = page_of(tmp_path, lines_of(CLICK, n_epochs=6, validate_every=3))
        assert points(page) == [6, 2, 2]

    def test_show_the_ceiling_of_a_synthetic_log(self, tmp_path):
        lines = lines_of({**CLICK, "ceiling_auc": 0.875}, n_epochs=6, validate_every=3)
        assert title("ceiling") in page_of(tmp_path, lines)
        assert title("ceiling") not in page_of(tmp_path, lines_of(CLICK))


def test_a_model_without_training_has_no_curves(tmp_path):
    page = page_of(tmp_path, [{"part": "test", **CLICK}])
    assert "<svg" not in page
    assert len(tables(page)) == 1
