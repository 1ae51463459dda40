"""Metrics, intervals and alarms of an A/B run: by hand where possible, by seeded dice where not."""

import math

import numpy as np
import pytest
from scipy import stats

from loadtest.ab.comparison import (
    LEVEL,
    Bootstrap,
    Estimate,
    bootstrap_interval,
    compare,
    ctr_over_time,
    ratio,
    sample_ratio,
    traffic_of,
    uplift,
    user_sums,
    visits_to_significance,
)
from loadtest.ab.visits import VisitsError
from tests.loadtest.ab.runs import clicks, drawn_visits, failed, frame, run_of, visit

# din: users a and b, 10 items shown to each; imn: users c and d, shown 10 and 5.
BY_HAND = frame(
    visit("a", "din", **clicks(11)),
    visit("a", "din"),
    visit("b", "din", **clicks(11, 12)),
    visit("b", "din", **clicks(11)),
    visit("c", "imn", **clicks(21)),
    visit("c", "imn", **clicks(31)),
    visit("d", "imn", **clicks(41, 42, 43, 44)),
)


class TestByHand:
    def test_metrics_are_ratios_of_sums_over_users(self):
        din, imn = compare(BY_HAND, run_of()).arms
        assert (din.name, din.n_users, din.n_visits) == ("din", 2, 4)
        assert (imn.name, imn.n_users, imn.n_visits) == ("imn", 2, 3)
        values = {name: estimate.value for name, estimate in din.metrics.items()}
        # b clicked item 11 twice: one item, one category.
        assert values == {"ctr": 4 / 20, "uv_ipv": 4 / 2, "tcic": 3 / 2, "ccc": 3 / 2}
        values = {name: estimate.value for name, estimate in imn.metrics.items()}
        # Items 21 and 31 of c are of one category.
        assert values == {"ctr": 6 / 15, "uv_ipv": 6 / 2, "tcic": 6 / 2, "ccc": 5 / 2}

    def test_standard_errors_are_those_of_the_delta_method(self):
        """Residuals of clicks: -1, 1 in din; 2 - 0.4 * 10 and 4 - 0.4 * 5 in imn."""
        din, imn = compare(BY_HAND, run_of()).arms
        assert din.metrics["ctr"].standard_error == pytest.approx(math.sqrt(2 * 2) / 20)
        assert imn.metrics["ctr"].standard_error == pytest.approx(math.sqrt(2 * 8) / 15)
        # A metric per visitor is a mean: clicks 1 and 3, standard deviation sqrt(2).
        assert din.metrics["uv_ipv"].standard_error == pytest.approx(1.0)

    def test_the_difference_is_that_of_the_log_ratio(self):
        """Relative errors 1/2 and 2/3 add up to 5/6 beside log(2)."""
        _, imn = compare(BY_HAND, run_of()).arms
        found = imn.uplifts["ctr"]
        assert found.value == pytest.approx(1.0)
        assert found.low == pytest.approx(2 * math.exp(-1.959964 * 5 / 6) - 1, rel=1e-5)
        assert found.high == pytest.approx(2 * math.exp(1.959964 * 5 / 6) - 1, rel=1e-5)
        assert found.p_value == pytest.approx(0.40554, abs=1e-4)
        assert found.detectable == pytest.approx(math.exp((1.959964 + 0.841621) * 5 / 6) - 1)
        # 7 visits, z = log(2) / (5/6): 7 * ((2.801585 / 0.831777)^2 - 1) = 72.4
        assert found.more_visits == 73

    def test_the_baseline_is_first_and_compared_with_nothing(self):
        baseline, *others = compare(BY_HAND, run_of(baseline="imn")).arms
        assert (baseline.name, baseline.uplifts) == ("imn", {})
        assert [arm.name for arm in others] == ["din"]
        assert others[0].uplifts["ctr"].value == pytest.approx(-0.5)

    def test_arms_that_change_places_turn_the_interval_into_its_inverse(self):
        there = compare(BY_HAND, run_of()).arms[1].uplifts["ctr"]
        back = compare(BY_HAND, run_of(baseline="imn")).arms[1].uplifts["ctr"]
        assert 1 + back.low == pytest.approx(1 / (1 + there.high))
        assert back.p_value == pytest.approx(there.p_value)


def drawn_users(rng, n_users, lift=1.0):
    """Return clicks and items shown of people, of whom those who like to click come more often."""
    liking = rng.beta(1.5, 6.0, size=n_users)
    shown = 5.0 * (1 + rng.poisson(1 + 10 * liking))
    return rng.binomial(shown.astype(int), liking * lift).astype(float), shown


def naive_p(treated, baseline):
    """Return p of the test that takes every impression for an independent draw."""
    (clicks_a, shown_a), (clicks_b, shown_b) = (map(np.sum, arm) for arm in (treated, baseline))
    pooled = (clicks_a + clicks_b) / (shown_a + shown_b)
    error = math.sqrt(pooled * (1 - pooled) * (1 / shown_a + 1 / shown_b))
    return 2 * stats.norm.sf(abs(clicks_a / shown_a - clicks_b / shown_b) / error)


class TestByDice:
    N = 600
    USERS = 200

    def pairs(self, *, lift):
        rng = np.random.default_rng(11)
        for _ in range(self.N):
            yield drawn_users(rng, self.USERS, lift), drawn_users(rng, self.USERS)

    def test_95_percent_of_the_intervals_hold_the_true_difference(self):
        found = [
            uplift(ratio(*treated), ratio(*baseline), n_visits=1)
            for treated, baseline in self.pairs(lift=0.8)
        ]
        n_covered = sum(one.low <= -0.2 <= one.high for one in found)
        low, high = stats.binom.interval(0.999, self.N, 1 - LEVEL)
        assert low <= n_covered <= high

    def test_5_percent_of_equal_arms_differ_and_far_more_where_impressions_are_the_unit(self):
        pairs = list(self.pairs(lift=1.0))
        n_significant = sum(
            uplift(ratio(*treated), ratio(*baseline), n_visits=1).is_significant
            for treated, baseline in pairs
        )
        n_naive = sum(naive_p(treated, baseline) < LEVEL for treated, baseline in pairs)
        low, high = stats.binom.interval(0.999, self.N, LEVEL)
        assert low <= n_significant <= high
        assert n_naive > 4 * high

    def test_the_bootstrap_agrees_with_the_delta_method(self):
        visits = drawn_visits(5, n_users=1200, shares={"din": 0.5, "imn": 0.5}, imn=1.2)
        _, imn = compare(visits, run_of(), bootstrap=Bootstrap(replicates=1500)).arms
        for found in imn.uplifts.values():
            tolerance = 0.08 * (found.high - found.low)
            assert found.bootstrap_low == pytest.approx(found.low, abs=tolerance)
            assert found.bootstrap_high == pytest.approx(found.high, abs=tolerance)


class TestBootstrap:
    def test_depends_on_its_seed_alone(self):
        treated, baseline = (
            user_sums(drawn_visits(seed, n_users=50, shares={"din": 1.0})) for seed in (1, 2)
        )

        def interval(seed):
            return bootstrap_interval(treated, baseline, Bootstrap(replicates=100, seed=seed))

        assert interval(1) == interval(1)
        assert interval(1) != interval(2)

    def test_does_not_depend_on_the_parts_that_it_is_drawn_in(self, monkeypatch):
        sums = user_sums(drawn_visits(1, n_users=50, shares={"din": 1.0}))
        whole = bootstrap_interval(sums, sums, Bootstrap(replicates=100))
        monkeypatch.setattr("loadtest.ab.comparison._BOOTSTRAP_CELLS", 350)
        assert bootstrap_interval(sums, sums, Bootstrap(replicates=100)) == whole

    def test_has_no_interval_where_nobody_clicks(self):
        sums = user_sums(frame(visit("a"), visit("b")))
        intervals = bootstrap_interval(sums, sums, Bootstrap(replicates=100))
        assert all(map(math.isnan, intervals["ctr"]))

    def test_needs_enough_replicates(self):
        with pytest.raises(ValueError, match="replicates must be at least 100, got 99"):
            Bootstrap(replicates=99)


class TestPower:
    @pytest.mark.parametrize("z", [0.3, -1.0, 1.9])
    def test_so_many_more_visits_are_significant_four_times_in_five(self, z):
        """z grows with the root of the visits."""
        n = 10_000
        expected = abs(z) * math.sqrt((n + visits_to_significance(z, n)) / n)
        assert stats.norm.sf(1.959964 - expected) == pytest.approx(0.8, abs=1e-3)

    def test_no_more_are_needed_for_what_is_significant(self):
        assert visits_to_significance(1.96, 1000) == 0
        assert visits_to_significance(-5.0, 1000) == 0
        assert visits_to_significance(1.95, 1000) > 1000

    def test_no_number_tells_equal_arms_apart(self):
        assert visits_to_significance(0.0, 1000) == math.inf


class TestSampleRatio:
    def test_is_a_chi_square_test_by_hand(self):
        """(60 - 50)^2 / 50 twice is 4, with one degree of freedom."""
        found = sample_ratio({"imn": 60, "din": 40}, {"din": 0.5, "imn": 0.5})
        assert found.expected == {"imn": 50, "din": 50}
        assert found.p_value == pytest.approx(math.erfc(math.sqrt(2)))
        assert not found.is_mismatched

    def test_catches_60_to_40_where_50_to_50_is_stated(self):
        visits = drawn_visits(1, n_users=1000, shares={"din": 0.4, "imn": 0.6})
        assert compare(visits, run_of()).sample_ratio.is_mismatched
        assert not compare(visits, run_of(imn=0.6, din=0.4)).sample_ratio.is_mismatched

    def test_is_quiet_where_users_are_assigned_as_stated(self):
        rng = np.random.default_rng(3)
        for n in rng.binomial(1000, 0.5, size=200).tolist():
            assert not sample_ratio({"a": n, "b": 1000 - n}, {"a": 0.5, "b": 0.5}).is_mismatched

    def test_takes_shares_that_add_up_to_one_only_nearly(self):
        shares = {"a": 0.333333, "b": 0.333333, "c": 0.333334}
        found = sample_ratio(dict.fromkeys(shares, 1_000_000), shares)
        assert found.p_value == pytest.approx(1.0, abs=1e-3)

    @pytest.mark.parametrize("observed", [{"a": 10}, {"a": 0, "b": 0}], ids=["one arm", "no users"])
    def test_says_nothing_without_two_arms_of_users(self, observed):
        found = sample_ratio(observed, dict.fromkeys(observed, 1 / len(observed)))
        assert math.isnan(found.p_value)
        assert not found.is_mismatched


class TestTraffic:
    def test_percentiles_are_latencies_that_were_measured(self):
        shuffled = np.random.default_rng(0).permutation(np.arange(1, 1001)) / 1000
        found = traffic_of(frame(*(visit(latency_s=value) for value in shuffled.tolist())))
        assert (found.p50_ms, found.p99_ms, found.p999_ms) == (500, 990, 999)
        assert found.share_in_budget == 0.030

    def test_shares_are_of_all_requests(self):
        visits = frame(visit(latency_s=0.030), visit(latency_s=0.031), failed(), failed(status=0))
        found = traffic_of(visits)
        assert (found.n_requests, found.n_errors) == (4, 2)
        assert (found.error_share, found.share_in_budget) == (0.5, 0.25)
        assert found.p50_ms == 30

    def test_failures_count_for_the_arm_of_their_user_or_for_none(self):
        visits = frame(
            *(visit("a", "imn"), failed("a"), failed("a")),  # known by the other visit
            *(visit("b", "din"), visit("b", "imn"), failed("b")),  # could be either
            failed("c"),  # nobody knows
            failed("d", "din"),  # named in the refusal
        )
        found = compare(visits, run_of())
        din, imn = found.arms
        assert (din.traffic.n_requests, din.traffic.n_errors) == (2, 1)
        assert (imn.traffic.n_requests, imn.traffic.n_errors) == (4, 2)
        assert (found.traffic.n_requests, found.traffic.n_errors) == (8, 5)


class TestUsers:
    def test_who_switched_is_counted_and_left_out(self):
        visits = frame(
            *(visit("a", "din", **clicks(1)), visit("a", "imn", **clicks(1))),
            *(visit("b", "din", **clicks(1)), visit("c", "imn"), failed("d")),
        )
        found = compare(visits, run_of())
        assert (found.n_users, found.n_switched, found.n_without_arm) == (4, 1, 1)
        assert [arm.n_users for arm in found.arms] == [1, 1]
        assert found.sample_ratio.observed == {"din": 1, "imn": 1}
        assert [arm.metrics["uv_ipv"].value for arm in found.arms] == [1.0, 0.0]

    def test_who_was_shown_nothing_is_a_visitor_all_the_same(self):
        visits = frame(visit("a", "din", **clicks(1)), visit("b", "din", n_shown=0))
        metrics = compare(visits, run_of(din=1.0)).arms[0].metrics
        assert metrics["ctr"].value == 1 / 5
        assert [metrics[name].value for name in ("uv_ipv", "tcic", "ccc")] == [0.5, 0.5, 0.5]


class TestCtrOverTime:
    def test_has_equal_bins_with_users_as_the_unit(self):
        visits = frame(
            *(visit("a", at_s=0.0, **clicks(1)), visit("a", at_s=4.9)),
            visit("b", at_s=3.0, **clicks(1, 2, 3)),
            visit("c", at_s=100.0, **clicks(1)),
        )
        bins = ctr_over_time(visits, 100.0)
        assert [(one.start_s, one.end_s) for one in bins] == [(5 * i, 5 * i + 5) for i in range(20)]
        # 4 of 15; residuals 1 - 10 * 4/15 and 3 - 5 * 4/15 are -5/3 and 5/3.
        reach = 1.959964 * math.sqrt(2 * 2 * (5 / 3) ** 2) / 15
        assert bins[0].ctr == 4 / 15
        assert bins[0].low == 0.0
        assert bins[0].high == pytest.approx(4 / 15 + reach, rel=1e-6)
        assert all(math.isnan(one.ctr) for one in bins[1:-1])
        # The last moment belongs to the last bin; one user has no band.
        assert bins[-1].ctr == 1 / 5
        assert math.isnan(bins[-1].low)
        assert math.isnan(bins[-1].high)

    def test_takes_a_run_of_one_moment(self):
        bins = ctr_over_time(frame(visit(at_s=0.0, **clicks(1))), 0.0)
        assert [one.ctr for one in bins if not math.isnan(one.ctr)] == [0.2]


class TestWhatCannotBeCompared:
    def test_an_empty_arm_has_no_values_and_is_a_mismatch(self):
        visits = drawn_visits(1, n_users=30, shares={"din": 1.0})
        found = compare(visits, run_of(), bootstrap=Bootstrap(replicates=100))
        assert found.arms[1].n_users == 0
        assert math.isnan(found.arms[1].metrics["ctr"].value)
        assert math.isnan(found.arms[1].uplifts["ctr"].p_value)
        assert math.isnan(found.arms[1].traffic.error_share)
        assert found.sample_ratio.is_mismatched

    def test_one_visit_has_a_value_and_no_error(self):
        found = compare(frame(visit("a", "din", **clicks(1))), run_of(din=1.0)).arms[0]
        assert found.metrics["ctr"].value == 0.2
        assert math.isnan(found.metrics["ctr"].standard_error)

    def test_no_clicks_are_a_value_and_no_difference(self):
        visits = frame(
            *(visit(user, "din") for user in "ab"), *(visit(user, "imn") for user in "cd")
        )
        found = compare(visits, run_of()).arms[1]
        assert found.metrics["ctr"] == Estimate(value=0.0, standard_error=0.0)
        assert math.isnan(found.uplifts["ctr"].value)

    def test_no_clicks_in_the_treatment_alone_are_a_loss_of_all(self):
        drawn = drawn_users(np.random.default_rng(1), 50)
        found = uplift(Estimate(value=0.0, standard_error=0.0), ratio(*drawn), n_visits=9)
        assert found.value == -1
        assert math.isnan(found.p_value)
        assert not found.is_significant

    def test_users_that_do_not_vary_say_nothing_of_chance(self):
        steady = Estimate(value=0.2, standard_error=0.0)
        found = uplift(steady, Estimate(value=0.1, standard_error=0.0), n_visits=9)
        assert found.value == 1
        assert math.isnan(found.p_value)

    def test_one_arm_only_is_compared_with_nothing(self):
        found = compare(frame(visit("a", "main"), visit("b", "main")), run_of("main", main=1.0))
        assert (len(found.arms), found.n_comparisons) == (1, 0)
        assert math.isnan(found.sample_ratio.p_value)

    def test_three_arms_are_two_comparisons(self):
        shares = {"a": 0.5, "b": 0.25, "c": 0.25}
        found = compare(drawn_visits(1, n_users=60, shares=shares), run_of("b", **shares))
        assert [arm.name for arm in found.arms] == ["b", "a", "c"]
        assert found.n_comparisons == 2

    def test_no_visits_are_an_error(self):
        with pytest.raises(VisitsError, match="the run has no visits"):
            compare(frame(), run_of())

    def test_an_arm_that_is_not_stated_is_an_error(self):
        with pytest.raises(VisitsError, match=r"name the arm old, which .* it states imn, din"):
            compare(frame(visit("a", "old")), run_of())
