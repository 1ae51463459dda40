"""What an A/B run has shown: metrics of the arms, their difference, and whether to believe it.

The unit of analysis is the user. Shares and metrics of one user hang together (one likes to click,
another does not), so that impressions are no independent draws: a test that takes them for such
finds far more differences than there are. Every metric is a ratio of two sums over users, and its
standard error is that of the delta method (Deng, Knoblich and Lu, "Applying the Delta Method in
Metric Analytics", KDD 2018).

A value that is not defined is NaN: nothing was shown, too few users, no click at all.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy import stats

from loadtest.ab.visits import OK_STATUS, Run, VisitsError

BUDGET_S = 0.030
LEVEL = 0.05
POWER = 0.80
# Fabijan et al., "Diagnosing Sample Ratio Mismatch in Online Controlled Experiments", KDD 2019: a
# run with a mismatch is worthless, so that the alarm must hardly ever be false.
MISMATCH_LEVEL = 0.001

# Numerator and denominator of each metric, columns of `user_sums`.
METRICS: Mapping[str, tuple[str, str]] = {
    "ctr": ("clicks", "shown"),
    "uv_ipv": ("clicks", "visitors"),
    "tcic": ("items", "visitors"),
    "ccc": ("categories", "visitors"),
}

_SUMS = ("visitors", "shown", "clicks", "items", "categories")
_Z_LEVEL = float(stats.norm.isf(LEVEL / 2))
_Z_POWER = _Z_LEVEL + float(stats.norm.ppf(POWER))
_TIME_BINS = 20
_BOOTSTRAP_CELLS = 4_000_000


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A metric of an arm and its standard error; in the metric's unit."""

    value: float
    standard_error: float


@dataclass(frozen=True, kw_only=True)
class Uplift:
    """How an arm's metric differs from the baseline's; relative, 0.07 is 7 % more.

    `low`, `high`: bounds of the 95 % interval. `p_value`: two-sided; below 0.05 exactly where the
    interval leaves out 0. `detectable`: the smallest uplift that a run of this size finds
    significant with a probability of 80 %. `more_visits`: see `visits_to_significance`.
    `bootstrap_low`, `bootstrap_high`: the interval by bootstrap, NaN where none was asked for.
    """

    value: float = math.nan
    low: float = math.nan
    high: float = math.nan
    p_value: float = math.nan
    detectable: float = math.nan
    more_visits: float = math.nan
    bootstrap_low: float = math.nan
    bootstrap_high: float = math.nan

    @property
    def is_significant(self) -> bool:
        """Whether p is below 0.05; not where it is not defined."""
        return self.p_value < LEVEL


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Requests and how they were answered.

    `error_share`: share of all requests with another status than 200. `p50_ms`, `p99_ms`,
    `p999_ms`: milliseconds that so many of the requests answered with 200 did not exceed, nearest
    rank, each of them a latency that was measured. `share_in_budget`: share of all requests
    answered with 200 within 30 ms.
    """

    n_requests: int
    n_errors: int
    error_share: float
    p50_ms: float
    p99_ms: float
    p999_ms: float
    share_in_budget: float


@dataclass(frozen=True, kw_only=True)
class TimeBin:
    """CTR of the visits sent in [start_s, end_s) and its 95 % band, cut at 0 and 1."""

    start_s: float
    end_s: float
    ctr: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One arm. `n_users`, `n_visits` and `metrics` are of the compared users, `traffic` is of all.

    `uplifts`: by metric; none for the baseline.
    """

    name: str
    n_users: int
    n_visits: int
    metrics: Mapping[str, Estimate]
    uplifts: Mapping[str, Uplift]
    traffic: Traffic
    ctr_over_time: tuple[TimeBin, ...]


@dataclass(frozen=True, kw_only=True)
class SampleRatio:
    """Users of each arm against the stated shares, by a chi-square test.

    `p_value` is NaN where there are no users, or only one arm.
    """

    observed: Mapping[str, int]
    expected: Mapping[str, float]
    p_value: float

    @property
    def is_mismatched(self) -> bool:
        """Whether the assignment was not what was stated (p < 0.001): the run is not valid."""
        return self.p_value < MISMATCH_LEVEL


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The result of a run.

    `arms`: the baseline first, then in the order of the stated shares. `traffic`: all requests.
    `n_users`: all visitors; of these, `n_switched` were met in more than one arm and
    `n_without_arm` in none (no answer named one): neither are compared. `n_comparisons`: arms
    compared with the baseline; their p-values are not corrected for their number.
    """

    baseline: str
    arms: tuple[Arm, ...]
    sample_ratio: SampleRatio
    traffic: Traffic
    n_users: int
    n_switched: int
    n_without_arm: int

    @property
    def n_comparisons(self) -> int:
        """How many arms are compared with the baseline."""
        return len(self.arms) - 1


@dataclass(frozen=True, kw_only=True)
class Bootstrap:
    """`replicates`: how often users are drawn again, at least 100. `seed`: of the draws."""

    replicates: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.replicates < 100:
            raise ValueError(f"replicates must be at least 100, got {self.replicates}")


def compare(visits: pl.DataFrame, run: Run, *, bootstrap: Bootstrap | None = None) -> Comparison:
    """Compare every arm with the baseline.

    `visits`: as in `visits.SCHEMA`. A failed visit whose answer named no arm counts for the arm of
    the same user's other visits, where these know one only. Raises VisitsError where there are no
    visits, or where one names an arm that `run` does not state.
    """
    if visits.is_empty():
        raise VisitsError("the run has no visits")
    named = set(visits["arm"].drop_nulls().to_list())
    if unknown := sorted(named - set(run.stated_shares)):
        raise VisitsError(
            f"visits name the arm {', '.join(unknown)}, which stated_shares does not: "
            f"it states {', '.join(run.stated_shares)}"
        )
    users = visits.group_by("user_id").agg(
        pl.col("arm").drop_nulls().n_unique().alias("n_arms"),
        pl.col("arm").drop_nulls().first().alias("user_arm"),
    )
    settled = users.filter(pl.col("n_arms") == 1).select("user_id", "user_arm")
    visits = visits.join(settled, on="user_id", how="left", maintain_order="left").with_columns(
        pl.coalesce("arm", "user_arm").alias("arm")
    )
    compared = visits.filter(pl.col("user_arm").is_not_null())

    names = [run.baseline, *(name for name in run.stated_shares if name != run.baseline)]
    sums = {name: user_sums(compared.filter(pl.col("user_arm") == name)) for name in names}
    end_s = float(visits.select(pl.col("at_s").max()).item())
    arms = [
        Arm(
            name=name,
            n_users=len(sums[name]),
            n_visits=int(sums[name]["visits"].sum()),
            metrics=arm_metrics(sums[name]),
            uplifts={},
            traffic=traffic_of(visits.filter(pl.col("arm") == name)),
            ctr_over_time=ctr_over_time(compared.filter(pl.col("user_arm") == name), end_s),
        )
        for name in names
    ]
    return Comparison(
        baseline=run.baseline,
        arms=(arms[0], *(_compared(arm, arms[0], sums, bootstrap) for arm in arms[1:])),
        sample_ratio=sample_ratio({arm.name: arm.n_users for arm in arms}, run.stated_shares),
        traffic=traffic_of(visits),
        n_users=len(users),
        n_switched=int((users["n_arms"] > 1).sum()),
        n_without_arm=int((users["n_arms"] == 0).sum()),
    )


def user_sums(visits: pl.DataFrame) -> pl.DataFrame:
    """Return one row a user, by user id: `visits`, and the sums that METRICS are ratios of.

    `shown` items and `clicks` are counted, `items` and `categories` are the distinct ones clicked,
    `visitors` is 1.
    """
    return (
        visits.group_by("user_id")
        .agg(
            pl.len().cast(pl.Float64).alias("visits"),
            pl.lit(1.0).alias("visitors"),
            pl.col("n_shown").sum().cast(pl.Float64).alias("shown"),
            pl.col("clicked_items").list.len().sum().cast(pl.Float64).alias("clicks"),
            _distinct("clicked_items").alias("items"),
            _distinct("clicked_categories").alias("categories"),
        )
        .sort("user_id")
    )


def arm_metrics(sums: pl.DataFrame) -> dict[str, Estimate]:
    """Return every metric of the users of one arm, from their `user_sums`."""
    return {
        metric: ratio(sums[above].to_numpy(), sums[below].to_numpy())
        for metric, (above, below) in METRICS.items()
    }


def ratio(numerators: NDArray[np.float64], denominators: NDArray[np.float64]) -> Estimate:
    """Return the ratio of two sums over n users, float64 [n] both, by the delta method.

    With R = sum(Y) / sum(X), the variance is that of the mean of (Y - R X) / mean(X) over users,
    the first-order expansion of Deng, Knoblich and Lu (2018), section 2. The standard error needs
    two users.

    >>> ratio(np.array([1.0, 3.0]), np.array([10.0, 10.0]))
    Estimate(value=0.2, standard_error=0.1)
    """
    n, total = len(numerators), float(denominators.sum())
    if total == 0:
        return Estimate(value=math.nan, standard_error=math.nan)
    value = float(numerators.sum()) / total
    if n < 2:
        return Estimate(value=value, standard_error=math.nan)
    residuals = numerators - value * denominators
    variance = float(residuals @ residuals) / (n - 1)
    return Estimate(value=value, standard_error=math.sqrt(n * variance) / total)


def uplift(treated: Estimate, baseline: Estimate, *, n_visits: int) -> Uplift:
    """Return the relative difference of two independent arms; `n_visits` made in both together.

    The interval is that of log(treated / baseline) by the delta method, carried back: it cannot
    fall below -100 %, it turns into its own inverse when the arms change places, and the test
    belongs to it. Of that nothing is defined where one of the values is 0, or where neither arm
    varies and nothing says how much chance there is.
    """
    if not baseline.value > 0:
        return Uplift()
    value = treated.value / baseline.value - 1
    if not treated.value > 0:
        return Uplift(value=value)
    log_ratio = math.log(treated.value / baseline.value)
    error = math.hypot(
        treated.standard_error / treated.value, baseline.standard_error / baseline.value
    )
    if not error > 0:
        return Uplift(value=value)
    z = log_ratio / error
    return Uplift(
        value=value,
        low=math.expm1(log_ratio - _Z_LEVEL * error),
        high=math.expm1(log_ratio + _Z_LEVEL * error),
        p_value=2 * float(stats.norm.sf(abs(z))),
        detectable=math.expm1(_Z_POWER * error),
        more_visits=visits_to_significance(z, n_visits),
    )


def visits_to_significance(z: float, n_visits: int) -> float:
    """Return how many more visits until the present difference would be significant.

    That is: the visits, in addition to the `n_visits` made, after which a run finds a true
    difference of the present size significant at 5 % with a probability of 80 %, taken that the
    further visits come from further users of the same kind (then z grows with the root of their
    number; visits of the same users again teach less). A whole number; 0 where the difference is
    significant already, inf where there is none. `z`: the difference in standard errors.
    """
    if abs(z) > _Z_LEVEL:
        return 0.0
    if z == 0:
        return math.inf
    return float(math.ceil(n_visits * ((_Z_POWER / z) ** 2 - 1)))


def bootstrap_interval(
    treated: pl.DataFrame, baseline: pl.DataFrame, bootstrap: Bootstrap
) -> dict[str, tuple[float, float]]:
    """Return the 95 % percentile interval of the uplift of each metric, drawing users again.

    Each user enters a replicate Poisson(1) times (Chamandy et al., "Estimating Uncertainty for
    Massive Data Streams", 2012). `treated`, `baseline`: `user_sums`. NaN where replicates have
    no value.
    """
    rng = np.random.default_rng(bootstrap.seed)
    drawn_treated = _replicates(treated, rng, bootstrap.replicates)
    drawn_baseline = _replicates(baseline, rng, bootstrap.replicates)
    tails = (100 * LEVEL / 2, 100 - 100 * LEVEL / 2)
    intervals = {}
    for metric, (above, below) in METRICS.items():
        a, b = _SUMS.index(above), _SUMS.index(below)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = (drawn_treated[:, a] / drawn_treated[:, b]) / (
                drawn_baseline[:, a] / drawn_baseline[:, b]
            )
        if np.isfinite(ratios).all():
            low, high = np.percentile(ratios - 1, tails)
            intervals[metric] = (float(low), float(high))
        else:
            intervals[metric] = (math.nan, math.nan)
    return intervals


def sample_ratio(observed: Mapping[str, int], stated_shares: Mapping[str, float]) -> SampleRatio:
    """Test the numbers of users of the arms against `stated_shares`, which add up to 1."""
    n = sum(observed.values())
    expected = {name: n * stated_shares[name] for name in observed}
    if n == 0 or len(observed) < 2:
        p_value = math.nan
    else:
        # Shares were written as decimals: the sums must agree to the last bits all the same.
        frequencies = np.array(list(expected.values()))
        frequencies *= n / frequencies.sum()
        p_value = float(stats.chisquare(list(observed.values()), frequencies).pvalue)
    return SampleRatio(observed=dict(observed), expected=expected, p_value=p_value)


def traffic_of(visits: pl.DataFrame) -> Traffic:
    """Return how these visits were answered."""
    n = len(visits)
    latencies_s = visits.filter(pl.col("status") == OK_STATUS)["latency_s"].to_numpy()
    n_errors = n - len(latencies_s)
    # The subtrahend keeps 99.9 % of 1,000 at rank 999 whatever the product's last bit is.
    percents = np.array([50.0, 99.0, 99.9]) - 1e-9
    p50_s, p99_s, p999_s = (
        np.percentile(latencies_s, percents, method="inverted_cdf").tolist()
        if len(latencies_s)
        else [math.nan] * 3
    )
    in_budget = int(np.count_nonzero(latencies_s <= BUDGET_S))
    return Traffic(
        n_requests=n,
        n_errors=n_errors,
        error_share=n_errors / n if n else math.nan,
        p50_ms=1000 * p50_s,
        p99_ms=1000 * p99_s,
        p999_ms=1000 * p999_s,
        share_in_budget=in_budget / n if n else math.nan,
    )


def ctr_over_time(visits: pl.DataFrame, end_s: float) -> tuple[TimeBin, ...]:
    """Return the CTR of these visits in 20 equal bins of [0, end_s]; users are the unit in each."""
    # A run of one moment still has a bin to put it in.
    width_s = end_s / _TIME_BINS or 1.0
    numbers = (pl.col("at_s") / width_s).floor().clip(0, _TIME_BINS - 1).cast(pl.Int64)
    parts = {
        int(number): part
        for (number,), part in visits.with_columns(numbers.alias("bin")).group_by("bin")
    }
    bins = []
    for number in range(_TIME_BINS):
        sums = user_sums(parts.get(number, visits.clear()))
        ctr = ratio(sums["clicks"].to_numpy(), sums["shown"].to_numpy())
        reach = _Z_LEVEL * ctr.standard_error
        bins.append(
            TimeBin(
                start_s=number * width_s,
                end_s=(number + 1) * width_s,
                ctr=ctr.value,
                # NaN stays: max and min of Python return their first argument then.
                low=max(ctr.value - reach, 0.0),
                high=min(ctr.value + reach, 1.0),
            )
        )
    return tuple(bins)


def _compared(
    arm: Arm, baseline: Arm, sums: Mapping[str, pl.DataFrame], bootstrap: Bootstrap | None
) -> Arm:
    n_visits = arm.n_visits + baseline.n_visits
    uplifts = {
        metric: uplift(estimate, baseline.metrics[metric], n_visits=n_visits)
        for metric, estimate in arm.metrics.items()
    }
    if bootstrap is not None:
        intervals = bootstrap_interval(sums[arm.name], sums[baseline.name], bootstrap)
        for metric, (low, high) in intervals.items():
            uplifts[metric] = replace(uplifts[metric], bootstrap_low=low, bootstrap_high=high)
    return replace(arm, uplifts=uplifts)


def _replicates(
    sums: pl.DataFrame, rng: np.random.Generator, n_replicates: int
) -> NDArray[np.float64]:
    """Return the sums of every replicate, [n_replicates, len(_SUMS)]."""
    per_user = sums.select(_SUMS).to_numpy()
    drawn = np.empty((n_replicates, len(_SUMS)))
    # In parts: weights of all replicates at once would not fit into memory for a large run.
    step = max(_BOOTSTRAP_CELLS // max(len(per_user), 1), 1)
    for start in range(0, n_replicates, step):
        rows = min(step, n_replicates - start)
        weights = rng.poisson(1.0, size=(rows, len(per_user)))
        drawn[start : start + rows] = weights @ per_user
    return drawn


def _distinct(column: str) -> pl.Expr:
    return pl.col(column).explode().drop_nulls().n_unique().cast(pl.Float64)
