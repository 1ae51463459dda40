"""The bodies of `POST /score` that a load sends: which users, how many candidates, which histories.

Users are skewed as those of shops are: user k of n is drawn in proportion to k^-s (Zipf's law;
Breslau et al., "Web caching and Zipf-like distributions", INFOCOM 1999, find s of 0.6 to 0.9 for
the web). Sizes are written as `100`, as `50-500` (uniform, both ends included) or as
`lognormal:MEDIAN:SIGMA:MOST` (rounded; SIGMA of the logarithm; never above MOST).
"""

import argparse
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from contract.errors import ContractError
from contract.records import MAX_ITEM, MIN_ITEM, check_user_id

_CATALOGUE = "catalogue.npy"
_YEAR_S = 365 * 86_400
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


class TrafficError(ValueError):
    """Settings of a traffic that do not fit together, or cannot be understood."""


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """Whole numbers of `least` .. `most`, all equally likely."""

    least: int
    most: int

    def draw(self, rng: np.random.Generator, n: int) -> NDArray[np.int64]:
        """Return n sizes, int64 [n]."""
        return rng.integers(self.least, self.most, size=n, endpoint=True)


@dataclass(frozen=True, kw_only=True)
class LogNormal:
    """Rounded log-normal numbers with the given median, within `least` .. `most`; `sigma` is the
    standard deviation of the logarithm.
    """

    median: float
    sigma: float
    least: int
    most: int

    def draw(self, rng: np.random.Generator, n: int) -> NDArray[np.int64]:
        """Return n sizes, int64 [n]."""
        drawn = np.rint(rng.lognormal(math.log(self.median), self.sigma, n))
        return np.clip(drawn, self.least, self.most).astype(np.int64)


Sizes = Uniform | LogNormal


def parse_sizes(text: str, *, least: int) -> Sizes:
    """Read a distribution of sizes, none of them below `least`; raises TrafficError for others."""
    if (found := _RANGE.fullmatch(text)) is not None:
        low = int(found[1])
        high = int(found[2] or low)
        if least <= low <= high:
            return Uniform(least=low, most=high)
    elif text.startswith("lognormal:"):
        try:
            _, median, sigma, most = text.split(":")
            sizes = LogNormal(median=float(median), sigma=float(sigma), least=least, most=int(most))
        except ValueError:
            pass
        else:
            if 0 < sizes.median <= sizes.most and 0 <= sizes.sigma < math.inf:
                return sizes
    raise TrafficError(
        f"{text!r} is no distribution of sizes from {least} up: expected 100, 50-500 or "
        "lognormal:MEDIAN:SIGMA:MOST"
    )


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What a load asks for.

    `population`: number of users. `user_id`: pattern of their ids, with {} for 0 .. population - 1,
    as they stand in the history store. `zipf`: exponent of the skew, 0 for none; user 0 is the most
    active one. `candidates`: how many an answer scores, distinct ones. `history`: behaviors that a
    request carries itself; None has the service read what it stores. `item_ids`: int64, the items
    of a catalogue; or the lowest and the highest of a range. `arm`: which arm answers, None for the
    one that is the user's. Raises TrafficError.
    """

    population: int
    user_id: str
    zipf: float
    candidates: Sizes
    history: Sizes | None
    item_ids: NDArray[np.int64] | tuple[int, int]
    arm: str | None = None

    def __post_init__(self) -> None:
        if self.population < 1:
            raise TrafficError(f"a population needs at least one user, got {self.population}")
        if self.user_id.count("{}") != 1:
            raise TrafficError(f"a pattern of user ids needs one {{}}, got {self.user_id!r}")
        try:
            check_user_id(self._user(self.population - 1))
        except ContractError as error:
            raise TrafficError(f"pattern {self.user_id!r}: {error}") from error
        if not 0 <= self.zipf < math.inf:
            raise TrafficError(f"the exponent of the skew must be 0 or more, got {self.zipf:g}")
        if self.candidates.most > self._n_items:
            raise TrafficError(
                f"{self.candidates.most} distinct candidates were asked for, but there are only "
                f"{self._n_items} items"
            )

    def bodies(self, n: int, *, seed: int, now: int) -> list[bytes]:
        """Return n bodies, JSON. The same settings, seed and `now` give the same ones.

        `now`: unix time before which inline histories end; they span a year at most. The ranking
        time is left to the service.
        """
        rng = np.random.default_rng(seed)
        weights = np.arange(1, self.population + 1, dtype=np.float64) ** -self.zipf
        users = rng.choice(self.population, n, p=weights / weights.sum()).tolist()
        n_candidates = self.candidates.draw(rng, n).tolist()
        lengths = [None] * n if self.history is None else self.history.draw(rng, n).tolist()
        return [
            self._body(rng, user, count, length, now)
            for user, count, length in zip(users, n_candidates, lengths, strict=True)
        ]

    def _body(
        self, rng: np.random.Generator, user: int, count: int, length: int | None, now: int
    ) -> bytes:
        body: dict[str, Any] = {
            "user_id": self._user(user),
            "candidates": self._items(rng, count, replace=False),
        }
        if length is not None:
            times = np.sort(now - rng.integers(1, _YEAR_S, length)).tolist()
            items = self._items(rng, length, replace=True)
            body["history"] = [
                {"item_id": item, "time": time} for item, time in zip(items, times, strict=True)
            ]
        if self.arm is not None:
            body["arm"] = self.arm
        return json.dumps(body).encode()

    def _user(self, number: int) -> str:
        return self.user_id.replace("{}", str(number))

    @property
    def _n_items(self) -> int:
        if isinstance(self.item_ids, tuple):
            low, high = self.item_ids
            return high - low + 1
        return len(self.item_ids)

    def _items(self, rng: np.random.Generator, n: int, *, replace: bool) -> list[int]:
        rows = rng.choice(self._n_items, n, replace=replace, shuffle=False)
        chosen = (
            rows + self.item_ids[0] if isinstance(self.item_ids, tuple) else self.item_ids[rows]
        )
        items: list[int] = chosen.tolist()
        return items


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the settings of a traffic; `traffic_of` reads them."""
    parser.add_argument("--population", type=int, default=500, help="users (default %(default)s)")
    parser.add_argument(
        "--user-id", default="user-{}", help="pattern of their ids (default %(default)s)"
    )
    parser.add_argument(
        "--zipf", type=float, default=0.0, help="exponent of the users' skew (default: none)"
    )
    parser.add_argument(
        "--candidates",
        default="100",
        help="how many a request: 100, 50-500 or lognormal:MEDIAN:SIGMA:MOST (default 100)",
    )
    parser.add_argument(
        "--history",
        help="behaviors that a request carries, written in the same way; "
        "unless given, the service reads what it stores",
    )
    parser.add_argument(
        "--catalogue",
        help="a bundle or a .npy file, whose item ids are asked for; a range unless given",
    )
    parser.add_argument(
        "--item-ids", default="1-100000", help="that range, LOWEST-HIGHEST (default %(default)s)"
    )
    parser.add_argument("--arm", help="arm that answers (default: the user's own)")


def traffic_of(options: argparse.Namespace) -> Traffic:
    """Return the traffic that the flags of `add_flags` describe; raises TrafficError."""
    return Traffic(
        population=options.population,
        user_id=options.user_id,
        zipf=options.zipf,
        candidates=parse_sizes(options.candidates, least=1),
        # Locust's web UI sends an empty field for a setting that was not made.
        history=parse_sizes(options.history, least=0) if options.history else None,
        item_ids=(
            read_catalogue(Path(options.catalogue))
            if options.catalogue
            else _item_range(options.item_ids)
        ),
        arm=options.arm or None,
    )


def read_catalogue(path: Path) -> NDArray[np.int64]:
    """Return the item ids of a bundle or of a .npy file, int64 [N]; raises TrafficError."""
    file = path / _CATALOGUE if path.is_dir() else path
    try:
        item_ids = np.load(file, allow_pickle=False)
    except (OSError, EOFError, ValueError) as error:
        raise TrafficError(f"{file} is not readable as a catalogue: {error}") from error
    if (
        not isinstance(item_ids, np.ndarray)
        or item_ids.dtype != np.int64
        or item_ids.ndim != 1
        or not len(item_ids)
    ):
        raise TrafficError(f"{file} is no catalogue: expected a vector of int64 item ids")
    return item_ids


def _item_range(text: str) -> tuple[int, int]:
    found = _RANGE.fullmatch(text)
    low, high = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not MIN_ITEM <= low <= high <= MAX_ITEM:
        raise TrafficError(
            f"{text!r} is no range of item ids: expected LOWEST-HIGHEST within "
            f"{MIN_ITEM} .. {MAX_ITEM}"
        )
    return low, high
