"""One HTML page about a run: settings, curves, metrics."""

import io
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

from training.config import RunConfig
from training.folders import staged_file

_TEMPLATE = "report.html"
_WATCHED = ("auc", "gauc", "full_ndcg10", "full_hr10")


def write_report(
    path: Path, config: RunConfig, lines: list[dict[str, Any]], *, metric: str = "auc"
) -> None:
    """Write the page from the lines of metrics.jsonl; it needs no other file.

    `metric`: what validation watched.
    """
    epochs = [line for line in lines if line["part"] == "valid"]
    test = next((line for line in lines if line["part"] == "test"), {})
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("training", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    page = environment.get_template(_TEMPLATE).render(
        name=config.name,
        config=config.model_dump(mode="json"),
        test={name: value for name, value in test.items() if name != "part"},
        epochs=epochs,
        watched=[name for name in _WATCHED if any(name in line for line in epochs)] or [metric],
        curves=_curves(epochs, metric) if epochs else None,
    )
    with staged_file(path) as staging:
        staging.write_text(page)


def _curves(epochs: list[dict[str, Any]], metric: str) -> str:
    """Return loss and the validation metric by epoch as one inline SVG."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    loss_axes, metric_axes = figure.subplots(1, 2)
    # Not every epoch is; the last one always.
    validated = [line for line in epochs if metric in line]
    numbers = [line["epoch"] + 1 for line in epochs]
    validated_numbers = [line["epoch"] + 1 for line in validated]
    loss_axes.plot(numbers, [line["train_loss"] for line in epochs], marker="o", label="training")
    if "log_loss" in validated[0]:
        losses = [line["log_loss"] for line in validated]
        loss_axes.plot(validated_numbers, losses, marker="o", label="validation")
    loss_axes.set(xlabel="epoch", title="loss")
    loss_axes.legend()
    metric_axes.plot(
        validated_numbers, [line[metric] for line in validated], marker="o", label="validation"
    )
    if "ceiling_auc" in validated[0]:
        metric_axes.axhline(validated[0]["ceiling_auc"], linestyle="--", label="ceiling")
        metric_axes.legend()
    metric_axes.set(xlabel="epoch", title="AUC" if metric == "auc" else metric)
    for axes in (loss_axes, metric_axes):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]
