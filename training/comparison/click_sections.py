"""How well click models predict, as sections of text, table and plot."""

from collections.abc import Callable, Sequence

from training.comparison import click_plots as plots
from training.comparison.click_choice import DataSet, Kind, Variant, label, ordered
from training.comparison.click_published import BOOKS_AUC, BOOKS_SIZE
from training.comparison.setups import Setup, Spread
from training.comparison.tables import (
    BUDGET_HEADS,
    Section,
    Table,
    budget,
    differences,
    number,
    said,
    spread_cell,
)

LOG_LOSS = "log_loss"
ECE = "expected_calibration_error"
UNCALIBRATED = "_uncalibrated"
_BUDGET_HEADS = (*BUDGET_HEADS, "run folders")
_BESIDE = (
    "Differences are to the first row of the model. What a training was allowed (seconds, epochs, "
    "patience, batch) may differ beside it, and is then named."
)


def sections(data_sets: Sequence[DataSet]) -> list[Section]:
    """Return AUC of all models, the metrics of main setups, ablations and lengths."""
    made = [_auc(data_sets), *map(_metrics, data_sets)]
    made += [_ablations(data) for data in data_sets if data.of_kind("ablation")]
    made += [_lengths(data) for data in data_sets if data.lengths]
    return made


def later_sections(data_sets: Sequence[DataSet]) -> list[Section]:
    """Return what stands after the measurements: features of items, and all other runs."""
    made = [_side_features(data) for data in data_sets if data.of_kind("side features")]
    made += [_others(data) for data in data_sets if data.of_kind("other")]
    return made


def auc(setup: Setup) -> Spread:
    """Return the test AUC of a setup."""
    spread = setup.test("auc")
    assert spread is not None  # what validation watched is tested, too
    return spread


def _auc(data_sets: Sequence[DataSet]) -> Section:
    rows = [
        (
            label(model),
            *(spread_cell(data.mains[model].test("auc")) if model in data.mains else ""
              for data in data_sets),
            number(BOOKS_AUC.get(model)),
        )
        for model in ordered({*BOOKS_AUC, *(model for data in data_sets for model in data.mains)})
    ]  # fmt: skip
    ceilings = [data.ceiling for data in data_sets]
    text = (
        "AUC over the whole test part of each data set; budgets stand in the tables below. The "
        f"last column repeats table 1 of the IMN paper, Amazon Books with {BOOKS_SIZE}. It does "
        "not say how its negatives are made: its samples are never ours, so its figures tell how "
        "models compare with each other there, not with those of another column."
    )
    if any(ceiling is not None for ceiling in ceilings):
        rows.append(("true probabilities", *map(number, ceilings), ""))
        text += " No model can pass the true click probabilities, which a synthetic log knows."
    heads = ("model", *(data.name for data in data_sets), "Books, IMN paper")
    return Section(title="AUC by model", text=text, table=Table(heads, tuple(rows)))


def _metrics(data: DataSet) -> Section:
    rows = [
        (
            label(model),
            spread_cell(setup.validation),
            *(spread_cell(setup.test(name)) for name in ("auc", "gauc", LOG_LOSS, "brier_score")),
            *map(spread_cell, _calibration_errors(setup)),
            *budget(setup),
        )
        for model, setup in data.mains.items()
    ]
    heads = (
        "model",
        "validation AUC",
        "AUC",
        "GAUC",
        "log-loss",
        "Brier",
        "ECE calibrated",
        "ECE uncalibrated",
        *_BUDGET_HEADS,
    )
    return Section(
        title=f"Metrics on {data.name}",
        text=_samples(data),
        table=Table(heads, tuple(rows)),
    )


def _calibration_errors(setup: Setup) -> tuple[Spread | None, Spread | None]:
    """Return the error with calibration, None where there is none, and without."""
    served, before = setup.test(ECE), setup.test(ECE + UNCALIBRATED)
    return (None, served) if before is None else (served, before)


def _samples(data: DataSet) -> str:
    header = data.log.header
    setups = [*data.bases.values(), *(variant.setup for variant in data.variants)]
    counts = sorted({count for setup in setups for count in setup.values("n_samples")})
    count = " to ".join(f"{count:,.0f}" for count in counts[:1] + counts[1:][-1:])
    settings = setups[0].runs[0].config.data
    if data.samples == "impressions":
        samples = f"{count} labelled impressions"
    else:
        drawn = "uniformly" if settings.negative_sampling == "uniform" else "by popularity"
        samples = (
            f"{count} samples: behaviors, each with {settings.n_negatives} negative"
            f"{'s' if settings.n_negatives > 1 else ''} drawn {drawn} from the catalogue without "
            "the user's past; seed and batch size decide which"
        )
    split = (
        f"Split by time, the newest {settings.test_fraction:.0%} are the test"
        if settings.split == "time"
        else "Each user's last behavior is the test"
    )
    return (
        f"{header.n_users:,} users, {header.n_items:,} items, {header.n_behaviors:,} behaviors. "
        f"Tested on {samples}. {split}. Models read the newest {data.history_length:,} behaviors "
        "before a sample. Log-loss and Brier are of the probabilities as they are served."
    )


def _ablations(data: DataSet) -> Section:
    bars = {
        f"{label(one.model)} {_words(one)}": auc(one.setup).mean - auc(data.bases[one.model]).mean
        for one in data.of_kind("ablation")
    }
    return Section(
        title=f"Ablations on {data.name}",
        text="Each lacks one part of the model above it, or has it otherwise (IMN paper, figure "
        f"3). {_BESIDE}",
        table=_table(data, "ablation", "ablation", _words, of_base="as it is"),
        svg=plots.differences(bars),
    )


def _lengths(data: DataSet) -> Section:
    rows = [
        (label(model), str(length), *_cells(setup, data.bases[model]))
        for model, setups in data.lengths.items()
        for length, setup in setups.items()
    ]
    lines = {
        label(model): {length: auc(setup).mean for length, setup in setups.items()}
        for model, setups in data.lengths.items()
    }
    return Section(
        title=f"AUC over the history length on {data.name}",
        text="A model reads the newest L behaviors of a user (IMN paper, figure 2). Differences "
        f"are to L = {data.history_length} where a model has it.",
        table=Table(("model", "L", *_HEADS), tuple(rows)),
        svg=plots.auc_over_length(lines),
    )


def _side_features(data: DataSet) -> Section:
    def words(variant: Variant) -> str:
        return said(variant.setup.settings["model.item_features"])

    return Section(
        title=f"Features of items on {data.name}",
        text=f"Embeddings of an item's features are added to its own. {_BESIDE}",
        table=_table(data, "side features", "features", words, of_base="none"),
    )


def _others(data: DataSet) -> Section:
    return Section(
        title=f"Other runs on {data.name}",
        text="All other runs, with the settings in which they differ from the first row of their "
        "model.",
        table=_table(data, "other", "setup", lambda _: "other", of_base="main"),
    )


_HEADS = ("validation AUC", "AUC", "difference", "log-loss", "differs in", *_BUDGET_HEADS)


def _table(
    data: DataSet,
    kind: Kind,
    head: str,
    words: Callable[[Variant], str],
    *,
    of_base: str,
) -> Table:
    """Return the variants of one kind, each model's after its base."""
    variants = data.of_kind(kind)
    rows: list[tuple[str, ...]] = []
    for model, base in data.bases.items():
        of_model = [variant for variant in variants if variant.model == model]
        if of_model:
            rows.append((label(model), of_base, *_cells(base, base)))
        rows += [(label(model), words(one), *_cells(one.setup, base)) for one in of_model]
    return Table(("model", head, *_HEADS), tuple(rows))


def _cells(setup: Setup, base: Setup) -> tuple[str, ...]:
    """Return the cells under `_HEADS`."""
    difference = "" if setup is base else f"{auc(setup).mean - auc(base).mean:+.4f}"
    return (
        spread_cell(setup.validation),
        spread_cell(auc(setup)),
        difference,
        spread_cell(setup.test(LOG_LOSS)),
        differences(setup.differences(base)),
        *budget(setup),
    )


def _words(variant: Variant) -> str:
    return variant.name.replace("_", " ")
