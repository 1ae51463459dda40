"""A file of keys that changes while the service runs."""

import logging
from pathlib import Path

import httpx
import pytest

from service.api_keys import ApiKeys, described, make_key
from service.key_watch import KeyWatch
from service.metrics import Metrics
from tests.service.live_service import wait_until
from tests.service.logged import Logged


def lines(name: str, key: str) -> str:
    return described(name, key, roles=["score"])


class Watched:
    """A watch on a file, and what it has applied."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = Metrics()
        self.applied: list[list[str]] = []
        self.fault: Exception | None = None
        self.watch = KeyWatch(path, apply=self._apply, metrics=self.metrics)

    def _apply(self, keys: ApiKeys) -> None:
        if self.fault is not None:
            raise self.fault
        self.applied.append(sorted(keys.keys))

    def count(self, outcome: str) -> float | None:
        value: float | None = self.metrics.registry.get_sample_value(
            "mneme_api_keys_reloads_total", {"outcome": outcome}
        )
        return value

    @property
    def refused(self) -> float | None:
        self.metrics.text()  # which brings it up to date
        value: float | None = self.metrics.registry.get_sample_value("mneme_api_keys_refused")
        return value


@pytest.fixture
def watched(tmp_path) -> Watched:
    path = tmp_path / "keys.toml"
    path.write_text(lines("one", make_key()))
    return Watched(path)


@pytest.fixture
def logged():
    logged = Logged()
    with logged.listening(logging.INFO, personal_data=False):
        yield logged


async def test_a_file_that_stays_is_applied_once_and_is_no_change(watched, logged):
    for _ in range(3):
        await watched.watch.look()
    assert watched.applied == [["one"]]
    assert watched.count("applied") == 0
    assert logged.text == ""


async def test_a_change_is_applied_counted_and_told_by_names(watched, logged):
    await watched.watch.look()
    key = make_key()
    watched.path.write_text(watched.path.read_text() + lines("two", key))
    await watched.watch.look()
    await watched.watch.look()
    assert watched.applied == [["one"], ["one", "two"]]
    assert watched.count("applied") == 1
    (event,) = logged.events("api-keys-applied")
    assert event["keys"] == ["one", "two"]
    assert key not in logged.text


@pytest.mark.parametrize(
    "broken",
    [b"", b"[keys.one]\n", b"\xff", b"x = 1" + b"0" * 5000, None],
    ids=["empty", "half", "bytes", "long number", "away"],
)
async def test_a_broken_file_changes_nothing_and_is_told_once(watched, logged, broken):
    await watched.watch.look()
    good = watched.path.read_bytes()
    if broken is None:
        watched.path.unlink()
    else:
        watched.path.write_bytes(broken)
    for _ in range(3):
        await watched.watch.look()
    assert watched.applied == [["one"]]
    assert (watched.count("refused"), watched.refused) == (1, 1)
    (event,) = logged.events("api-keys-refused")
    assert event["reason"] == watched.watch.refused
    assert event["reason"].startswith(f"{watched.path}: ")

    watched.path.write_bytes(good)
    await watched.watch.look()
    assert watched.applied == [["one"], ["one"]]
    assert (watched.count("applied"), watched.refused) == (1, 0)
    assert watched.watch.refused is None


async def test_a_fault_of_the_service_is_told_once_with_its_trace_and_the_watch_goes_on(
    watched, logged
):
    await watched.watch.look()
    watched.path.write_text(watched.path.read_text() + lines("two", make_key()))
    watched.fault = OverflowError("of something")
    for _ in range(3):
        await watched.watch.look()
    assert (watched.count("refused"), watched.refused) == (1, 1)
    (event,) = logged.events("api-keys-refused")
    assert event["reason"] == f"{watched.path}: unexpected OverflowError"
    assert "_apply" in event["traceback"]

    watched.fault = None
    await watched.watch.look()
    assert watched.applied == [["one"], ["one", "two"]]
    assert (watched.count("applied"), watched.refused) == (1, 0)


def test_keys_are_rotated_while_the_service_answers(serve, tmp_path):
    """The new one beside the old one, then alone; an open connection learns of it as well."""
    path = tmp_path / "keys.toml"
    old, new = make_key(), make_key()
    path.write_text(lines("old", old))
    service = serve(api_keys=path)

    def status(key: str) -> int:
        answer: httpx.Response = service.client.get(
            "/models", headers={"Authorization": f"Bearer {key}"}
        )
        return answer.status_code

    assert (status(old), status(new)) == (200, 401)
    path.write_text(lines("old", old) + lines("new", new))
    wait_until(lambda: status(new) == 200, "the new key is known")
    assert status(old) == 200
    path.write_text("[keys")
    path.write_text(lines("new", new))
    wait_until(lambda: status(old) == 401, "the old key is forgotten")
    assert status(new) == 200
