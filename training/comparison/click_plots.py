"""The figures of a comparison of click models."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from training.comparison.click_costs import ClickCost
from training.comparison.plots import MARKERS, svg

_WIDTH_OF_HEAT_MAP = 12
# Of AUC: a difference that two seeds make by chance is not to fill a plot.
_LEAST_RANGE = 0.01


def differences(bars: Mapping[str, float]) -> str:
    """Return AUC differences to a main setup as one bar each, the first on top."""
    figure = Figure(figsize=(6.4, 0.9 + 0.32 * len(bars)), layout="constrained")
    axes = figure.subplots()
    drawn = axes.barh(list(bars), list(bars.values()), height=0.6)
    axes.bar_label(drawn, fmt="{:+.4f}", padding=3)
    axes.axvline(0, color="0.3", linewidth=1)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.margins(x=0.3)  # for the labels
    axes.set_xlim(_visible(axes.get_xlim()))
    axes.set(xlabel="AUC, difference to the model as it is")
    axes.grid(axis="x", alpha=0.3)
    return svg(figure)


def auc_over_length(lines: Mapping[str, Mapping[int, float]]) -> str:
    """Return AUC over the history length, one line a model."""
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    _lines(axes, lines)
    axes.set(ylabel="AUC", ylim=_visible(axes.get_ylim()))
    figure.legend(loc="outside right upper")
    return svg(figure)


def costs(measured: Mapping[str, Mapping[int, ClickCost]]) -> str:
    """Return training steps a second, time of scoring and memory over the history length."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    panels: dict[str, Callable[[ClickCost], float]] = {
        "training steps/s": lambda cost: cost.steps_per_s,
        "ms to score 100 candidates": lambda cost: cost.score_ms,
        "MB of a training step": lambda cost: cost.step_bytes / 1e6,
    }
    for axes, (title, value) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        _lines(
            axes,
            {
                label: {length: value(cost) for length, cost in by_length.items()}
                for label, by_length in measured.items()
            },
        )
        axes.set_yscale("log")
        axes.set(title=title)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")
    return svg(figure)


def iterations(aucs: Mapping[int, float], entropies: Mapping[int, Sequence[float]]) -> str:
    """Return AUC over the number of passes, of one model no line, and entropy over the passes."""
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    *others, entropy_axes = figure.subplots(1, 2 if len(aucs) > 1 else 1, squeeze=False)[0]
    for auc_axes in others:
        auc_axes.plot(list(aucs), list(aucs.values()), marker=MARKERS[0])
        auc_axes.set(title="AUC", xlabel="iterations", ylim=_visible(auc_axes.get_ylim()))
        auc_axes.set_xticks(list(aucs))
        auc_axes.grid(alpha=0.3)
    for number, (k, by_pass) in enumerate(entropies.items()):
        passes = range(1, len(by_pass) + 1)
        marker = MARKERS[number % len(MARKERS)]
        entropy_axes.plot(passes, by_pass, marker=marker, label=f"IMN-{k}P")
    entropy_axes.set(title="entropy of the weights, nats", xlabel="pass")
    entropy_axes.set_ylim(0, 1.1 * max(max(by_pass) for by_pass in entropies.values()))
    entropy_axes.set_xticks(range(1, max(entropies) + 1))
    entropy_axes.legend()
    entropy_axes.grid(alpha=0.3)
    return svg(figure)


def heat_map(weights_PL: NDArray[np.float32]) -> str:
    """Return the weight of each behavior, oldest first, in each pass, the first on top."""
    n_passes, n_behaviors = weights_PL.shape
    figure = Figure(figsize=(_WIDTH_OF_HEAT_MAP, 1.2 + 0.45 * n_passes), layout="constrained")
    axes = figure.subplots()
    mesh = axes.pcolormesh(
        np.arange(n_behaviors + 1) + 0.5,
        np.arange(n_passes + 1) + 0.5,
        weights_PL,
        cmap="magma_r",
        vmin=0,
        edgecolor="face",  # no hairlines between cells
    )
    axes.invert_yaxis()
    axes.set_yticks(range(1, n_passes + 1))
    axes.set(xlabel="behavior, oldest first", ylabel="pass")
    bar = figure.colorbar(mesh, ax=axes, label="weight", pad=0.01)
    # Shapes like all else, not a picture: nothing on a page is referred to by an address.
    assert bar.solids is not None  # the colours of a mesh
    bar.solids.set(rasterized=False, edgecolor="face")
    return svg(figure)


def _lines(axes: Axes, lines: Mapping[str, Mapping[int, float]]) -> None:
    for number, (label, points) in enumerate(lines.items()):
        marker = MARKERS[number % len(MARKERS)]
        axes.plot(list(points), list(points.values()), marker=marker, label=label)
    ticks = sorted({length for points in lines.values() for length in points})
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set(xlabel="history length L")
    axes.grid(alpha=0.3)


def _visible(limits: tuple[float, float]) -> tuple[float, float]:
    """Return limits of AUC, widened about their middle where they are close."""
    low, high = limits
    missing = max(0.0, _LEAST_RANGE - (high - low)) / 2
    return low - missing, high + missing
