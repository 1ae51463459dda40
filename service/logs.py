"""Events on stderr, one a line, as JSON or as text. docs/logging.md says what each means."""

import json
import logging
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, Literal

Level = Literal["debug", "info", "warning", "error"]
Format = Literal["json", "text"]

_FIELDS = "mneme_fields"
# What another library says is one event; its words are a field of it.
_FOREIGN = "message"


def configure(*, level: Level, style: Format, personal_data: bool) -> None:
    """Let this process write its events, and those of its libraries, to stderr.

    `personal_data`: with the messages of exceptions, which may name a user.
    """
    handler = logging.StreamHandler()
    formatter = JsonFormatter if style == "json" else TextFormatter
    handler.setFormatter(formatter(personal_data=personal_data))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(capture=True)
    # At `info` the server tells each of its steps; ours are told by the events.
    if level == "info":
        logging.getLogger("uvicorn").setLevel(logging.WARNING)


def log_event(
    logger: logging.Logger,
    level: int,
    event: str,
    /,
    *,
    error: BaseException | None = None,
    **fields: object,
) -> None:
    """Write an event of docs/logging.md, with fields, and the traceback of `error`."""
    if logger.isEnabledFor(level):
        logger.log(level, event, exc_info=error, extra={_FIELDS: fields})


class _EventFormatter(logging.Formatter):
    """Reads an event from a record. `personal_data`: with the messages of exceptions."""

    def __init__(self, *, personal_data: bool) -> None:
        super().__init__()
        self._personal_data = personal_data

    def event_of(self, record: logging.LogRecord) -> dict[str, Any]:
        """Return the fields of a record in their order, the traceback last."""
        fields = getattr(record, _FIELDS, None)
        event: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": _FOREIGN if fields is None else record.getMessage(),
            "logger": record.name,
            "pid": record.process,
            **({"message": record.getMessage()} if fields is None else fields),
        }
        if record.exc_info and record.exc_info[1] is not None:
            event["traceback"] = self._traceback(record.exc_info[1])
        return event

    def _traceback(self, error: BaseException) -> str:
        if self._personal_data:
            return "".join(traceback.format_exception(error)).rstrip()
        return "\n".join(
            "".join([*traceback.format_tb(one.__traceback__), type(one).__qualname__])
            for one in _causes(error)
        )


class JsonFormatter(_EventFormatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        return json.dumps(self.event_of(record), default=str)


class TextFormatter(_EventFormatter):
    """For people: `time level event name=value ...`, and a traceback below it."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, and the lines of a traceback."""
        event = self.event_of(record)
        found = event.pop("traceback", None)
        head = f"{event.pop('time')} {event.pop('level'):7s} {event.pop('event')}"
        line = " ".join([head, *(f"{k}={json.dumps(v, default=str)}" for k, v in event.items())])
        return line if found is None else f"{line}\n{found}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what it came from, the first cause last."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
