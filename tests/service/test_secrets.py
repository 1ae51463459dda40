"""`python -m service` with a password and keys, and everything that it lets others read."""

import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import get_args

import httpx
import pytest
from redis import Redis

from loadtest.redis_server import free_port, redis_server
from service.api_keys import Role, described, make_key
from tests.service.histories import steps, write_log
from tests.service.live_service import PATIENCE_S
from tests.service.running_service import RunningService, running_service
from tests.service.test_main import run

PASSWORD = "open-sesame-8c1f"
READS = (
    "/models",
    "/experiments",
    "/metrics",
    "/openapi.json",
    "/users/sample",
    "/readyz",
    "/docs",
)


@pytest.fixture
def locked():
    """A Redis that asks for a password, and its URL without one."""
    port = free_port()
    with redis_server(port) as url, Redis.from_url(url) as client:
        client.config_set("requirepass", PASSWORD)
        yield f"127.0.0.1:{port}"


@pytest.fixture
def keys(tmp_path):
    """A file with one key that may do everything."""
    key = make_key()
    path = tmp_path / "keys.toml"
    path.write_text(described("all", key, roles=get_args(Role)))
    return path, key


def lists_of_processes(service: RunningService) -> str:
    """What everybody reads of the processes of a service: their names and arguments."""
    pids = [one.split()[0] for one in service.living()]
    found = []
    for pid in pids:
        with suppress(FileNotFoundError, ProcessLookupError):
            found.append(Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace"))
    assert found
    return "\n".join(found)


@pytest.mark.parametrize("workers", [1, 2])
def test_neither_password_nor_keys_are_in_anything_that_it_says(
    good_bundle, locked, keys, workers, tmp_path
):
    path, key = keys
    flags = ["--bundle", good_bundle, "--workers", str(workers)]
    flags += ["--api-keys", path, "--log-level", "debug", "--log-personal-data", "true"]
    redis_url = f"redis://:{PASSWORD}@{locked}/0"
    with running_service(*flags, folder=tmp_path, REDIS_URL=redis_url) as service:
        service.wait_until_ready()
        said = [lists_of_processes(service)]
        with httpx.Client(base_url=service.url, trust_env=False, timeout=PATIENCE_S) as client:

            def ask_everything(**headers: str) -> None:
                body = {"user_id": "ann", "candidates": [1]}
                answers = [client.get(path, headers=headers) for path in READS]
                answers.append(client.post("/score", json=body, headers=headers))
                answers.append(client.post("/score", content=b"{", headers=headers))
                event = {"user_id": "ann", "item_id": 1}
                answers.append(client.post("/events", json=event, headers=headers))
                said.extend(f"{answer.headers} {answer.text}" for answer in answers)

            ask_everything(Authorization=f"Bearer {key}")
            assert '"ann"' in said[-1] or "appended" in said[-1]
            ask_everything(Authorization=f"Bearer {key}x")
            ask_everything(Authorization=f"Basic {key}")
            with Redis.from_url(f"redis://:{PASSWORD}@{locked}") as redis:
                redis.config_set("requirepass", f"{PASSWORD}-2")  # ours is wrong from now on
                redis.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
                ask_everything(Authorization=f"Bearer {key}")
                redis.config_set("requirepass", PASSWORD)
            assert any("history-unavailable" in one for one in said)
        said.extend(service.end())
    assert "request-answered" in said[-1]
    text = "\n".join(said)
    assert PASSWORD not in text
    assert key.removeprefix("mneme_") not in text


def test_a_password_in_a_flag_is_refused_without_repeating_it(good_bundle):
    done = run("-m", "service", "--bundle", good_bundle, "--redis-url", f"redis://:{PASSWORD}@h/0")
    assert done.returncode == 2
    assert re.fullmatch(r"error: redis_url: .*REDIS_URL\n", done.stderr)
    assert PASSWORD not in done.stdout + done.stderr


def test_a_backfill_that_is_refused_does_not_repeat_the_password(good_bundle, locked, tmp_path):
    log = write_log(tmp_path / "log", {"ann": steps(1)})
    done = subprocess.run(
        [sys.executable, "-m", "service", "backfill", str(log), "--bundle", str(good_bundle)],
        env={**os.environ, "REDIS_URL": f"redis://:{PASSWORD}-wrong@{locked}/0"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 2
    assert "error: Redis did not answer" in done.stderr
    assert PASSWORD not in done.stdout + done.stderr
