"""The report of an A/B run: its figures as JSON, and one page of HTML to read and to look at."""

import argparse
import dataclasses
import io
import json
import math
import re
import sys
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from loadtest.ab.comparison import (
    MISMATCH_LEVEL,
    Arm,
    Bootstrap,
    Comparison,
    Traffic,
    Uplift,
    compare,
)
from loadtest.ab.visits import Run, read_run, read_visits, write_whole
from loadtest.results import table

REPORT_HTML = "report.html"
REPORT_JSON = "report.json"

METRIC_NAMES = {"ctr": "CTR", "uv_ipv": "UV-IPV", "tcic": "TCIC", "ccc": "CCC"}
METRIC_MEANINGS = {
    "ctr": "clicks per item shown",
    "uv_ipv": "item page views (clicks) per visitor",
    "tcic": "distinct items clicked per visitor",
    "ccc": "distinct categories clicked per visitor",
}
# Online, against DIN on 50 behaviors; what the paper says of the others is not known here.
PAPER_CTR_UPLIFT = 0.0729

_TEMPLATE = "report_template.html"
_NONE = "-"
# Colors that stand in an SVG for what the page decides, so that it is readable in light and dark.
_INK = "#010203"
_ARM_COLORS = {f"#f0000{number}": f"var(--arm-{number})" for number in range(4)}
_MARKERS = "osD^vP*X"
_LINES = ("-", "--", "-.", ":")


@dataclass(frozen=True, kw_only=True)
class Report:
    """A run and what it has shown."""

    run: Run
    comparison: Comparison

    @property
    def verdicts(self) -> tuple[str, ...]:
        """One plain sentence for each arm that is compared, or one that says why none is."""
        arms = self.comparison.arms[1:]
        if not arms:
            return (f"{self.comparison.baseline} is the only arm: there is nothing to compare",)
        invalid = self.comparison.sample_ratio.is_mismatched
        prefix = "not valid, the sample ratio is mismatched: " if invalid else ""
        return tuple(prefix + _verdict(arm, self.comparison.arms[0]) for arm in arms)

    def figures(self) -> dict[str, Any]:
        """Return all figures as plain values; None where one is not defined or not finite."""
        content = {
            "started": self.run.started.isoformat(),
            "settings": dict(self.run.settings),
            "verdicts": self.verdicts,
            "is_mismatched": self.comparison.sample_ratio.is_mismatched,
            "n_comparisons": self.comparison.n_comparisons,
            **dataclasses.asdict(self.comparison),
        }
        plain: dict[str, Any] = _plain(content)
        return plain


def write_report(folder: Path, *, bootstrap: Bootstrap | None = None) -> Report:
    """Write `report.json` and `report.html` into the folder of a run, from its two files alone.

    `bootstrap` adds intervals by bootstrap. Raises VisitsError where the folder is not a whole
    run, or where its visits and its settings contradict each other.
    """
    run, visits = read_run(folder), read_visits(folder)
    report = Report(run=run, comparison=compare(visits, run, bootstrap=bootstrap))
    text = json.dumps(report.figures(), indent=2, allow_nan=False) + "\n"
    page = _page(report, folder.resolve().name)
    write_whole(folder / REPORT_JSON, lambda path: path.write_text(text))
    write_whole(folder / REPORT_HTML, lambda path: path.write_text(page))
    return report


def markdown_table(report: Report) -> str:
    """Return arms, metrics and differences as Markdown, in the form of the paper's Table 3."""
    heads = _heads(report)
    return table(heads, [row for rows in _rows(report).values() for row in rows])


def add_command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
) -> None:
    """Add `ab-report FOLDER` to the commands of a program."""
    one = commands.add_parser("ab-report", help="table, verdict and pages of a finished A/B run")
    one.add_argument("folder", type=Path, help="folder of the run; the report goes into it")
    one.add_argument(
        "--bootstrap", type=int, metavar="N", help="add intervals by N replicates, at least 100"
    )
    one.add_argument("--seed", type=int, default=0, help="of the bootstrap; default %(default)s")
    one.set_defaults(run=_run_command)


def summary(report: Report) -> str:
    """Return what a terminal shows of a report: table, what limits it, and verdicts."""
    comparison = report.comparison
    lines = (_comparison_line(comparison), _sample_ratio_line(comparison), _users_line(comparison))
    return "\n\n".join([markdown_table(report), "\n".join(lines), "\n".join(report.verdicts)])


def _run_command(options: argparse.Namespace) -> int:
    bootstrap = (
        Bootstrap(replicates=options.bootstrap, seed=options.seed)
        if options.bootstrap is not None
        else None
    )
    report = write_report(options.folder, bootstrap=bootstrap)
    sys.stdout.write(f"{summary(report)}\n\n{options.folder / REPORT_HTML}\n")
    return int(report.comparison.sample_ratio.is_mismatched)


# Words


def _verdict(arm: Arm, baseline: Arm) -> str:
    change = arm.uplifts["ctr"]
    if math.isnan(change.p_value):
        return f"{arm.name}: CTR cannot be compared: {_reason(arm, baseline)}"
    found = (
        f"{arm.name}: CTR {_relative(change.value)} {_interval(change.low, change.high)}, "
        f"{_p_sentence(change.p_value)}"
    )
    if change.is_significant:
        return f"{found}: significant"
    if math.isinf(change.more_visits):
        return f"{found}: undecided: no number of visits tells arms that are equal apart"
    return (
        f"{found}: undecided: {change.more_visits:,.0f} more visits would tell a difference of "
        f"this size (with a probability of 80 %)"
    )


def _reason(arm: Arm, baseline: Arm) -> str:
    for one in (arm, baseline):
        ctr = one.metrics["ctr"]
        if math.isnan(ctr.value):
            return f"{one.name} showed nothing"
        if ctr.value == 0:
            return f"nobody clicked in {one.name}"
        if math.isnan(ctr.standard_error):
            return f"{one.name} had one visitor only"
    return "no two users differ"


def _sample_ratio_line(comparison: Comparison) -> str:
    found = comparison.sample_ratio
    parts = ", ".join(
        f"{name} {found.observed[name]:,} of {expected:,.0f} expected"
        for name, expected in found.expected.items()
    )
    if math.isnan(found.p_value):
        return f"Sample ratio: not tested, there are not two arms with users: {parts}."
    if found.is_mismatched:
        return (
            f"SAMPLE-RATIO MISMATCH ({_p_sentence(found.p_value)}): users were not assigned as "
            f"stated: {parts}. The differences cannot be trusted."
        )
    return f"Sample ratio as stated ({_p_sentence(found.p_value)}): {parts}."


def _comparison_line(comparison: Comparison) -> str:
    n = comparison.n_comparisons
    if n <= 1:
        return f"{'One arm is' if n else 'No arm is'} compared with {comparison.baseline}."
    return (
        f"{n} arms are compared with {comparison.baseline}; p-values are not corrected for their "
        f"number."
    )


def _users_line(comparison: Comparison) -> str:
    return (
        f"{comparison.n_users:,} visitors. {comparison.n_switched:,} switched: they were met in "
        f"more than one arm and are left out of the comparison. {comparison.n_without_arm:,} "
        f"never got an answer that named an arm."
    )


def _heads(report: Report) -> tuple[str, ...]:
    heads = ("arm", "metric", "raw", "relative", "95 % interval")
    return (*heads, *(("by bootstrap",) if _has_bootstrap(report) else ()), "p")


def _rows(report: Report) -> dict[str, list[tuple[str, ...]]]:
    """Return the rows of each arm, by its name."""
    has_bootstrap = _has_bootstrap(report)
    rows: dict[str, list[tuple[str, ...]]] = {}
    for arm in report.comparison.arms:
        rows[arm.name] = []
        for metric, name in METRIC_NAMES.items():
            estimate, change = arm.metrics[metric], arm.uplifts.get(metric)
            raw = _raw(metric, estimate.value, estimate.standard_error)
            cells = _change_cells(change, has_bootstrap=has_bootstrap)
            rows[arm.name].append((arm.name, name, raw, *cells))
    return rows


def _change_cells(change: Uplift | None, *, has_bootstrap: bool) -> tuple[str, ...]:
    if change is None:
        return ("baseline", _NONE, *((_NONE,) if has_bootstrap else ()), _NONE)
    interval = _interval(change.low, change.high)
    bootstrap = (_interval(change.bootstrap_low, change.bootstrap_high),) if has_bootstrap else ()
    return (_relative(change.value), interval, *bootstrap, _p(change.p_value))


def _has_bootstrap(report: Report) -> bool:
    changes = (change for arm in report.comparison.arms for change in arm.uplifts.values())
    return any(not math.isnan(change.bootstrap_low) for change in changes)


def _raw(metric: str, value: float, standard_error: float) -> str:
    if math.isnan(value):
        return _NONE
    error = "" if math.isnan(standard_error) else f" ± {_amount(metric, standard_error)}"
    return f"{_amount(metric, value)}{error}"


def _amount(metric: str, value: float) -> str:
    return f"{100 * value:.2f} %" if metric == "ctr" else f"{value:.3f}"


def _relative(value: float) -> str:
    return _NONE if math.isnan(value) else f"{100 * value:+.1f} %"


def _interval(low: float, high: float) -> str:
    return _NONE if math.isnan(low) else f"[{_relative(low)}, {_relative(high)}]"


def _p(value: float) -> str:
    if math.isnan(value):
        return _NONE
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"


def _p_sentence(value: float) -> str:
    return f"p {_p(value)}" if value < 0.001 else f"p = {_p(value)}"


def _share(value: float) -> str:
    return _NONE if math.isnan(value) else f"{100 * value:.2f} %"


def _ms(value: float) -> str:
    return _NONE if math.isnan(value) else f"{value:.2f}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


# The page


def _page(report: Report, name: str) -> str:
    comparison = report.comparison
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("loadtest.ab", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(_TEMPLATE).render(
        name=name,
        started=report.run.started.isoformat(sep=" ", timespec="seconds"),
        verdicts=report.verdicts,
        sample_ratio=_sample_ratio_line(comparison),
        is_mismatched=comparison.sample_ratio.is_mismatched,
        mismatch_level=MISMATCH_LEVEL,
        comparison_line=_comparison_line(comparison),
        users_line=_users_line(comparison),
        heads=_heads(report),
        rows=_rows(report),
        meanings=[(METRIC_NAMES[metric], text) for metric, text in METRIC_MEANINGS.items()],
        paper=_relative_exact(PAPER_CTR_UPLIFT),
        power=_power_rows(comparison),
        users=_user_rows(report),
        traffic=[
            *(_traffic_row(arm.name, arm.traffic) for arm in comparison.arms),
            _traffic_row("all requests", comparison.traffic),
        ],
        over_time=_over_time(comparison),
        over_time_rows=_over_time_rows(comparison),
        arm_names=[arm.name for arm in comparison.arms],
        forest=_forest(comparison) if comparison.n_comparisons else None,
        settings=report.run.settings,
    )


def _relative_exact(value: float) -> str:
    return f"{100 * value:+.2f} %"


def _user_rows(report: Report) -> list[tuple[str, ...]]:
    found = report.comparison.sample_ratio
    total = sum(found.observed.values())
    return [
        (
            arm.name,
            _share(report.run.stated_shares[arm.name]),
            _share(arm.n_users / total if total else math.nan),
            f"{arm.n_users:,}",
            f"{found.expected[arm.name]:,.1f}",
            f"{arm.n_visits:,}",
        )
        for arm in report.comparison.arms
    ]


def _power_rows(comparison: Comparison) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for arm in comparison.arms[1:]:
        for metric, name in METRIC_NAMES.items():
            change = arm.uplifts[metric]
            if math.isnan(change.more_visits):
                more = _NONE
            else:
                more = (
                    "no number" if math.isinf(change.more_visits) else f"{change.more_visits:,.0f}"
                )
            rows.append((arm.name, name, _relative(change.detectable), more))
    return rows


def _traffic_row(name: str, traffic: Traffic) -> tuple[str, ...]:
    return (
        name,
        f"{traffic.n_requests:,}",
        _ms(traffic.p50_ms),
        _ms(traffic.p99_ms),
        _ms(traffic.p999_ms),
        _share(traffic.share_in_budget),
        f"{traffic.n_errors:,} ({_share(traffic.error_share)})",
    )


def _over_time_rows(comparison: Comparison) -> list[tuple[str, ...]]:
    bins_of_arms = [arm.ctr_over_time for arm in comparison.arms]
    return [
        (
            f"{bins[0].start_s:.1f} to {bins[0].end_s:.1f}",
            *(
                _NONE if math.isnan(one.ctr) else f"{_share(one.ctr)} {_band(one.low, one.high)}"
                for one in bins
            ),
        )
        for bins in zip(*bins_of_arms, strict=True)
    ]


def _band(low: float, high: float) -> str:
    return "" if math.isnan(low) else f"[{_share(low)}, {_share(high)}]"


# The plots


def _over_time(comparison: Comparison) -> str:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = _ink(figure.subplots())
    styles = zip(cycle(_ARM_COLORS), cycle(_MARKERS), cycle(_LINES), strict=False)
    for arm, (color, marker, line) in zip(comparison.arms, styles, strict=False):
        bins = arm.ctr_over_time
        middles = [(one.start_s + one.end_s) / 2 for one in bins]
        # A line through all bins, broken where nothing was shown.
        axes.plot(
            middles,
            [100 * one.ctr for one in bins],
            color=color,
            marker=marker,
            linestyle=line,
            label=arm.name,
        )
        axes.fill_between(
            middles,
            [100 * one.low for one in bins],
            [100 * one.high for one in bins],
            color=color,
            alpha=0.18,
            linewidth=0,
        )
    axes.set_xlabel("seconds since the run began", color=_INK)
    axes.set_ylabel("CTR, %", color=_INK)
    axes.grid(alpha=0.25, color=_INK)
    axes.legend(labelcolor=_INK, framealpha=0)
    return _svg(figure, "time", "CTR of each arm over time, with 95 % bands")


def _forest(comparison: Comparison) -> str:
    rows = [
        (arm, number, metric)
        for number, arm in enumerate(comparison.arms[1:], start=1)
        for metric in METRIC_NAMES
    ]
    figure = Figure(figsize=(9, 0.9 + 0.32 * len(rows)), layout="constrained")
    axes = _ink(figure.subplots())
    colors = list(_ARM_COLORS)
    for height, (arm, number, metric) in enumerate(rows):
        change = arm.uplifts[metric]
        if math.isnan(change.low):
            continue
        color, value = colors[number % len(colors)], 100 * change.value
        axes.plot([100 * change.low, 100 * change.high], [height, height], color=color, linewidth=2)
        # Filled where the interval leaves out 0.
        face = color if change.is_significant else "none"
        marker = _MARKERS[number % len(_MARKERS)]
        axes.plot([value], [height], color=color, marker=marker, markersize=7, markerfacecolor=face)
    axes.axvline(0, color=_INK, linewidth=1.5)
    labels = [f"{arm.name}  {METRIC_NAMES[metric]}" for arm, _, metric in rows]
    axes.set_yticks(range(len(rows)), labels)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+g}" if value else "0"))
    axes.set_xlabel(f"relative to {comparison.baseline}, %", color=_INK)
    axes.grid(axis="x", alpha=0.25, color=_INK)
    return _svg(figure, "forest", "Difference of each metric, with its 95 % interval")


def _ink(axes: Axes) -> Axes:
    axes.tick_params(colors=_INK)
    for side in axes.spines.values():
        side.set_color(_INK)
    return axes


def _svg(figure: Figure, name: str, title: str) -> str:
    """Return a figure as one element of a page of HTML; `name` keeps its ids apart from others'."""
    buffer = io.StringIO()
    # Text stays text: it can be searched, and a page holds no glyph twice.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=no_metadata, transparent=True)
    drawn = buffer.getvalue()
    drawn = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", drawn[drawn.index("<svg") :])
    drawn = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", drawn)
    for stand_in, color in {_INK: "currentColor", **_ARM_COLORS}.items():
        drawn = drawn.replace(stand_in, color)
    head = f'<svg role="img" aria-labelledby="{name}-title"'
    titled = f'<title id="{name}-title">{title}</title>'
    return re.sub(r"<svg([^>]*)>", rf"{head}\1>{titled}", drawn, count=1)
