"""The events that a service in this process writes, read back from their lines."""

import io
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from service.logs import JsonFormatter
from tests.service.live_service import wait_until


class Logged:
    """What has been written so far."""

    def __init__(self) -> None:
        self._stream = io.StringIO()

    @property
    def text(self) -> str:
        return self._stream.getvalue()

    def events(self, name: str) -> list[dict[str, Any]]:
        return [event for event in events_of(self.text) if event["event"] == name]

    def wait_for(self, name: str, count: int = 1) -> list[dict[str, Any]]:
        """Return the events when there are so many: an answer comes before its event."""
        wait_until(lambda: len(self.events(name)) >= count, f"{count} events {name}")
        return self.events(name)

    @contextmanager
    def listening(self, level: int, *, personal_data: bool) -> Iterator[None]:
        logger = logging.getLogger("service")
        handler = logging.StreamHandler(self._stream)
        handler.setFormatter(JsonFormatter(personal_data=personal_data))
        logger.addHandler(handler)
        logger.setLevel(level)
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.setLevel(logging.NOTSET)


def events_of(lines: str) -> list[dict[str, Any]]:
    """Parse lines of which each must be a JSON object."""
    events = [json.loads(line) for line in lines.splitlines()]
    assert all(isinstance(event, dict) for event in events)
    return events
