"""All figures of a comparison of click models, by name."""

from collections.abc import Sequence

from training.comparison import click_costs
from training.comparison.click_choice import DataSet
from training.comparison.click_measurements import ClickMeasurements
from training.comparison.click_sections import ECE, UNCALIBRATED
from training.comparison.setups import Setup
from training.comparison.tables import spread_figures

# The ends of names, and the test metrics.
_METRICS = {
    "auc": "auc",
    "gauc": "gauc",
    "log_loss": "log_loss",
    "brier_score": "brier_score",
    "ece": ECE,
    "ece_uncalibrated": ECE + UNCALIBRATED,
}


def figures(data_sets: Sequence[DataSet], measured: ClickMeasurements) -> dict[str, float]:
    """Return the figures of main setups and variants, of attention, of costs where measured."""
    named: dict[str, float] = {}
    for data in data_sets:
        for model, setup in data.mains.items():
            named |= _test_figures(f"{data.name}_{model}", setup)
        for variant in data.variants:
            named |= _test_figures(f"{data.name}_{variant.model}_{variant.name}", variant.setup)
        for model, setups in data.lengths.items():
            for length, setup in setups.items():
                named |= _test_figures(f"{data.name}_{model}_L{length}", setup)
        if data.ceiling is not None:
            named[f"{data.name}_ceiling_auc"] = data.ceiling
    for name, attention in measured.attention.items():
        for model, by_pass in attention.entropies.items():
            for number, entropy in enumerate(by_pass, start=1):
                named[f"{name}_{model}_entropy_pass{number}"] = entropy
    return named | (click_costs.figures(measured.costs) if measured.costs else {})


def _test_figures(name: str, setup: Setup) -> dict[str, float]:
    named: dict[str, float] = {}
    for end, metric in _METRICS.items():
        named |= spread_figures(f"{name}_{end}", setup.test(metric))
    return named
