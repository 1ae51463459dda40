"""Plots of click models: what is drawn, as shapes and text alone."""

import re

import numpy as np
import pytest

from training.comparison import click_plots as plots
from training.comparison.click_costs import ClickCost

COST = ClickCost(steps_per_s=2.0, score_ms=1.0, step_bytes=1000)
PLOTS = {
    "differences": lambda: plots.differences({"IMN-3P softmax": -0.0123}),
    "lengths": lambda: plots.auc_over_length({"DIN": {50: 0.7, 100: 0.7001}}),
    "costs": lambda: plots.costs({"DIN": {50: COST, 100: COST}}),
    "iterations": lambda: plots.iterations({1: 0.7, 2: 0.71}, {1: [2.0], 2: [2.0, 1.0]}),
    "one model": lambda: plots.iterations({3: 0.7}, {3: [2.0, 2.1, 2.2]}),
    "heat map": lambda: plots.heat_map(np.array([[0.1, 0.9], [0.5, 0.4]], dtype=np.float32)),
}


@pytest.mark.parametrize("draw", PLOTS.values(), ids=PLOTS)
def test_a_plot_refers_to_nothing_outside_itself(draw):
    svg = draw()
    assert svg.startswith("<svg")
    assert not re.search(r"(src|href)=\"(?!#)", svg)


def test_a_bar_is_labelled_with_its_difference():
    assert ">-0.0123<" in PLOTS["differences"]()


def test_one_model_has_no_line_of_auc():
    assert ">AUC<" in PLOTS["iterations"]()
    assert ">AUC<" not in PLOTS["one model"]()


def test_a_hardly_visible_difference_does_not_fill_the_plot():
    ticks = [float(one) for one in re.findall(r">(0\.\d+)<", PLOTS["lengths"]())]
    assert max(ticks) - min(ticks) > 0.005
