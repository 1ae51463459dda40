"""API keys: what the file of keys says, and how a key is made and recognised.

    [keys.shop-2026-11]
    sha256 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
    roles = ["score", "events"]
    expires = 2027-05-01T00:00:00Z      # without it, never
    requests_per_s = 200.0              # without it, as many as come
    burst = 400                         # that may come at once; by default those of one second

The file holds digests only: whoever reads it cannot call the service with it. A key is 256 random
bits, so its plain SHA-256 is enough; docs/decisions says why.
"""

import hmac
import secrets
import tomllib
from collections.abc import Collection, Iterable
from datetime import UTC, date, datetime
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

Role = Literal["score", "events", "read", "metrics", "admin"]

# Each request is compared with all of them.
MAX_KEYS = 64
# TOML promises no larger number.
_MAX_BURST = 2**63 - 1
# One a day: of less nobody could be told when to come again.
_LEAST_PER_S = 1 / 86_400
# By it people and scanners of secrets recognise what has got where it should not be.
KEY_PREFIX = "mneme_"
_KEY_BYTES = 32

KeyName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$", strict=True)]
_NAME = TypeAdapter(KeyName)
_T = TypeVar("_T")


class ApiKeysError(ValueError):
    """A file of keys that cannot be read, or a key that cannot be."""


class ApiKey(BaseModel):
    """Who may do what. `sha256`: the digest of the key, in hexadecimal digits.

    `requests_per_s`: of all workers together; None is no limit.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)

    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    roles: Annotated[frozenset[Role], Field(min_length=1, strict=False)]
    expires: AwareDatetime | None = None
    requests_per_s: Annotated[float, Field(ge=_LEAST_PER_S, allow_inf_nan=False)] | None = None
    burst: Annotated[int, Field(ge=1, le=_MAX_BURST)] | None = None

    @field_validator("expires", mode="before")
    @classmethod
    def _begins_a_day(cls, expires: object) -> object:
        """TOML knows dates, too: a key ends when its day begins, in UTC."""
        if isinstance(expires, date) and not isinstance(expires, datetime):
            return datetime(expires.year, expires.month, expires.day, tzinfo=UTC)
        return expires

    @model_validator(mode="after")
    def _bursts_of_something(self) -> "ApiKey":
        if self.burst is not None and self.requests_per_s is None:
            raise ValueError("burst says something only beside requests_per_s")
        return self


class ApiKeys(BaseModel):
    """Keys by name."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)

    keys: Annotated[dict[KeyName, ApiKey], Field(min_length=1, max_length=MAX_KEYS)]

    @field_validator("keys")
    @classmethod
    def _each_is_another(cls, keys: dict[str, ApiKey]) -> dict[str, ApiKey]:
        names: dict[str, str] = {}
        for name, key in keys.items():
            if (other := names.setdefault(key.sha256, name)) != name:
                raise ValueError(f"{other} and {name} are the same key")
        return keys


def read_keys(path: Path) -> ApiKeys:
    """Return what a file says; ApiKeysError names the file and what is wrong with it."""
    return parse_keys(read_content(path), path)


def read_content(path: Path) -> bytes:
    """Return the bytes of a file of keys; ApiKeysError when it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ApiKeysError(f"{path}: cannot be read: {error.strerror or error}") from error


def parse_keys(content: bytes, path: Path) -> ApiKeys:
    """Return what the bytes of the file `path` say. No error quotes a value of the file."""
    try:
        return ApiKeys.model_validate(tomllib.loads(content.decode()))
    except ValidationError as error:
        reasons = "; ".join(map(_reason, error.errors()))
        raise ApiKeysError(f"{path}: {reasons}") from None
    except UnicodeDecodeError:
        raise ApiKeysError(f"{path}: not TOML: not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise ApiKeysError(f"{path}: not TOML: {error}") from None


def make_key() -> str:
    """Return a new key: 256 bits of the system's randomness, to be shown once and never kept."""
    return KEY_PREFIX + secrets.token_urlsafe(_KEY_BYTES)


def digest_of(key: bytes) -> bytes:
    """Return the SHA-256 of a key as it is sent."""
    return sha256(key).digest()


def described(
    name: str,
    key: str,
    *,
    roles: Collection[str],
    expires: date | None = None,
    requests_per_s: float | None = None,
    burst: int | None = None,
) -> str:
    """Return the lines that let a file know `key`; ApiKeysError where they would say nonsense."""
    fields: dict[str, str | None] = {
        "sha256": f'"{digest_of(key.encode()).hex()}"',
        "roles": "[" + ", ".join(f'"{role}"' for role in sorted(roles)) + "]",
        "expires": None if expires is None else expires.isoformat(),
        "requests_per_s": None if requests_per_s is None else str(float(requests_per_s)),
        "burst": None if burst is None else str(burst),
    }
    try:
        _NAME.validate_python(name)
    except ValidationError as error:
        raise ApiKeysError(f"a key's name: {error.errors()[0]['msg']}") from None
    lines = [f"{field} = {value}" for field, value in fields.items() if value is not None]
    text = "\n".join([f"[keys.{name}]", *lines, ""])
    parse_keys(text.encode(), Path(name))
    return text


def find(digest: bytes, among: Iterable[tuple[bytes, _T]]) -> _T | None:
    """Return what stands beside `digest`, in a time that says nothing of the digests."""
    found = None
    for known, one in among:
        if hmac.compare_digest(digest, known):
            found = one  # and on: where it stands must not show either
    return found


def _reason(error: ErrorDetails) -> str:
    # A key that was pasted in place of its name is not told.
    named = [part for part in map(str, error["loc"]) if part != "[key]"]
    place = ".".join("***" if one.startswith(KEY_PREFIX) else one for one in named) or "the file"
    return f"{place}: {error['msg'].removeprefix('Value error, ')}"
