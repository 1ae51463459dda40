"""What a batch will take, and how wrong such a prediction can be."""

from collections.abc import Iterable

# What was measured n batches ago weighs (1 - 1/MEMORY)^n: some seconds of a busy service.
_MEMORY = 100.0
# The warm-up's measurements go on to weigh so much together: they tell fixed cost from the cost of
# work while all batches of a service are alike.
_PRIOR_WEIGHT = 5.0
# A batch that took longer than so many times its prediction says something about the machine, not
# about the model: it counts as that many times.
_MAX_SURPRISE = 4.0
# A fixed cost of at most this share of a batch is worth no larger batch.
_FIXED_SHARE = 0.1
# One late answer widens the margin by this share of the largest.
_WIDENING = 0.05


class Margin:
    """Seconds to keep free before deadlines, so that no more than a share of the answers is late.

    By stochastic approximation (Robbins and Monro, 1951): each late answer widens it, each other
    one narrows it a little, and it comes to rest where `late_share` of them are late. While nobody
    is late it narrows to nothing: a request that may come through is not refused for fear.
    """

    def __init__(self, *, late_share: float, largest_s: float) -> None:
        self.value_s = 0.0
        self._late_share = late_share
        self._largest_s = largest_s

    def update(self, *, is_late: bool) -> None:
        """Take one answer."""
        step_s = _WIDENING * self._largest_s * (is_late - self._late_share)
        self.value_s = min(max(0.0, self.value_s + step_s), self._largest_s)


class BatchCost:
    """seconds = fixed + per_work * work, by weighted least squares over the latest batches.

    Neither part is ever negative. Without any measurement everything is predicted to take no
    time, so that nothing is refused on no evidence.
    """

    def __init__(self) -> None:
        self.fixed_s = 0.0
        self.per_work_s = 0.0
        self._tells_parts_apart = False
        self._sums = (0.0, 0.0, 0.0, 0.0, 0.0)
        self._prior = self._sums

    def learn_from_warm_up(self, batches: Iterable[tuple[int, float]]) -> None:
        """Take (work, seconds) of batches whose weight does not fade."""
        measured = [_moments(work, seconds) for work, seconds in batches]
        if measured:
            scale = _PRIOR_WEIGHT / len(measured)
            self._prior = _scaled([sum(column) for column in zip(*measured, strict=True)], scale)
            self._solve()

    def update(self, work: int, seconds: float) -> None:
        """Take what a batch of `work` took."""
        predicted_s = self.predict(work)
        if predicted_s > 0:
            seconds = min(seconds, _MAX_SURPRISE * predicted_s)
        kept = _scaled(self._sums, 1 - 1 / _MEMORY)
        self._sums = _added(kept, _moments(work, seconds))
        self._solve()

    def predict(self, work: int, *, batches: int = 1) -> float:
        """Return the seconds that `work` takes in so many batches."""
        return self.fixed_s * batches + self.per_work_s * work

    def worthwhile_work(self, short_s: float) -> float:
        """Return the work beyond which a larger batch is not worth its while.

        That is where its fixed cost has become a small share of it: everybody in a larger one
        would wait longer and save next to nothing. In a batch of at most `short_s` nobody waits
        for long.
        """
        if not (self._tells_parts_apart and self.per_work_s):
            return float("inf")
        efficient = self.fixed_s * (1 / _FIXED_SHARE - 1) / self.per_work_s
        return max(efficient, (short_s - self.fixed_s) / self.per_work_s)

    def _solve(self) -> None:
        weight, works, squares, seconds, products = _added(self._prior, self._sums)
        spread = weight * squares - works * works
        # Batches that are all of one size (up to rounding) tell only what such a batch takes.
        self._tells_parts_apart = spread > 1e-9 * weight * squares
        if not self._tells_parts_apart:
            self.fixed_s, self.per_work_s = 0.0, seconds / works if works else 0.0
            return
        per_work_s = (weight * products - works * seconds) / spread
        fixed_s = (seconds - per_work_s * works) / weight
        if per_work_s < 0:
            fixed_s, per_work_s = seconds / weight, 0.0
        elif fixed_s < 0:
            fixed_s, per_work_s = 0.0, products / squares
        self.fixed_s, self.per_work_s = fixed_s, per_work_s


_Sums = tuple[float, float, float, float, float]


def _moments(work: int, seconds: float) -> _Sums:
    return (1.0, float(work), float(work) * work, seconds, seconds * work)


def _scaled(sums: Iterable[float], factor: float) -> _Sums:
    weight, works, squares, seconds, products = sums
    return (
        weight * factor,
        works * factor,
        squares * factor,
        seconds * factor,
        products * factor,
    )


def _added(one: _Sums, other: _Sums) -> _Sums:
    return (
        one[0] + other[0],
        one[1] + other[1],
        one[2] + other[2],
        one[3] + other[3],
        one[4] + other[4],
    )
