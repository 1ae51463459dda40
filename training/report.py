"""One HTML page about a run: settings, curves, metrics."""

import io
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

from training.config import RunConfig
from training.folders import staged_file

_TEMPLATE = "report.html"


def write_report(path: Path, config: RunConfig, lines: list[dict[str, Any]]) -> None:
    """Write the page from the lines of metrics.jsonl; it needs no other file."""
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
        curves=_curves(epochs) if epochs else None,
    )
    with staged_file(path) as staging:
        staging.write_text(page)


def _curves(epochs: list[dict[str, Any]]) -> str:
    """Return loss and validation AUC by epoch as one inline SVG."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    loss_axes, auc_axes = figure.subplots(1, 2)
    numbers = [line["epoch"] + 1 for line in epochs]
    loss_axes.plot(numbers, [line["train_loss"] for line in epochs], marker="o", label="training")
    if "log_loss" in epochs[0]:
        losses = [line["log_loss"] for line in epochs]
        loss_axes.plot(numbers, losses, marker="o", label="validation")
    loss_axes.set(xlabel="epoch", title="log-loss")
    loss_axes.legend()
    auc_axes.plot(numbers, [line["auc"] for line in epochs], marker="o", label="validation")
    if "ceiling_auc" in epochs[0]:
        auc_axes.axhline(epochs[0]["ceiling_auc"], linestyle="--", label="ceiling")
        auc_axes.legend()
    auc_axes.set(xlabel="epoch", title="AUC")
    for axes in (loss_axes, auc_axes):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]
