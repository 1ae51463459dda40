"""Events as lines, and that the documentation names those that exist."""

import ast
import io
import json
import logging
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from service.logs import JsonFormatter, TextFormatter, log_event
from service.settings import Settings
from tests.service.live_service import PATIENCE_S
from tests.service.logged import events_of

ROOT = Path(__file__).parents[2]
BASE = ["time", "level", "event", "logger", "pid"]
CONFIGURED = """
import logging, warnings
from service.logs import configure, log_event
configure(level={level!r}, style="json", personal_data=False)
log = logging.getLogger("service.test")
log_event(log, logging.DEBUG, "tiny")
log_event(log, logging.INFO, "small")
warnings.warn("mind the gap")
logging.getLogger("uvicorn.error").info("Started server process")
logging.getLogger("uvicorn.error").error("it went wrong")
"""


@pytest.fixture
def logger():
    """A logger of the test's own, that says nothing to anybody else."""
    logger = logging.Logger("service.test", logging.DEBUG)
    logger.addHandler(logging.StreamHandler(io.StringIO()))
    return logger


def written(logger: logging.Logger, formatter: logging.Formatter) -> io.StringIO:
    """Let the logger write by a formatter, and return where to."""
    (handler,) = logger.handlers
    assert isinstance(handler, logging.StreamHandler)
    handler.setFormatter(formatter)
    stream: io.StringIO = handler.stream
    return stream


def failure() -> Exception:
    """Return an error that was raised from another, both of which name a user."""
    users: dict[str, int] = {}
    try:
        try:
            return Exception(users["user bob"])
        except KeyError as error:
            raise ValueError("no history of bob") from error
    except ValueError as error:
        return error


class TestJson:
    def test_an_event_is_one_object_on_one_line(self, logger):
        lines = written(logger, JsonFormatter(personal_data=False))
        log_event(logger, logging.WARNING, "it-happened", text='two\nlines, "quoted" é', n=1.5)
        (event,) = events_of(lines.getvalue())
        assert list(event) == [*BASE, "text", "n"]
        assert event["event"] == "it-happened"
        assert event["level"] == "warning"
        assert event["logger"] == "service.test"
        assert (event["text"], event["n"]) == ('two\nlines, "quoted" é', 1.5)
        age_s = (datetime.now(UTC) - datetime.fromisoformat(event["time"])).total_seconds()
        assert -1 < age_s < PATIENCE_S

    def test_what_a_library_says_is_an_event_with_its_words(self, logger):
        lines = written(logger, JsonFormatter(personal_data=False))
        logger.error("%d things went wrong", 3)
        (event,) = events_of(lines.getvalue())
        assert (event["event"], event["message"]) == ("message", "3 things went wrong")

    def test_what_json_does_not_know_is_written_as_text(self, logger):
        lines = written(logger, JsonFormatter(personal_data=False))
        log_event(logger, logging.INFO, "it-happened", file=Path("/a/b"))
        assert events_of(lines.getvalue())[0]["file"] == "/a/b"

    def test_a_traceback_tells_where_and_what_but_not_of_whom(self, logger):
        lines = written(logger, JsonFormatter(personal_data=False))
        log_event(logger, logging.ERROR, "it-failed", error=failure())
        (event,) = events_of(lines.getvalue())
        assert re.findall(r"^(\w+)$", event["traceback"], re.M) == ["ValueError", "KeyError"]
        assert "in failure" in event["traceback"]
        assert "no history of bob" not in re.sub("raise .*", "", event["traceback"])

    def test_a_traceback_says_all_where_that_is_asked_for(self, logger):
        lines = written(logger, JsonFormatter(personal_data=True))
        log_event(logger, logging.ERROR, "it-failed", error=failure())
        (event,) = events_of(lines.getvalue())
        assert event["traceback"].endswith("ValueError: no history of bob")
        assert "KeyError: 'user bob'" in event["traceback"]


class TestText:
    def test_an_event_is_a_line_for_people(self, logger):
        lines = written(logger, TextFormatter(personal_data=False))
        log_event(logger, logging.WARNING, "it-happened", arms={"main": "v1"}, n=2)
        time, rest = lines.getvalue().split(" ", 1)
        assert datetime.fromisoformat(time).tzinfo is not None
        assert rest.startswith("warning it-happened ")
        assert rest.endswith(' arms={"main": "v1"} n=2\n')

    def test_a_traceback_stands_below_it(self, logger):
        lines = written(logger, TextFormatter(personal_data=False))
        log_event(logger, logging.ERROR, "it-failed", error=failure())
        head, *below = lines.getvalue().splitlines()
        assert " it-failed " in head
        assert below[-1] == "KeyError"


class TestConfigured:
    def events(self, level: str) -> list[tuple[str, str]]:
        done = subprocess.run(
            [sys.executable, "-c", CONFIGURED.format(level=level)],
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=True,
        )
        assert done.stdout == ""
        return [(one["level"], one.get("message", one["event"])) for one in events_of(done.stderr)]

    @pytest.mark.parametrize(
        ("level", "expected"),
        [
            ("debug", ["tiny", "small", "gap", "Started", "wrong"]),
            ("info", ["small", "gap", "wrong"]),
            ("warning", ["gap", "wrong"]),
            ("error", ["wrong"]),
        ],
    )
    def test_the_level_holds_for_us_and_for_libraries(self, level, expected):
        """But the server's own steps are told at debug only; warnings of Python are events."""
        found = self.events(level)
        assert len(found) == len(expected)
        assert all(word in text for word, (_, text) in zip(expected, found, strict=True))


def logged_in_the_source() -> dict[str, str]:
    """Return the level of every event that some line of the service writes."""
    calls: list[Any] = [
        node
        for path in (ROOT / "service").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "log_event"
    ]
    return {call.args[2].value: call.args[1].attr.lower() for call in calls}


def test_the_document_names_the_events_that_are_written_with_their_levels():
    section = (ROOT / "docs/logging.md").read_text().split("## Events")[1]
    documented = dict(re.findall(r"^\| `([a-z-]+)` \| (\w+) \|", section, re.M))
    assert documented.pop("message") == "any"
    assert documented == logged_in_the_source()


def test_no_line_of_the_service_writes_other_than_events():
    for path in (ROOT / "service").glob("*.py"):
        found = re.findall(r"_log\.(?:debug|info|warning|error|exception|log)\(", path.read_text())
        assert found == [], path


def test_the_example_of_the_document_is_json_with_the_usual_fields():
    text = (ROOT / "docs/logging.md").read_text()
    (example,) = re.findall(r"```\n(\{.*?\})\n```", text, re.S)
    assert list(json.loads(example))[: len(BASE)] == BASE


def test_the_flags_of_the_document_are_settings():
    flags = re.findall(r"`--([a-z][a-z-]*)", (ROOT / "docs/logging.md").read_text())
    assert flags
    assert {flag.replace("-", "_") for flag in flags} <= set(Settings.model_fields)
