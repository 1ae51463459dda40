"""What an experiments file says, and which arm answers whom.

    salt = "imn-in-november"            # another salt deals the users out anew

    [arms.din]
    bundle = "bundles/din"              # relative to the file
    share = 0.5                         # of the users

    [arms.imn]
    bundle = "bundles/imn"
    share = 0.5
    history_length = 1000               # at most what the bundle reads, which is the default

    [arms.next]
    bundle = "bundles/next"
    share = 0.1                         # scores what a tenth of the users ask, and never answers
    shadow = true

A feature specification and a model are one unit, so an arm is a bundle. An arm with share 0 answers
only requests that name it.
"""

import math
import tomllib
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Annotated

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
)

from contract.files import read_plain

MAX_ARMS = 16
SINGLE_ARM = "main"

_MAX_BYTES = 1 << 20
_SHARES_ADD_UP_TO = 1e-6
# Of the device, next to an arm that answers as many users.
_SHADOW_WEIGHT = 0.1
# An arm for testers only is still given turns.
_LEAST_WEIGHT = 0.01
_HASH_BYTES = 8
# As many as a float holds exactly with a half added: the number below is never 0 and never 1.
_HASH_BITS = 52

ArmName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$", strict=True)]


class ExperimentError(ValueError):
    """An experiments file that cannot be read, or says what cannot be."""


class ArmSettings(BaseModel):
    """One arm. `share`: of the users; `weight`: of the device while several arms are busy."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    bundle: Annotated[Path, Field(strict=False)]
    share: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
    history_length: Annotated[int, Field(ge=1)] | None = None
    shadow: bool = False
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None

    @property
    def device_weight(self) -> float:
        """Return the weight, by default the share; a shadow's is a tenth of that."""
        if self.weight is not None:
            return self.weight
        return max(_LEAST_WEIGHT, self.share) * (_SHADOW_WEIGHT if self.shadow else 1.0)


class Experiment(BaseModel):
    """Arms by name, and the salt of the hash that deals the users out to them."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    salt: Annotated[str, StringConstraints(min_length=1, max_length=128)]
    arms: Annotated[dict[ArmName, ArmSettings], Field(min_length=1, max_length=MAX_ARMS)]

    @field_validator("arms")
    @classmethod
    def _shares_add_up(cls, arms: dict[str, ArmSettings]) -> dict[str, ArmSettings]:
        total = math.fsum(arm.share for arm in arms.values() if not arm.shadow)
        if abs(total - 1) > _SHARES_ADD_UP_TO:
            raise ValueError(
                f"the shares of the arms that answer must add up to 1, they add up to {total:g}"
            )
        return arms

    @classmethod
    def of_bundle(cls, bundle: Path) -> "Experiment":
        """Return an experiment of one arm, for all users."""
        return cls(salt=SINGLE_ARM, arms={SINGLE_ARM: ArmSettings(bundle=bundle, share=1.0)})

    def arm_of(self, user_id: str) -> str:
        """Return the arm that answers a user: the same one in every process and after a restart.

        By weighted rendezvous hashing (Thaler and Ravishankar, "Using Name-Based Mappings to
        Increase Hit Rates", 1998; weights after Schindelhauer and Schomaker, SPAA 2005): an arm
        that grows takes users from the others and moves nobody between them, whatever their order.
        """
        if len(self._answering) == 1:
            return self._answering[0][0]
        name, _, _ = max(
            self._answering, key=lambda arm: -arm[1] / math.log(_uniform(arm[2], user_id))
        )
        return name

    def shadows_of(self, user_id: str) -> list[str]:
        """Return the shadow arms that score what a user asks."""
        return [name for name, share, key in self._shadows if _uniform(key, user_id) < share]

    @cached_property
    def _answering(self) -> list[tuple[str, float, bytes]]:
        return [one for one in self._hashed if not self.arms[one[0]].shadow and one[1] > 0]

    @cached_property
    def _shadows(self) -> list[tuple[str, float, bytes]]:
        return [one for one in self._hashed if self.arms[one[0]].shadow]

    @property
    def _hashed(self) -> list[tuple[str, float, bytes]]:
        """Return name, share and the key of the hash for each arm."""
        return [
            (name, arm.share, blake2b(f"{self.salt}\0{name}".encode()).digest())
            for name, arm in self.arms.items()
        ]


def read_experiment(path: Path) -> Experiment:
    """Return what a file says; ExperimentError names the file and what is wrong with it."""
    return parse_experiment(read_content(path), path)


def read_content(path: Path) -> bytes:
    """Return the bytes of an experiments file; ExperimentError when it cannot be read."""
    try:
        return read_plain(path, max_bytes=_MAX_BYTES, follow_links=True)
    except OSError as error:
        raise ExperimentError(f"{path}: cannot be read: {error.strerror or error}") from error


def parse_experiment(content: bytes, path: Path) -> Experiment:
    """Return what the bytes of the file `path` say; bundles are named relative to its folder."""
    try:
        experiment = Experiment.model_validate(tomllib.loads(content.decode()))
    except ValidationError as error:
        reasons = "; ".join(
            f"{'.'.join(map(str, one['loc'])) or 'the file'}: "
            f"{one['msg'].removeprefix('Value error, ')}"
            for one in error.errors()
        )
        raise ExperimentError(f"{path}: {reasons}") from error
    except (ValueError, RecursionError) as error:
        raise ExperimentError(f"{path}: not TOML: {error}") from error
    folder = path.resolve().parent
    arms = {
        name: arm.model_copy(update={"bundle": _resolved(folder / arm.bundle, name, path)})
        for name, arm in experiment.arms.items()
    }
    return experiment.model_copy(update={"arms": arms})


def _resolved(bundle: Path, arm: str, path: Path) -> Path:
    """Return where a link points: that is what is served, and another target another bundle."""
    try:
        return bundle.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle; NUL
        raise ExperimentError(f"{path}: arms.{arm}.bundle: {error}") from error


def _uniform(key: bytes, user_id: str) -> float:
    """Return a number within (0, 1) that the key and the user determine."""
    digest = blake2b(user_id.encode(), key=key, digest_size=_HASH_BYTES).digest()
    return ((int.from_bytes(digest, "little") >> (8 * _HASH_BYTES - _HASH_BITS)) + 0.5) / (
        1 << _HASH_BITS
    )
