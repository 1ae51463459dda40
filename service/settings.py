"""The settings of the service, from environment variables and flags; flags win.

Every field `name` is the variable `MNEME_NAME` and the flag `--name` (with dashes);
`REDIS_URL` is read too.
"""

import argparse
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AliasChoices, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, SettingsConfigDict

from service.logs import Format, Level
from service.redis_url import read_redis_url

PREFIX = "MNEME_"
# What idempotency keys stand under in Redis, and no history.
IDEMPOTENCY_PREFIX = "mneme-idempotency"
_PASSWORD = re.compile(r"://[^/]*:[^/]+@|[?&][^=&]*password=")


class SettingsError(ValueError):
    """A setting that is missing, unknown or not allowed."""


class Settings(BaseSettings):
    """Everything that an operator can choose; the defaults serve one machine."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        frozen=True,
        extra="forbid",
        populate_by_name=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
    )

    bundle: Path | None = Field(
        default=None,
        description="Folder of the bundle to serve, or a pointer file that names it; the one arm "
        "is named main.",
    )
    experiments: Path | None = Field(
        default=None,
        description="TOML file of arms, in place of one bundle.",
    )
    redis_url: str = Field(
        default="redis://127.0.0.1:6379/0",
        repr=False,  # it may hold a password
        validation_alias=AliasChoices("MNEME_REDIS_URL", "redis_url", "REDIS_URL"),
        description="Redis with the histories: redis:// or rediss:// (TLS), "
        "redis+sentinel://host:port,host:port/name, redis+cluster://host:port,host:port; the last "
        "two with rediss+, too.",
    )
    key_prefix: Annotated[str, Field(min_length=1)] = Field(
        default="history", description="Histories stand under <key_prefix>:<user id>."
    )
    redis_timeout_s: Annotated[float, Field(gt=0)] = Field(
        default=0.25,
        description="Seconds after which a call of Redis is given up; a read for scores, after "
        "half of deadline_s, and one for a recommendation or an explanation, after half of "
        "recommend_deadline_s, where that is sooner, whatever X-Deadline-Ms says.",
    )
    on_redis_failure: Literal["refuse", "cold"] = Field(
        default="refuse",
        description="Answer 503, or score with an empty history and say `degraded`.",
    )
    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(
        default=8000, description="Port to listen on."
    )
    workers: Annotated[int, Field(ge=1, le=256)] = Field(
        default=1, description="Processes that serve, each with a model of its own."
    )
    provider: Literal["cpu", "cuda"] = Field(
        default="cpu",
        description="Where the model runs; the service refuses to start when it cannot run there.",
    )
    threads: Annotated[int, Field(ge=0)] = Field(
        default=0, description="onnxruntime's threads on the CPU; 0 is one for each core."
    )
    deadline_s: Annotated[float, Field(gt=0)] = Field(
        default=0.03,
        description="Seconds within which an answer is of use, unless X-Deadline-Ms says else; "
        "what cannot be answered by then is refused.",
    )
    recommend_deadline_s: Annotated[float, Field(gt=0)] = Field(
        default=0.2,
        description="Seconds within which a recommendation or an explanation is of use, unless "
        "X-Deadline-Ms says else.",
    )
    recommend_block_items: Annotated[int, Field(ge=1)] = Field(
        default=16_384,
        description="Items of the catalogue that a recommendation scores in one run; a batch of "
        "requests for scores waits for one such run at most.",
    )
    max_batch_work: Annotated[int, Field(ge=1)] = Field(
        default=6_400_000, description="Largest batch: requests x candidates x history length."
    )
    max_queue_work: Annotated[int, Field(ge=1)] = Field(
        default=64_000_000, description="Work that may wait before requests are answered 429."
    )
    max_body_bytes: Annotated[int, Field(ge=1)] = Field(
        default=262_144, description="Largest request body; larger ones are answered 413."
    )
    titles: Path | None = Field(
        default=None,
        description="Titles of items for the page and for explanations: a JSON object by item id, "
        "or a .csv file with the columns item_id and title.",
    )
    max_clock_skew_s: Annotated[int, Field(ge=0)] = Field(
        default=86_400, description="How far in the future an event may lie."
    )
    log_level: Level = Field(
        default="info",
        description="The least severe events that are written: debug, info, warning or error.",
    )
    log_format: Format = Field(
        default="json", description="Events on stderr: json, one object a line, or text for people."
    )
    log_personal_data: bool = Field(
        default=False,
        description="Write user ids, candidates and the messages of unexpected errors, too.",
    )
    slow_request_s: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="Seconds after which a request is written as slow; without it, after the "
        "deadline_s or recommend_deadline_s of its route.",
    )
    slow_log_per_s: Annotated[float, Field(ge=0)] = Field(
        default=10.0,
        description="Slow requests that each worker writes at most in a second; 0 for none.",
    )
    tracing: Literal["off", "otel"] = Field(
        default="off",
        description="Spans for OpenTelemetry, which needs the extra `otel`; its own OTEL_ "
        "variables say where to.",
    )
    max_header_bytes: Annotated[int, Field(ge=1024)] = Field(
        default=16_384,
        description="Largest head of a request: target and headers; larger ones are answered 431.",
    )
    request_read_s: Annotated[float, Field(gt=0)] = Field(
        default=5.0,
        description="Seconds in which a request must have arrived once it has begun; later it is "
        "answered 408.",
    )
    keep_alive_s: Annotated[float, Field(gt=0)] = Field(
        default=5.0,
        description="Seconds that a connection may wait for its next request; let it be longer "
        "than what stands in front of the service keeps its own.",
    )

    wedged_s: Annotated[float, Field(gt=0)] = Field(
        default=30.0,
        description="Seconds after which a run of the device, or one turn of the event loop, will "
        "not end any more, or for which every run has failed: the process ends with code 75, to be "
        "started anew.",
    )
    max_connections: Annotated[int, Field(ge=1)] | None = Field(
        default=None,
        description="Connections that a worker holds at once; one more is answered 503 and closed. "
        "Unless given, 2,048, or fewer where the limit of open files is low.",
    )
    answer_taken_s: Annotated[float, Field(gt=0)] = Field(
        default=10.0,
        description="Seconds in which a client must take an answer that does not fit into the "
        "socket's buffers; its connection is cut off then.",
    )
    api_keys: Path | None = Field(
        default=None,
        description="TOML file of API keys, made by `python -m service make-key`; a change of it "
        "is applied within a second or two.",
    )
    anonymous: bool = Field(
        default=False,
        description="Listen on an address that others reach without asking for keys: something "
        "else keeps out whom it must.",
    )
    admin_port: Annotated[int, Field(ge=1, le=65535)] | None = Field(
        default=None,
        description="Port for /metrics, /experiments and /admin, which then do not exist on the "
        "other.",
    )
    admin_host: str = Field(default="127.0.0.1", description="Address of the admin port.")
    redis_password_file: Path | None = Field(
        default=None,
        description="File with the password for Redis, read for each connection: so it stands in "
        "no URL and in no list of processes.",
    )
    idempotency_life_s: Annotated[float, Field(gt=0)] = Field(
        default=3600.0,
        description="Seconds for which an Idempotency-Key of POST /events is known; Redis keeps "
        "some 400 bytes for each.",
    )
    reload_poll_s: Annotated[float, Field(gt=0)] = Field(
        default=1.0,
        description="Seconds between two looks at the experiments file, the pointer file and the "
        "bundles; what has changed is served by new processes.",
    )
    drain_s: Annotated[float, Field(ge=0)] = Field(
        default=5.0,
        description="Seconds for which a service that was told to end says so and serves on, and "
        "for which replaced processes wait for their clients to leave.",
    )

    @model_validator(mode="after")
    def _serves_something(self) -> "Settings":
        if (self.bundle is None) == (self.experiments is None):
            raise ValueError("either a bundle or an experiments file must be given, and not both")
        return self

    @model_validator(mode="after")
    def _ports_differ(self) -> "Settings":
        if self.admin_port == self.port:
            raise ValueError(f"port and admin_port are both {self.port}; they must differ")
        return self

    @field_validator("key_prefix")
    @classmethod
    def _is_a_prefix_of_histories(cls, prefix: str) -> str:
        if f"{prefix}:".startswith(f"{IDEMPOTENCY_PREFIX}:"):
            raise ValueError(
                f"idempotency keys stand under {IDEMPOTENCY_PREFIX}:, expected another prefix"
            )
        return prefix

    @field_validator("redis_url")
    @classmethod
    def _is_a_redis_url(cls, url: str) -> str:
        read_redis_url(url)
        return url


def read_settings(flags: Mapping[str, str]) -> Settings:
    """Return settings from flags and the environment; SettingsError names what is wrong."""
    if _PASSWORD.search(flags.get("redis_url", "")):
        raise SettingsError(
            "redis_url: everybody on the machine can read a flag in the list of processes; give a "
            "URL with a password by the variable REDIS_URL"
        )
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    unknown = sorted(name for name in os.environ if name.startswith(PREFIX) and name not in known)
    if unknown:
        raise SettingsError(
            f"unknown environment variables {', '.join(unknown)}; known are "
            f"{', '.join(sorted(known))}"
        )
    try:
        return Settings(**flags)  # type: ignore[arg-type]  # pydantic reads the strings
    except ValidationError as error:
        reasons = "; ".join(map(_reason, error.errors()))
        raise SettingsError(reasons) from error


def _reason(error: ErrorDetails) -> str:
    place = ".".join(map(str, error["loc"])) or "settings"
    return f"{place}: {error['msg'].removeprefix('Value error, ')}"


def write_settings(settings: Settings) -> dict[str, str]:
    """Return the environment variables from which `read_settings` makes the same settings."""
    return {PREFIX + name.upper(): str(value) for name, value in settings if value is not None}


def add_flags(parser: argparse.ArgumentParser, names: Sequence[str] | None = None) -> None:
    """Give `parser` a flag for each setting (or those named); its help ends with the default."""
    for name, field in Settings.model_fields.items():
        if names is None or name in names:
            default = "" if field.default is None else f" (default: {field.default})"
            parser.add_argument(
                f"--{name.replace('_', '-')}",
                dest=name,
                default=argparse.SUPPRESS,
                metavar="VALUE",
                help=f"{field.description}{default}".replace("%", "%%"),
            )
