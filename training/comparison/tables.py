"""Sections of a page, and the cells that both comparisons print alike."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from training.comparison.runs import Cost
from training.comparison.setups import Setup, Spread

# The columns of `budget`, but its last, which names the runs.
BUDGET_HEADS = ("epochs (best)", "training s", "device", "seeds", "ended by")


@dataclass(frozen=True)
class Table:
    """Cells as they are printed."""

    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Section:
    """`svg`: a plot of the table, on pages that can show it; `is_wide`: above the table, as wide as
    the page, not beside it.
    """

    title: str
    text: str
    table: Table
    svg: str | None = None
    is_wide: bool = False


def budget(setup: Setup) -> tuple[str, ...]:
    """Return the cells under `BUDGET_HEADS`, and the names of the run folders."""
    costs = [run.cost for run in setup.runs]
    endings = [
        "patience"
        if run.ending == "patience"
        else f"shortened: {run.ending} = {getattr(run.config.train, run.ending):g}"
        for run in setup.runs
    ]
    return (
        ", ".join(f"{cost.epochs} ({cost.best_epoch + 1})" for cost in costs),
        ", ".join(f"{cost.trained_s:,.0f}" for cost in costs),
        _different(map(_device, costs)),
        ", ".join(str(run.config.train.seed) for run in setup.runs),
        _different(endings),
        ", ".join(run.folder.name for run in setup.runs),
    )


def _device(cost: Cost) -> str:
    return f"{cost.device}, {cost.threads} thread{'s' if cost.threads > 1 else ''}"


def _different(words: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(words))


def differences(settings: Mapping[str, tuple[Any, Any]]) -> str:
    """Return "train.batch_size = 32, not 64" of each setting with its values here and there."""
    return "; ".join(
        f"{key} = {said(value)}, not {said(main)}" for key, (value, main) in settings.items()
    )


def figure_name(model: str, settings: Mapping[str, tuple[Any, Any]]) -> str:
    """Return "sasrec_norm_post" of a model and the settings in which it differs."""
    words = [model]
    for key, (value, _) in settings.items():
        words += [key.rpartition(".")[2], said(value)]
    return re.sub(r"[^a-z0-9]+", "_", "_".join(words).lower()).strip("_")


def spread_figures(name: str, spread: Spread | None) -> dict[str, float]:
    """Return the mean by its name and the deviation, if any, with "_sd"; nothing of no number."""
    if spread is None or not math.isfinite(spread.mean):
        return {}
    deviation = {} if spread.deviation is None else {f"{name}_sd": spread.deviation}
    return {name: spread.mean} | deviation


def spread_cell(spread: Spread | None) -> str:
    """Return "0.5000 ± 0.0100", nothing of None."""
    if spread is None or spread.deviation is None:
        return number(None if spread is None else spread.mean)
    return f"{spread.mean:.4f} ± {spread.deviation:.4f}"


def number(value: float | None) -> str:
    """Return four digits, nothing of None."""
    return "" if value is None else f"{value:.4f}"


def said(value: Any) -> str:
    """Return the value of a setting as it is printed."""
    if isinstance(value, list):
        names = [one["name"] if isinstance(one, dict) else str(one) for one in value]
        return " + ".join(names) or "none"
    return value if isinstance(value, str) else json.dumps(value)
