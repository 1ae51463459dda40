"""What was measured of click models beside how well they predict: costs, and IMN's attention."""

from collections.abc import Sequence

import numpy as np

from training.comparison import click_plots as plots
from training.comparison.click_choice import DataSet, label
from training.comparison.click_costs import TRAINING_BATCH, expected_orders, exponents
from training.comparison.click_measurements import Attention, ClickMeasurements
from training.comparison.click_published import MEMORY_GIB
from training.comparison.click_sections import auc
from training.comparison.costs import N_CANDIDATES
from training.comparison.tables import Section, Table, number, spread_cell

_N_HEAVIEST = 10
_DAY_S = 86_400


def cost_sections(measured: ClickMeasurements) -> list[Section]:
    """Return growth and cost over the history length, nothing where costs were not measured."""
    return [_complexity(measured), _costs(measured)] if measured.costs else []


def attention_sections(data_sets: Sequence[DataSet], measured: ClickMeasurements) -> list[Section]:
    """Return AUC and entropy over the iterations, and the attention itself."""
    shown = [
        (data, measured.attention[data.name])
        for data in data_sets
        if data.name in measured.attention
    ]
    made = [_iterations(data, attention) for data, attention in shown]
    return made + [_walk(data, attention) for data, attention in shown]


def _complexity(measured: ClickMeasurements) -> Section:
    rows = []
    for model, found in exponents(measured.costs).items():
        described, built = expected_orders(measured.subjects[model].config.model)
        rows.append(
            (
                label(model),
                f"{found.training_time:.2f}",
                f"{found.inference_time:.2f}",
                f"{found.memory:.2f}",
                described.time,
                described.memory,
                described.sequential_steps,
                "as described" if built == described else f"{built.time}, {built.memory}",
            )
        )
    return Section(
        title="Complexity",
        text="The subject of table 2 of the IMN paper. Measured: the x of a cost that grows with "
        "L^x, over the three largest lengths of the table below. Expected: orders of time and "
        "memory of a training step, and steps that wait for one another, derived from the models "
        "as their authors describe them, with L behaviors, width d and P iterations; built here: "
        "time and memory where they are others.",
        table=Table(
            (
                "model",
                "x, training time",
                "x, inference time",
                "x, memory",
                "expected time",
                "expected memory",
                "sequential steps",
                "built here",
            ),
            tuple(rows),
        ),
    )


def _costs(measured: ClickMeasurements) -> Section:
    rows = [
        (
            label(model),
            str(length),
            f"{cost.steps_per_s:.2f}",
            f"{cost.score_ms:.2f}",
            f"{cost.step_bytes / 1e6:.1f}",
            _gib(model, length),
        )
        for model, by_length in measured.costs.items()
        for length, cost in by_length.items()
    ]
    (n_rows,) = {subject.n_rows for subject in measured.subjects.values()}
    return Section(
        title="Cost over the length of the history",
        text="Untrained models with the settings of the main setups, in turns, one thread (IMN "
        f"paper, figure 4). Training: steps of {TRAINING_BATCH} full rows with 2 candidates each, "
        f"forward, backward and Adam. Inference: median ms to score {N_CANDIDATES} candidates for "
        "one user with a full history. Memory: peak of what torch holds in one training step, "
        f"beside weights and inputs. Catalogue of {n_rows:,} rows. The last column is what the "
        "code of the paper's authors plots for its own batches on a GPU.",
        table=Table(
            ("model", "L", "training steps/s", "inference ms", "MB", "GiB, IMN paper"), tuple(rows)
        ),
        svg=plots.costs({label(model): costs for model, costs in measured.costs.items()}),
        is_wide=True,
    )


def _gib(model: str, length: int) -> str:
    if model not in MEMORY_GIB:
        return ""
    published = MEMORY_GIB[model]
    if length in published:
        return f"{published[length]:g}"
    return "out of memory" if length > max(published) else ""


def _iterations(data: DataSet, attention: Attention) -> Section:
    n_passes = max(map(len, attention.entropies.values()))
    rows = [
        (
            label(model),
            spread_cell(auc(data.mains[model])),
            *(number(one) for one in by_pass),
            *[""] * (n_passes - len(by_pass)),
            data.mains[model].runs[0].folder.name,
        )
        for model, by_pass in attention.entropies.items()
    ]
    return Section(
        title=f"Iterations on {data.name}",
        text="AUC over the number of passes, and how spread the attention of each pass is: the "
        "mean entropy, in nats, of its weights over the behaviors of test samples, normalised "
        "(IMN paper, figure 5). 0 is all weight on one behavior; "
        f"ln {data.history_length} = {np.log(data.history_length):.2f} the same on every one of a "
        "full history.",
        table=Table(
            ("model", "AUC", *(f"pass {t}" for t in range(1, n_passes + 1)), "entropy of run"),
            tuple(rows),
        ),
        svg=plots.iterations(
            {len(by_pass): auc(data.mains[model]).mean
             for model, by_pass in attention.entropies.items()},
            {len(by_pass): by_pass for by_pass in attention.entropies.values()},
        ),
    )  # fmt: skip


def _walk(data: DataSet, attention: Attention) -> Section:
    walk = attention.walk
    sums_P1 = walk.weights.sum(axis=1, keepdims=True)
    heaviest = np.argsort(-(walk.weights / sums_P1).mean(axis=0), kind="stable")[:_N_HEAVIEST]
    rows = [
        (
            str(one + 1),
            str(walk.item_ids[one]),
            f"{walk.ages_s[one] / _DAY_S:,.2f}",
            *(number(float(weight)) for weight in walk.weights[:, one]),
        )
        for one in heaviest
    ]
    n_passes, n_behaviors = walk.weights.shape
    sums = ", ".join(f"{total:.2f}" for total in sums_P1[:, 0])
    return Section(
        title=f"Attention of {label(attention.walker)} on {data.name}",
        text=f"What the passes read of user {walk.user_id}, who then chose item "
        f"{walk.target_item}: of the moments with the most behaviors the newest. All "
        f"{n_behaviors:,} weights of a pass add up to {sums}; the table has the heaviest by their "
        "mean share.",
        table=Table(
            ("behavior", "item", "days ago", *(f"pass {t}" for t in range(1, n_passes + 1))),
            tuple(rows),
        ),
        svg=plots.heat_map(walk.weights),
        is_wide=True,
    )
