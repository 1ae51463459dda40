"""A synthetic world: people whose true click probabilities are known.

People have long interests (a few topics each, over hundreds of behaviors) and *combinations*: a
target item that is likely only when two other items both stand somewhere in the history, far
apart (rum and lime make peppermint likely). A target has several recipes of a base and an accent.
A person has met one base, and accents of several recipes; only the accent that goes with that very
base completes the target. So which behavior matters is told by another behavior, not by the
target alone.

The log it writes is an ordinary one: `user_id, item_id, timestamp, label`, where organic behaviors
carry no label, and `click_probability`, the truth, of every labelled row. The world itself is kept
in a file, for simulations that need to know what its people would do.

Shapes: U users, N items, K topics, T targets, R recipes a target, C candidates.
"""

import tokenize
import zipfile
import zlib
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

_START_S = 1_600_000_000
_MAX_ITEM_ID = 1 << 40
_ACCENT_RATE = 0.5


_LEAST = {
    "users": 1, "topics": 1, "targets": 1, "recipes": 1, "history_length": 1, "visits": 1,
    "candidates": 1, "history_days": 1, "visit_days": 1, "seed": 0,
}  # fmt: skip
# What numpy raises, one way or another, for a file that is damaged.
_DAMAGED = (
    OSError, EOFError, ValueError, TypeError, NotImplementedError, zipfile.BadZipFile, zlib.error,
    tokenize.TokenError,
)  # fmt: skip


class Combination(IntEnum):
    """A person's base of a target is missing, lacks its accent, or stands beside it."""

    ABSENT = 0
    BROKEN = 1
    WHOLE = 2


@dataclass(frozen=True, kw_only=True)
class WorldSettings:
    """Sizes and rates of a world.

    `history_length`: organic behaviors of a person before the first visit. `visits` of
    `candidates` items each follow, `targets_per_visit` of them targets; a person is shown each
    target at most once. `history_days`, `visit_days`: how long both phases last. `recipes`: of
    each target. `memory`: ingredients lie within so many newest organic behaviors.
    """

    users: int = 2000
    items: int = 2000
    topics: int = 20
    targets: int = 12
    recipes: int = 2
    history_length: int = 1000
    memory: int = 900
    visits: int = 6
    candidates: int = 8
    targets_per_visit: int = 2
    history_days: int = 180
    visit_days: int = 30
    seed: int = 1

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 <= self.targets_per_visit <= self.candidates:
            raise ValueError(
                f"targets_per_visit must be within 0 .. candidates ({self.candidates}), "
                f"got {self.targets_per_visit}"
            )
        if self.visits * self.targets_per_visit > self.targets:
            raise ValueError(
                f"{self.visits} visits with {self.targets_per_visit} targets each need as many "
                f"targets, got {self.targets}"
            )
        n_special = self.targets * (1 + 2 * self.recipes)
        if self.items < n_special + self.topics:
            raise ValueError(
                f"items must be at least {n_special + self.topics} for {self.targets} targets with "
                f"their ingredients and {self.topics} topics, got {self.items}"
            )
        n_ingredients = self.targets * (1 + self.recipes)
        if not n_ingredients <= self.memory <= self.history_length:
            raise ValueError(
                f"memory must be within {n_ingredients} (a base and {self.recipes} accents a "
                f"target) .. history_length ({self.history_length}), got {self.memory}"
            )


@dataclass(frozen=True, kw_only=True)
class World:
    """The truth about items and people.

    Item indices: targets first (0 .. T-1), then ingredients, then ordinary items.
    `item_ids` int64 [N]; `topics` int64 [N], -1 for special items; `popularity` float64 [N] within
    the topic; `appeals` float64 [N], what an item adds to the log-odds of a click.
    `ingredients` int64 [T, R, 2], base and accent; `interests` float64 [U, K], rows add up to 1;
    `combinations` int8 [U, T] (`Combination`). `history_end_s`: unix time at which the organic
    histories are over and visits begin.
    """

    item_ids: NDArray[np.int64]
    topics: NDArray[np.int64]
    popularity: NDArray[np.float64]
    appeals: NDArray[np.float64]
    ingredients: NDArray[np.int64]
    interests: NDArray[np.float64]
    combinations: NDArray[np.int8]
    history_end_s: int

    @property
    def n_targets(self) -> int:
        """Return T."""
        return len(self.ingredients)

    def click_probabilities(
        self, users: NDArray[np.int64], items: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """Return the true click probability of item indices for user indices, broadcast."""
        users, items = np.broadcast_arrays(users, items)
        is_target = items < self.n_targets
        interest = self.interests[users, np.maximum(self.topics[items], 0)]
        log_odds = -2.5 + self.appeals[items] + 8.0 * interest
        state = self.combinations[users, np.where(is_target, items, 0)]
        log_odds = np.where(is_target, np.where(state == Combination.WHOLE, 1.5, -2.5), log_odds)
        return 1.0 / (1.0 + np.exp(-log_odds))

    def save(self, path: Path) -> None:
        """Write the world as an .npz of plain arrays, whole or not at all."""
        staging = path.with_name(f".{path.name}.tmp")
        try:
            with staging.open("wb") as file:
                np.savez_compressed(file, **vars(self))
            staging.replace(path)
        finally:
            staging.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> "World":
        """Read what `save` wrote; raises ValueError that names the file otherwise."""
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                found = {name: arrays[name] for name in arrays.files}
                # A number comes back as an array without dimensions.
                world = cls(**{k: v if v.shape else v.item() for k, v in found.items()})
                if not isinstance(world.history_end_s, int):
                    raise ValueError("history_end_s must be a whole number")
                return world
        except _DAMAGED as error:
            raise ValueError(f"{path}: not a world: {error}") from error


def make_world(settings: WorldSettings) -> World:
    """Return the world that `settings.seed` determines."""
    rng = np.random.default_rng([settings.seed, 0])
    n_targets, n_recipes = settings.targets, settings.recipes
    n_special = n_targets * (1 + 2 * n_recipes)
    n_ordinary = settings.items - n_special
    ids = np.unique(rng.integers(1, _MAX_ITEM_ID, size=2 * settings.items))
    item_ids = rng.permutation(ids)[: settings.items]
    topics = np.full(settings.items, -1, dtype=np.int64)
    topics[n_special:] = np.arange(n_ordinary) % settings.topics
    popularity = np.zeros(settings.items)
    popularity[n_special:] = 1.0 / (1 + np.arange(n_ordinary) // settings.topics)  # Zipf's law
    appeals = np.where(topics >= 0, rng.normal(0.0, 0.5, settings.items), 0.0)
    ingredients = n_targets + np.arange(2 * n_targets * n_recipes).reshape(n_targets, n_recipes, 2)
    # Three favourite topics a person, of different weight.
    interests = np.zeros((settings.users, settings.topics))
    favourites = rng.random(interests.shape).argsort(axis=1)[:, : min(3, settings.topics)]
    weights = rng.dirichlet(np.full(favourites.shape[1], 2.0), size=settings.users)
    np.put_along_axis(interests, favourites, weights, axis=1)
    states = [Combination.ABSENT, Combination.BROKEN, Combination.WHOLE]
    combinations = rng.choice(states, p=[0.2, 0.4, 0.4], size=(settings.users, n_targets))
    return World(
        item_ids=item_ids,
        topics=topics,
        popularity=popularity,
        appeals=appeals,
        ingredients=ingredients,
        interests=interests,
        combinations=combinations.astype(np.int8),
        history_end_s=_START_S + settings.history_days * 86_400,
    )


def draw_ordinary(
    world: World, users: NDArray[np.int64], n: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Return the indices of n ordinary items for each user, int64 [len(users), n].

    Half of them come from the person's own topics, as a recall stage would choose; an item may
    stand twice.
    """
    ordinary = np.flatnonzero(world.topics >= 0)
    n_topics = world.interests.shape[1]
    any_topic = rng.choice(ordinary, size=(len(users), n))
    topic = _choose_rows(world.interests[users], n, rng)
    own_topic = ordinary[
        rng.integers(len(ordinary) // n_topics, size=topic.shape) * n_topics + topic
    ]
    return np.where(rng.random(topic.shape) < 0.5, own_topic, any_topic)


def write_log(world: World, settings: WorldSettings, path: Path) -> int:
    """Write the log of a world's people as Parquet, and return its number of rows."""
    frame = pl.concat([_organic(world, settings), _visits(world, settings)])
    frame = frame.sort("user_id", "timestamp", maintain_order=True)
    staging = path.with_name(f".{path.name}.tmp")
    try:
        frame.write_parquet(staging)
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)
    return len(frame)


def _organic(world: World, settings: WorldSettings) -> pl.DataFrame:
    """Return the histories: items of the people's topics, with ingredients put in between."""
    rng = np.random.default_rng([settings.seed, 1])
    n_users, length = settings.users, settings.history_length
    topic_UL = _choose_rows(world.interests, length, rng)
    by_topic = [np.flatnonzero(world.topics == k) for k in range(settings.topics)]
    items_UL = np.empty((n_users, length), dtype=np.int64)
    for topic, members in enumerate(by_topic):
        chosen = topic_UL == topic
        weights = world.popularity[members]
        items_UL[chosen] = rng.choice(members, size=int(chosen.sum()), p=weights / weights.sum())

    ingredients, met = _met_ingredients(world, settings, rng)
    n_places = settings.targets * (1 + settings.recipes)
    places = rng.random((n_users, settings.memory)).argsort(axis=1)[:, :n_places]
    places = (length - settings.memory + places).reshape(ingredients.shape)
    users = np.broadcast_to(np.arange(n_users)[:, None, None], met.shape)
    items_UL[users[met], places[met]] = ingredients[met]
    span_s = settings.history_days * 86_400
    times_UL = _START_S + np.sort(rng.integers(span_s, size=items_UL.shape), axis=1)
    return _frame(
        np.repeat(np.arange(n_users), length), world.item_ids[items_UL], times_UL, None, None
    )


def _met_ingredients(
    world: World, settings: WorldSettings, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return ingredients [U, T, 1 + R] (a base, the accents) and which of them were met."""
    n_users, n_targets = world.combinations.shape
    recipe_UT = rng.integers(settings.recipes, size=(n_users, n_targets))
    base_UT = world.ingredients[np.arange(n_targets), recipe_UT, 0]
    accents_UTR = np.broadcast_to(
        world.ingredients[:, :, 1], (n_users, n_targets, settings.recipes)
    )
    met_UTR = rng.random(accents_UTR.shape) < _ACCENT_RATE
    is_match_UTR = np.arange(settings.recipes) == recipe_UT[:, :, None]
    is_whole_UT1 = (world.combinations == Combination.WHOLE)[:, :, None]
    met_UTR = np.where(is_match_UTR, is_whole_UT1, met_UTR)
    has_base_UT = world.combinations != Combination.ABSENT
    return (
        np.concatenate([base_UT[:, :, None], accents_UTR], axis=2),
        np.concatenate([has_base_UT[:, :, None], met_UTR], axis=2),
    )


def _visits(world: World, settings: WorldSettings) -> pl.DataFrame:
    """Return what people were shown, whether they clicked, and with which probability."""
    rng = np.random.default_rng([settings.seed, 2])
    n_users, n_targets = settings.users, settings.targets_per_visit
    n_ordinary = settings.candidates - n_targets
    order_UT = rng.random((n_users, settings.targets)).argsort(axis=1)
    shown_targets = order_UT[:, : settings.visits * n_targets].reshape(n_users, settings.visits, -1)
    shown_ordinary = draw_ordinary(world, np.arange(n_users), settings.visits * n_ordinary, rng)
    shown_ordinary = shown_ordinary.reshape(n_users, settings.visits, n_ordinary)
    items_UVC = np.concatenate([shown_targets, shown_ordinary], axis=2)
    items_UVC = rng.permuted(items_UVC, axis=2)
    users_U11 = np.arange(n_users)[:, None, None]
    probability_UVC = world.click_probabilities(users_U11, items_UVC)
    clicks_UVC = rng.random(probability_UVC.shape) < probability_UVC
    times_UV = world.history_end_s + np.sort(
        rng.integers(settings.visit_days * 86_400, size=(n_users, settings.visits)), axis=1
    )
    times_UVC = np.broadcast_to(times_UV[:, :, None], items_UVC.shape)
    return _frame(
        np.broadcast_to(users_U11, items_UVC.shape),
        world.item_ids[items_UVC],
        times_UVC,
        clicks_UVC,
        probability_UVC,
    )


def _choose_rows(
    weights_UK: NDArray[np.float64], n: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Return n draws [U, n] from each row's distribution."""
    edges_UK = np.cumsum(weights_UK, axis=1)
    tickets_UN = rng.random((len(weights_UK), n)) * edges_UK[:, -1:]
    # Counting the edges below a ticket is a search in each row, for all rows at once.
    chosen_UN = np.zeros(tickets_UN.shape, dtype=np.int64)
    for edge_U in edges_UK.T[:-1]:
        chosen_UN += tickets_UN >= edge_U[:, None]
    return chosen_UN


def _frame(
    users: NDArray[np.int64],
    items: NDArray[np.int64],
    times: NDArray[np.int64],
    labels: NDArray[np.bool_] | None,
    probabilities: NDArray[np.float64] | None,
) -> pl.DataFrame:
    n = items.size
    return pl.DataFrame(
        {
            "user_id": users.reshape(-1) + 1,
            "item_id": items.reshape(-1),
            "timestamp": times.reshape(-1),
            "label": (
                pl.repeat(None, n, dtype=pl.Int8, eager=True)
                if labels is None
                else labels.reshape(-1).astype(np.int8)
            ),
            "click_probability": (
                pl.repeat(None, n, dtype=pl.Float32, eager=True)
                if probabilities is None
                else probabilities.reshape(-1).astype(np.float32)
            ),
        }
    )
