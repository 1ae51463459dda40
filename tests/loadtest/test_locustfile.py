"""The Locust users, run as Locust runs them: by its own command line, against a real server."""

import csv
import os
import subprocess
import sys
import time
from pathlib import Path

import httpx

from loadtest.redis_server import free_port
from tests.loadtest.recording_server import recording_server

LOCUSTFILE = Path(__file__).parents[2] / "loadtest" / "locustfile.py"


def command(*flags: str) -> list[str]:
    return [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), *flags]


def test_locust_sends_the_same_traffic_without_its_web_ui(tmp_path):
    with recording_server() as server:
        done = subprocess.run(
            command(
                *("--headless", "--host", server.url, "--users", "2", "--spawn-rate", "2"),
                *("--run-time", "1s", "--csv", str(tmp_path / "run"), "--candidates", "3-4"),
                *("--history", "2", "--user-id", "u{}", "--population", "5", "--think-s", "0.05"),
                *("--deadline-ms", "700"),
            ),
            capture_output=True,
            text=True,
            env={**os.environ, "LOADTEST_API_KEY": "a-key"},
        )
    assert done.returncode == 0, done.stderr
    assert len(server.received) >= 2
    for received in server.received:
        assert received.path == "/score"
        assert received.headers["x-deadline-ms"] == "700"
        assert received.headers["content-type"] == "application/json"
        assert received.headers["authorization"] == "Bearer a-key"
        assert 3 <= len(received.body["candidates"]) <= 4
        assert len(received.body["history"]) == 2
        assert received.body["user_id"] in {f"u{number}" for number in range(5)}
    with (tmp_path / "run_stats.csv").open(newline="") as file:
        total = list(csv.DictReader(file))[-1]
    assert 2 <= int(total["Request Count"]) <= len(server.received)
    assert total["Failure Count"] == "0"


def test_locust_shows_the_settings_in_its_web_ui_and_starts_from_there():
    port = free_port()
    with recording_server() as server:
        process = subprocess.Popen(
            command("--host", server.url, "--web-host", "127.0.0.1", "--web-port", str(port)),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30.0) as web:
                page = _page(web)
                assert "zipf" in page
                assert "history" in page
                form = {"user_count": 1, "spawn_rate": 1, "candidates": "7", "host": server.url}
                assert web.post("/swarm", data=form).json()["success"]
                _wait(lambda: server.received)
                web.get("/stop")
        finally:
            process.terminate()
            process.wait()
    assert len(server.received[0].body["candidates"]) == 7
    assert "history" not in server.received[0].body


def test_settings_that_describe_no_traffic_end_locust_with_one_clear_line():
    done = subprocess.run(
        command("--headless", "--host", "http://127.0.0.1:1", "--candidates", "many"),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )
    assert done.returncode == 2
    assert "error: 'many' is no distribution of sizes from 1 up" in done.stderr
    assert "Traceback" not in done.stderr


def _page(web: httpx.Client) -> str:
    pages: list[str] = []

    def is_there() -> bool:
        try:
            pages.append(web.get("/").text)
        except httpx.TransportError:
            return False
        return True

    _wait(is_there)
    return pages[-1]


def _wait(condition) -> None:
    deadline = time.monotonic() + 60.0
    while not condition():
        assert time.monotonic() < deadline, "it took longer than a minute"
        time.sleep(0.05)
