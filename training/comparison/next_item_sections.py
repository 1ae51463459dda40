"""A comparison of next-item models as sections of text, table and plot, and as named figures."""

import re
from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np

from training.comparison import next_item_plots as plots
from training.comparison.costs import N_CANDIDATES, TRAINING_BATCH
from training.comparison.experts import expert_load, key_usage
from training.comparison.next_item_choice import BASELINE, METRICS, SUBJECT, Comparison
from training.comparison.next_item_measurements import ExpertUse, Measurements
from training.comparison.next_item_published import Published
from training.comparison.setups import Setup
from training.comparison.tables import (
    BUDGET_HEADS,
    Section,
    Table,
    budget,
    differences,
    figure_name,
    number,
    spread_cell,
    spread_figures,
)
from training.ranking import Protocol

LABELS = {
    "fpmc": "FPMC",
    "gru4rec": "GRU4Rec",
    "sasrec": "SASRec",
    "bert4rec": "BERT4Rec",
    "linrec": "LinRec",
    "hstu": "HSTU",
    "pkm_act": "PKM-ACT",
}
_COST_LABELS = LABELS | {
    "sasrec_as_published": "SASRec, as published",
    "pkm_act_last": 'PKM-ACT, form "last"',
    "pkm_act_causal": 'PKM-ACT, form "causal"',
}
_RIVALS: dict[Protocol, str] = {
    "full": "the whole catalogue without the items of the user's history",
    "full_history_included": "the whole catalogue",
    "pop100": "negatives by popularity, drawn with replacement, only the target excluded "
    "(as RecBole does)",
    "pop100_history_excluded": "negatives by popularity, drawn without replacement, none of the "
    "user's history (as BERT4Rec does)",
    "uni100": "negatives drawn uniformly without replacement, none of the user's history",
}
_BUDGET_HEADS = (*BUDGET_HEADS, "runs or source")
_LONGEST = 1024


def sections(
    comparison: Comparison, measured: Measurements, published: Sequence[Published]
) -> list[Section]:
    """Return what there is to say, accuracy first."""
    made = [_ranking(comparison, protocol, published) for protocol in comparison.protocols]
    if comparison.variants:
        made.append(_variants(comparison))
    made += _lead(comparison)
    made.append(_trade_off(comparison, measured))
    if measured.experts:
        made += [_key_usage(comparison, measured.experts), _expert_load(measured.experts[0])]
    if measured.by_length:
        made.append(_lengths(measured))
    return made


def figures(comparison: Comparison, measured: Measurements, data: str) -> dict[str, float]:
    """Return all figures by name; `data` begins the names of those that depend on the log."""
    named: dict[str, float] = {}
    for setup in comparison.setups:
        named |= _accuracy_figures(comparison, setup, data)
    for protocol in comparison.protocols:
        for metric in METRICS:
            test = comparison.test_of_lead(f"{protocol}_{metric}")
            if test is not None:
                named[f"{data}_{protocol}_{SUBJECT}_lead_{metric}_p_value"] = test.p_value
    for name, seconds in measured.scoring_s.items():
        named[f"{data}_{name}_scoring_ms"] = 1e3 * seconds
        named[f"{data}_{name}_parameters"] = comparison.mains[name].runs[0].cost.parameters
    for use in measured.experts:
        for layer, usage in enumerate(_usage(use), start=1):
            named[f"{data}_{_figure_name(comparison, use.setup)}_key_usage_layer{layer}"] = usage
    return named | _length_figures(measured)


def _ranking(comparison: Comparison, protocol: Protocol, published: Sequence[Published]) -> Section:
    columns = [f"{protocol}_{metric}" for metric in METRICS]
    rows = [
        (LABELS[name], *(spread_cell(setup.test(column)) for column in columns), *budget(setup))
        for name, setup in comparison.mains.items()
    ]
    others = [one for one in published if one.protocol == protocol]
    rows += [
        (
            f"{one.label} (published)",
            *(number(one.metrics.get(metric)) for metric in METRICS),
            *[""] * (len(_BUDGET_HEADS) - 1),
            one.source,
        )
        for one in others
    ]
    text = f"Each test user's last item is ranked among: {_RIVALS[protocol]}."
    if others:
        text += (
            " Published figures are copied from their sources; order of the ratings, training and "
            "its budget are theirs, not ours."
        )
    if protocol == "pop100" and others:
        text += (
            " The PKM-ACT paper says that it ranks the whole catalogue; its figures lie where "
            "sampled negatives put these models, so they stand here. Which popularity protocol it "
            "used is not known."
        )
    heads = ("model", *map(_head, METRICS), *_BUDGET_HEADS)
    return Section(title=f"Ranking: {protocol}", text=text, table=Table(heads, tuple(rows)))


def _variants(comparison: Comparison) -> Section:
    columns = [f"{p}_{metric}" for p in comparison.protocols for metric in ("ndcg10", "hr10")]
    rows = [
        (
            LABELS[setup.model],
            differences(comparison.differences(setup)) or "(the main setup)",
            spread_cell(setup.validation),
            *(spread_cell(setup.test(column)) for column in columns),
            *budget(setup),
        )
        for setup in _models_with_variants(comparison)
    ]
    heads = (
        "model",
        "differs in",
        f"validation {_head(comparison.metric)}",
        *map(_head, columns),
        *_BUDGET_HEADS,
    )
    return Section(
        title="Variants and ablations",
        text="All other runs, with the settings in which they differ from the main setup of their "
        "model. The main setup has the best validation; the columns to its right are of the test.",
        table=Table(heads, tuple(rows)),
    )


def _models_with_variants(comparison: Comparison) -> Iterator[Setup]:
    for name, main in comparison.mains.items():
        variants = [setup for setup in comparison.variants if setup.model == name]
        if variants:
            yield main
            yield from variants


def _lead(comparison: Comparison) -> Iterator[Section]:
    """Yield a section where there is anything to test."""
    baseline = comparison.best_baseline
    rows = []
    for column in (f"{p}_{metric}" for p in comparison.protocols for metric in METRICS):
        test = comparison.test_of_lead(column)
        if test is None or baseline is None:
            continue
        subject, other = comparison.mains[SUBJECT].test(column), baseline.test(column)
        rows.append(
            (
                _head(column),
                spread_cell(subject),
                spread_cell(other),
                f"{test.t:.2f}",
                f"{test.degrees:.1f}",
                f"{test.p_value:.4f}",
            )
        )
    if not rows or baseline is None:
        return
    label = LABELS[baseline.model]
    yield Section(
        title=f"{LABELS[SUBJECT]} against the best baseline",
        text=f"{label} is the other model with the best validation. Welch's t-test over seeds, "
        "two-sided, not corrected for the number of tests.",
        table=Table(("metric", LABELS[SUBJECT], label, "t", "degrees", "p"), tuple(rows)),
    )


def _trade_off(comparison: Comparison, measured: Measurements) -> Section:
    points = []
    for name, setup in comparison.mains.items():
        quality = setup.test(comparison.metric)
        assert quality is not None  # what validation watched is tested, too
        points.append(
            plots.TradeOff(
                label=LABELS[name],
                quality=quality.mean,
                latency_ms=1e3 * measured.scoring_s[name],
                parameters=setup.runs[0].cost.parameters,
            )
        )
    head = _head(comparison.metric)
    rows = (
        (point.label, number(point.quality), f"{point.latency_ms:.2f}", f"{point.parameters:,}")
        for point in points
    )
    lengths = sorted({s.settings["features.history_length"] for s in comparison.mains.values()})
    return Section(
        title="Quality, latency, parameters",
        text=f"Latency: median ms in which torch scores {N_CANDIDATES} candidates for one user "
        f"with a full history (L = {', '.join(map(str, lengths))}), processor time of one thread, "
        "the models in turns. The area of a bubble shows the parameters.",
        table=Table(("model", head, "ms", "parameters"), tuple(rows)),
        svg=plots.trade_off(points, head),
    )


def _key_usage(comparison: Comparison, experts: Sequence[ExpertUse]) -> Section:
    retrievals = []
    for use in experts:
        quality = use.setup.test(comparison.metric)
        assert quality is not None
        retrievals.append(
            plots.Retrieval(
                n_experts=use.setup.settings["model.keys_per_side"] ** 2,
                n_retrieved=use.setup.settings["model.experts"],
                usage=_usage(use),
                quality=quality.mean,
            )
        )
    retrievals.sort(key=lambda one: (one.n_experts, one.n_retrieved))
    head = _head(comparison.metric)
    n_layers = len(retrievals[0].usage)
    rows = (
        (
            f"{one.n_experts:,}",
            str(one.n_retrieved),
            *(_percent(share) for share in one.usage),
            number(one.quality),
        )
        for one in retrievals
    )
    return Section(
        title="Key usage",
        text="Share of the K experts that serve at least one test user, layer by layer, and "
        f"quality, over K and the k experts retrieved for a user ({LABELS[SUBJECT]} paper, figure "
        "5). Runs that differ in nothing else.",
        table=Table(("K", "k", *_layer_heads(n_layers), head), tuple(rows)),
        svg=plots.key_usage(retrievals, head),
    )


def _expert_load(use: ExpertUse) -> Section:
    load_YE = expert_load(use.counts[0])
    n_layers, n_experts = load_YE.shape
    rows = [
        ("used at least once", *map(_percent, key_usage(use.counts[0]))),
        ("selections by the busiest expert", *map(_percent, load_YE[:, 0])),
    ]
    for share in (0.1, 0.5):
        busiest = max(1, round(share * n_experts))
        rows.append(
            (
                f"selections by the busiest {share:.0%} of the experts",
                *map(_percent, load_YE[:, :busiest].sum(axis=1)),
            )
        )
    run = use.setup.runs[0]
    return Section(
        title="Expert load",
        text=f"Share of all selections that each of the {n_experts:,} experts takes over the test "
        f"users, the busiest first ({LABELS[SUBJECT]} paper, figure 4). Run {run.folder.name}.",
        table=Table(("experts", *_layer_heads(n_layers)), tuple(rows)),
        svg=plots.expert_load(load_YE),
    )


def _lengths(measured: Measurements) -> Section:
    rows = [
        (
            _COST_LABELS[name],
            str(length),
            f"{1e3 * cost.encode_s:.2f}",
            f"{cost.step_bytes / 1e6:.1f}",
        )
        for name, by_length in measured.by_length.items()
        for length, cost in by_length.items()
    ]
    return Section(
        title="Cost over the length of the history",
        text="Untrained models with the settings of the main setups, in turns. Time: median ms to "
        "read one user's history, of a CPU the processor time of one thread. Memory: peak of what "
        f"torch holds in one training step of {TRAINING_BATCH} full rows, forward and backward in "
        "float32 with the run's loss of the next item, beside weights and inputs. Causal models "
        "learn every position of a row, the others the last one "
        f"({LABELS[SUBJECT]} paper, figure 3). All models read what the last position needs alone, "
        "with fused attention; as published: all positions, all attention weights in memory.",
        table=Table(("model", "L", "ms", "MB"), tuple(rows)),
        svg=plots.lengths(
            {_COST_LABELS[name]: costs for name, costs in measured.by_length.items()}
        ),
    )


def _accuracy_figures(comparison: Comparison, setup: Setup, data: str) -> dict[str, float]:
    named: dict[str, float] = {}
    for protocol in comparison.protocols:
        for metric in METRICS:
            name = f"{data}_{protocol}_{_figure_name(comparison, setup)}_{metric}"
            named |= spread_figures(name, setup.test(f"{protocol}_{metric}"))
    return named


def _length_figures(measured: Measurements) -> dict[str, float]:
    named: dict[str, float] = {}
    for name, by_length in measured.by_length.items():
        for length, cost in by_length.items():
            named[f"{name}_encode_ms_L{length}"] = 1e3 * cost.encode_s
            named[f"{name}_training_step_mb_L{length}"] = cost.step_bytes / 1e6
    subjects = [name for name in measured.by_length if name.startswith(SUBJECT)]
    baselines = [name for name in measured.by_length if name.startswith(BASELINE)]
    for name, other in product(subjects, baselines):
        subject, baseline = measured.by_length[name][_LONGEST], measured.by_length[other][_LONGEST]
        pair = f"over_{other}_L{_LONGEST}"
        named[f"{name}_speedup_{pair}"] = baseline.encode_s / subject.encode_s
        named[f"{name}_memory_{pair}"] = subject.step_bytes / baseline.step_bytes
    return named


def _figure_name(comparison: Comparison, setup: Setup) -> str:
    return figure_name(setup.model, comparison.differences(setup))


def _usage(use: ExpertUse) -> tuple[float, ...]:
    """Return each layer's key usage rate, the mean of the seeds."""
    return tuple(np.mean([key_usage(counts_YE) for counts_YE in use.counts], axis=0).tolist())


def _layer_heads(n_layers: int) -> list[str]:
    return [f"layer {layer}" for layer in range(1, n_layers + 1)]


def _head(metric: str) -> str:
    """Return "full NDCG@10" of "full_ndcg10"."""
    protocol, _, name = metric.rpartition("_")
    head = re.sub(r"(\d+)$", r"@\1", name).upper()
    return f"{protocol} {head}".strip()


def _percent(share: float) -> str:
    return f"{share:.1%}"
