"""What a comparison of click models measures, beside what training left behind."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from contract.catalogue import FIRST_ROW
from training.checkpoint import load_model
from training.comparison import walks
from training.comparison.click_choice import DataSet
from training.comparison.click_costs import ClickCost, ClickSubject, click_costs
from training.comparison.click_published import BOOKS_AUC
from training.comparison.setups import Setup
from training.data.click_data import open_click_data
from training.data.splits import Part
from training.models.imn import IterativeMemoryNetwork
from training.trainer import MODEL

# Whose attention the paper shows.
_SHOWN = "imn_3p"


@dataclass(frozen=True, kw_only=True)
class Attention:
    """What IMN's attention does on one data set, by the first seed of each model.

    `entropies`: of each pass of an IMN-kP, by display name. `walk`: of `walker`.
    """

    entropies: dict[str, list[float]]
    walker: str
    walk: walks.Walk


@dataclass(frozen=True, kw_only=True)
class ClickMeasurements:
    """`attention`: by the name of the data set. `subjects`: what `costs` are of, by display name;
    nothing unless asked.
    """

    attention: dict[str, Attention]
    subjects: dict[str, ClickSubject]
    costs: dict[str, dict[int, ClickCost]]


def measure_clicks(
    data_sets: Sequence[DataSet], *, costs: bool, device: torch.device
) -> ClickMeasurements:
    """Measure what IMN's attention does; `costs`: also cost over the history length, on `device`,
    which takes minutes.
    """
    attention = {data.name: _attention(data, device) for data in data_sets}
    subjects = cost_subjects(data_sets) if costs else {}
    return ClickMeasurements(
        attention={name: one for name, one in attention.items() if one is not None},
        subjects=subjects,
        costs=click_costs(subjects, device=device) if subjects else {},
    )


def cost_subjects(data_sets: Sequence[DataSet]) -> dict[str, ClickSubject]:
    """Return, of the models that the paper measures, the main setup of the first data set that has
    one; the catalogue is the smallest of all, since what it costs hides what the history does.
    """
    n_rows = FIRST_ROW + min(data.log.header.n_items for data in data_sets)
    mains: dict[str, Setup] = {}
    for data in reversed(data_sets):
        mains |= data.mains
    return {
        model: ClickSubject(config=mains[model].runs[0].config, n_rows=n_rows)
        for model in BOOKS_AUC
        if model in mains
    }


def _attention(data: DataSet, device: torch.device) -> Attention | None:
    # Memory enhancement comes after the passes, so it is looked at only where nothing else is.
    walkers = [model for model in data.mains if re.fullmatch(r"imn_\d+p", model)]
    walkers = walkers or [model for model in data.mains if re.fullmatch(r"imn_\d+p_plus", model)]
    if not walkers:
        return None
    walker = _SHOWN if _SHOWN in walkers else walkers[-1]
    return Attention(
        entropies={model: _entropy(data, data.mains[model], device) for model in walkers},
        walker=walker,
        walk=_walk(data, data.mains[walker], device),
    )


def _entropy(data: DataSet, setup: Setup, device: torch.device) -> list[float]:
    clicks = open_click_data(data.log, setup.runs[0].config)
    return walks.entropy(_network(setup, device), clicks.loaders[Part.TEST], device)


def _walk(data: DataSet, setup: Setup, device: torch.device) -> walks.Walk:
    config = setup.runs[0].config
    clicks = open_click_data(data.log, config)
    return walks.walk(_network(setup, device), config, data.log, clicks, device)


def _network(setup: Setup, device: torch.device) -> IterativeMemoryNetwork:
    network = load_model(setup.runs[0].folder / MODEL).model.to(device)
    assert isinstance(network, IterativeMemoryNetwork)
    return network
