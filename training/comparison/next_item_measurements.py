"""What a comparison of next-item models measures, beside what training left behind."""

import json
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from contract.catalogue import FIRST_ROW
from training.checkpoint import load_model
from training.comparison.costs import LengthCost, Subject, costs_by_length, scoring_s
from training.comparison.experts import selections
from training.comparison.next_item_choice import BASELINE, SUBJECT, Comparison
from training.comparison.setups import Setup
from training.data.log import PreparedLog
from training.models.next_item import NextItemModel
from training.trainer import MODEL

_RETRIEVAL = ("model.keys_per_side", "model.experts")


@dataclass(frozen=True, kw_only=True)
class ExpertUse:
    """How often each expert served a test user: `counts` int64 [layers, experts], one a run."""

    setup: Setup
    counts: tuple[NDArray[np.int64], ...]


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """`scoring_s`: of each main model, seconds to score 100 candidates. `experts`: of PKM-ACT,
    nothing where no run has product keys. `by_length`: of each main model, of the other form of
    PKM-ACT where a run has it, and of SASRec as published; nothing unless asked.
    """

    scoring_s: dict[str, float]
    experts: tuple[ExpertUse, ...]
    by_length: dict[str, dict[int, LengthCost]]


def measure(
    comparison: Comparison, log: PreparedLog, *, costs: bool, device: torch.device
) -> Measurements:
    """Measure the main setups' first seeds, and all runs of PKM-ACT's retrieval.

    `costs`: also cost over the history length, on `device`, which takes minutes.
    """
    trained = {
        name: load_model(setup.runs[0].folder / MODEL) for name, setup in comparison.mains.items()
    }
    models: dict[str, NextItemModel] = {}
    for name, one in trained.items():
        assert isinstance(one.model, NextItemModel)
        models[name] = one.model
    return Measurements(
        scoring_s=scoring_s(
            {name: (model, trained[name].config.features) for name, model in models.items()}
        ),
        experts=tuple(
            ExpertUse(setup=setup, counts=tuple(selections(run, log) for run in setup.runs))
            for setup in retrieval_setups(comparison)
        ),
        by_length=costs_by_length(cost_subjects(comparison, log), device=device) if costs else {},
    )


def cost_subjects(comparison: Comparison, log: PreparedLog) -> dict[str, Subject]:
    """Return what is built to measure costs, by the name that its figures begin with."""

    def subject(setup: Setup, *, as_published: bool = False) -> Subject:
        return Subject(
            config=setup.runs[0].config,
            n_rows=FIRST_ROW + log.header.n_items,
            n_users=log.header.n_users,
            as_published=as_published,
        )

    subjects = {name: subject(setup) for name, setup in comparison.mains.items()}
    if BASELINE in comparison.mains:
        subjects[f"{BASELINE}_as_published"] = subject(
            comparison.mains[BASELINE], as_published=True
        )
    for variant in comparison.variants:  # of each model the best first
        form = comparison.differences(variant).get("model.form")
        if form is not None:
            subjects.setdefault(f"{variant.model}_{form[0]}", subject(variant))
    return subjects


def retrieval_setups(comparison: Comparison) -> list[Setup]:
    """Return the setups of PKM-ACT that differ only in how many experts there are or are
    retrieved, the best validation first; of several such families the largest, or the best.
    """
    families: dict[str, list[Setup]] = defaultdict(list)
    for setup in comparison.setups:  # of each model the best first
        if setup.model == SUBJECT and setup.settings["model.product_keys"]:
            kept = {key: value for key, value in setup.settings.items() if key not in _RETRIEVAL}
            families[json.dumps(kept)].append(setup)
    return max(families.values(), key=len, default=[])
