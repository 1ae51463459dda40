"""The figures of a comparison of next-item models."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, StrMethodFormatter
from numpy.typing import NDArray

from training.comparison.costs import N_CANDIDATES, LengthCost
from training.comparison.plots import MARKERS, svg

_STYLES = ("-", "--", ":", "-.")


@dataclass(frozen=True, kw_only=True)
class TradeOff:
    """One model: its name, test metric, latency of scoring in ms, number of parameters."""

    label: str
    quality: float
    latency_ms: float
    parameters: int


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """One PKM-ACT: K experts in all, k retrieved, key usage rate by layer, test metric."""

    n_experts: int
    n_retrieved: int
    usage: tuple[float, ...]
    quality: float


def trade_off(points: Sequence[TradeOff], metric: str) -> str:
    """Return quality over latency, one bubble a model whose area shows its parameters."""
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    largest = max(point.parameters for point in points)
    for number, point in enumerate(points):
        axes.scatter(
            point.latency_ms,
            point.quality,
            s=60 + 600 * point.parameters / largest,
            color=f"C{number}",
            alpha=0.55,
            linewidths=0,
        )
        axes.annotate(point.label, (point.latency_ms, point.quality), ha="center", va="center")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    # Numbers between powers of ten where there are hardly any of these.
    axes.xaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.5)))
    axes.margins(0.2)
    axes.set(xlabel=f"ms to score {N_CANDIDATES} candidates", ylabel=metric)
    axes.grid(alpha=0.3)
    return svg(figure)


def lengths(costs: Mapping[str, Mapping[int, LengthCost]]) -> str:
    """Return time and memory over the history length, one line a model."""
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    time_axes, memory_axes = figure.subplots(1, 2)
    for number, (label, by_length) in enumerate(costs.items()):
        ticks = list(by_length)
        line = {"marker": MARKERS[number % len(MARKERS)], "label": label}
        time_axes.plot(ticks, [1e3 * cost.encode_s for cost in by_length.values()], **line)
        memory_axes.plot(ticks, [cost.step_bytes / 1e6 for cost in by_length.values()], **line)
    time_axes.set(title="ms to read one history")
    memory_axes.set(title="MB of a training step")
    for axes in (time_axes, memory_axes):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set(xlabel="history length L")
        axes.grid(alpha=0.3)
    time_axes.legend()
    return svg(figure)


def expert_load(load_YE: NDArray[np.float64]) -> str:
    """Return the share of selections of each expert, falling, one line a layer."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for number, load_E in enumerate(load_YE):
        ranks_E = np.arange(1, len(load_E) + 1)
        axes.step(
            ranks_E,
            100 * load_E,
            where="mid",
            linestyle=_STYLES[number % len(_STYLES)],
            label=f"layer {number + 1}",
        )
    axes.axhline(100 / load_YE.shape[1], color="0.5", linewidth=1, label="all alike")
    axes.set_xscale("log")
    axes.set(xlabel="expert, the busiest first", ylabel="% of selections", ylim=(0, None))
    axes.legend()
    axes.grid(alpha=0.3)
    return svg(figure)


def key_usage(retrievals: Sequence[Retrieval], metric: str) -> str:
    """Return key usage rate, by layer, and quality over K, one line for each k."""
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    usage_axes, quality_axes = figure.subplots(1, 2)
    for number, n_retrieved in enumerate(sorted({one.n_retrieved for one in retrievals})):
        row = sorted(
            (one for one in retrievals if one.n_retrieved == n_retrieved),
            key=lambda one: one.n_experts,
        )
        ticks = [one.n_experts for one in row]
        look = {"marker": MARKERS[number % len(MARKERS)], "color": f"C{number}"}
        for layer in range(len(row[0].usage)):
            usage_axes.plot(
                ticks,
                [100 * one.usage[layer] for one in row],
                linestyle=_STYLES[layer % len(_STYLES)],
                fillstyle="none" if layer else "full",
                label=f"k = {n_retrieved}, layer {layer + 1}",
                **look,
            )
        qualities = [one.quality for one in row]
        quality_axes.plot(ticks, qualities, label=f"k = {n_retrieved}", **look)
    usage_axes.set(title="% of experts used", ylim=(0, 105))
    quality_axes.set(title=metric)
    ticks = sorted({one.n_experts for one in retrievals})
    for axes in (usage_axes, quality_axes):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.set(xlabel="experts K")
        axes.legend()
        axes.grid(alpha=0.3)
    return svg(figure)
