"""People of the synthetic world who visit, see what was ranked for them, and click.

Shapes: C candidates of a visit, S items shown.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loadtest.world import World, draw_ordinary


@dataclass(frozen=True, kw_only=True)
class Habits:
    """How people visit.

    `candidates`: items to be scored in a visit, all different, `targets_per_visit` of them
    targets. `shown`: the best of them that the person is shown. `eta`: how quickly attention fades
    down the list, see `Visitors.clicks`. `user_skew`: the k-th most active person visits in
    proportion to 1 / k^user_skew (Zipf's law), so 0 makes all alike. `seed`: says who is active.
    Raises ValueError for what cannot be.
    """

    candidates: int = 50
    targets_per_visit: int = 4
    shown: int = 5
    eta: float = 0.3
    user_skew: float = 0.0
    seed: int = 1

    def __post_init__(self) -> None:
        for name, least in (("candidates", 1), ("targets_per_visit", 0), ("shown", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name, most in (("targets_per_visit", self.candidates), ("shown", self.candidates)):
            if getattr(self, name) > most:
                raise ValueError(
                    f"{name} must be at most candidates ({most}), got {getattr(self, name)}"
                )
        for name in ("eta", "user_skew"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Visit:
    """One visit, with all of its chances drawn beforehand.

    So the same draws give the same visits, whatever the service answers. `user`: index of the
    person; `items` int64 [C]: indices of the candidates; `looks` bool [S]: at which positions the
    person looks; `tickets` float64 [S]: a click comes where the ticket lies below its probability.
    """

    user: int
    items: NDArray[np.int64]
    looks: NDArray[np.bool_]
    tickets: NDArray[np.float64]


class Visitors:
    """The people of a world, as visitors with `habits`; raises ValueError where it is too small."""

    def __init__(self, world: World, habits: Habits) -> None:
        n_ordinary = int((world.topics >= 0).sum())
        for name, asked, most in (
            ("targets_per_visit", habits.targets_per_visit, world.n_targets),
            ("ordinary candidates", habits.candidates - habits.targets_per_visit, n_ordinary),
        ):
            if asked > most:
                raise ValueError(f"{name} must be at most {most}, all that this world has: {asked}")
        self._world = world
        self._habits = habits
        ranks = np.random.default_rng([habits.seed, 0]).permutation(len(world.interests)) + 1.0
        self._activity = np.cumsum(ranks**-habits.user_skew)
        self._look_probability = (1.0 + np.arange(habits.shown)) ** -habits.eta

    def visit(self, rng: np.random.Generator) -> Visit:
        """Return the next visit that `rng` makes."""
        ticket = rng.random() * self._activity[-1]
        user = int(np.searchsorted(self._activity, ticket, side="right"))
        n_targets = self._habits.targets_per_visit
        targets = rng.choice(self._world.n_targets, n_targets, replace=False)
        ordinary = self._different_ordinary(user, self._habits.candidates - n_targets, rng)
        return Visit(
            user=user,
            items=rng.permutation(np.concatenate([targets, ordinary])),
            looks=rng.random(self._habits.shown) < self._look_probability,
            tickets=rng.random(self._habits.shown),
        )

    def clicks(self, visit: Visit, scores: NDArray[np.float64]) -> NDArray[np.int64]:
        """Return the indices of the items clicked, from the top of the list down.

        Shown are the items with the highest of `scores` [C]; of equal ones the first asked stands
        first. The person looks at position k (from 0) with probability 1 / (1 + k)^eta, and clicks
        on what is looked at with its true probability: the examination model, with the propensities
        of Joachims, Swaminathan and Schnabel, "Unbiased Learning-to-Rank with Biased Feedback",
        WSDM 2017.
        """
        order = np.argsort(-scores, kind="stable")[: self._habits.shown]
        items = visit.items[order]
        probabilities = self._world.click_probabilities(np.array(visit.user), items)
        return items[visit.looks & (visit.tickets < probabilities)]

    def categories(self, items: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the category of item indices: the topic; each special item is one of its own."""
        topics = self._world.topics[items]
        return np.where(topics >= 0, topics, -(items + 1))

    def _different_ordinary(self, user: int, n: int, rng: np.random.Generator) -> NDArray[np.int64]:
        found = np.empty(0, dtype=np.int64)
        while len(found) < n:
            drawn = draw_ordinary(self._world, np.array([user]), n, rng)[0]
            both = np.concatenate([found, drawn])
            # In the order of drawing: the sorted first ones would be the lowest, not random ones.
            found = both[np.sort(np.unique(both, return_index=True)[1])]
        return found[:n]
