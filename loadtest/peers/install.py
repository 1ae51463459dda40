"""The peers: what to install for each, how to ask it for scores, how to start and to end it.

Each peer has a virtual environment of its own, because their requirements exclude each other's.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import httpx

from loadtest.redis_server import free_port

DEFAULT_FOLDER = Path.home() / ".cache" / "mneme-peers"
# Some would compress their answers for a client that does not say this.
HEADERS = {"Content-Type": "application/json", "Accept-Encoding": "identity"}

_ROOT = Path(__file__).parents[2]
_START_TIMEOUT_S = 90.0
_STOP_TIMEOUT_S = 10.0
_LOG_TAIL_BYTES = 2000
_INSTALLED = "requirements.txt"
_MARK = "LOADTEST_PEER"

_ONNXRUNTIME = ("hiredis==3.5.0", "onnxruntime==1.31.1", "pydantic==2.14.3", "redis==8.1.0")
_UVICORN = ("httptools==0.9.0", "uvicorn==0.54.0", "uvloop==0.23.0")


class PeerUnavailableError(RuntimeError):
    """A peer that cannot be installed or does not serve on this machine."""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """`python`: the interpreter that makes the virtual environment. `ready_path`: answers 200 to
    a GET once the server is up. `score_path`: takes POSTs of `body(user_id, candidates)` and
    answers what `scores` reads. `model_flag`: `--bundle` or `--checkpoint`.
    """

    name: str
    requirements: tuple[str, ...]
    ready_path: str
    score_path: str
    body: Callable[[str, Sequence[int]], bytes]
    scores: Callable[[bytes], list[float]]
    python: Path = Path(sys.executable)
    model_flag: str = "--bundle"

    @property
    def module(self) -> str:
        """Return what `python -m` runs."""
        return f"loadtest.peers.{self.name}_server"


def _plain_body(user_id: str, candidates: Sequence[int]) -> bytes:
    return _json({"user_id": user_id, "candidates": candidates})


def _plain_scores(answer: bytes) -> list[float]:
    scores: list[float] = json.loads(answer)["scores"]
    return scores


def _bentoml_body(user_id: str, candidates: Sequence[int]) -> bytes:
    return _json({"requests": [{"user_id": user_id, "candidates": candidates}]})


def _bentoml_scores(answer: bytes) -> list[float]:
    (scores,) = json.loads(answer)
    return list(scores)


def _triton_body(user_id: str, candidates: Sequence[int]) -> bytes:
    n = len(candidates)
    return _json(
        {
            "inputs": [
                {"name": "user_id", "datatype": "BYTES", "shape": [1, 1], "data": [user_id]},
                {
                    "name": "candidates",
                    "datatype": "INT64",
                    "shape": [1, n],
                    "data": candidates,
                },
            ]
        }
    )


def _triton_scores(answer: bytes) -> list[float]:
    (output,) = json.loads(answer)["outputs"]
    return list(output["data"])


def _json(content: Any) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode()


PEERS = (
    Peer(
        name="bentoml",
        # uvicorn takes the faster event loop and parser where it finds them.
        requirements=("bentoml==1.4.39", "numpy==2.4.6", *_ONNXRUNTIME, *_UVICORN),
        ready_path="/readyz",
        score_path="/score",
        body=_bentoml_body,
        scores=_bentoml_scores,
    ),
    Peer(
        name="litserve",
        requirements=("litserve==0.2.19", "numpy==2.4.6", *_ONNXRUNTIME, *_UVICORN),
        ready_path="/health",
        score_path="/predict",
        body=_plain_body,
        scores=_plain_scores,
    ),
    Peer(
        name="ray",
        requirements=("ray[serve]==2.60.0", "numpy==2.4.6", *_ONNXRUNTIME, *_UVICORN),
        ready_path="/-/healthz",
        score_path="/",
        body=_plain_body,
        scores=_plain_scores,
    ),
    Peer(
        name="triton",
        requirements=("nvidia-pytriton==0.7.0", "numpy==1.26.4", *_ONNXRUNTIME),
        ready_path="/v2/models/scores/ready",
        score_path="/v2/models/scores/infer",
        body=_triton_body,
        scores=_triton_scores,
        # Its backend loads libpython, which only a shared build of Python has.
        python=Path("/usr/bin/python3.11"),
    ),
    Peer(
        name="torch",
        requirements=(
            "fastapi==0.165.0",
            "torch==2.13.0",
            "numpy==2.4.6",
            *_ONNXRUNTIME,
            *_UVICORN,
        ),
        ready_path="/readyz",
        score_path="/score",
        body=_plain_body,
        scores=_plain_scores,
        model_flag="--checkpoint",
    ),
)


def ensure_venv(peer: Peer, folder: Path = DEFAULT_FOLDER) -> Path:
    """Return the Python of the peer's virtual environment under `folder`, made where it is
    missing or holds other versions. Raises PeerUnavailableError with pip's reason.
    """
    venv = folder / peer.name
    installed = venv / _INSTALLED
    wanted = "\n".join(peer.requirements) + "\n"
    python = venv / "bin" / "python"
    if not installed.is_file() or installed.read_text() != wanted:
        shutil.rmtree(venv, ignore_errors=True)
        _run([peer.python, "-m", "venv", venv])
        _run([python, "-m", "pip", "install", "--quiet", *peer.requirements])
        installed.write_text(wanted)
    return python


def _run(command: Sequence[str | Path]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise PeerUnavailableError(f"{command[0]}: {error.strerror}") from error
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise PeerUnavailableError(lines[-1] if lines else f"exit status {done.returncode}")


@contextmanager
def start(
    peer: Peer,
    python: Path,
    model: Path,
    redis_url: str,
    *,
    threads: int = 1,
    dummy: bool = False,
    cores: Collection[int] = (),
) -> Iterator[str]:
    """Run the peer's server on `cores` (all unless said), yield its URL once it has scored a
    first request, and end all of its processes with the block. Raises PeerUnavailableError.
    """
    port = free_port()
    command: list[str | Path] = [python, "-m", peer.module, peer.model_flag, model.absolute()]
    command += ["--redis-url", redis_url, "--port", str(port), "--threads", str(threads)]
    if dummy:
        command.append("--dummy")
    if cores:
        command = ["taskset", "--cpu-list", ",".join(map(str, sorted(cores))), *command]
    with (
        tempfile.TemporaryDirectory(prefix="mneme-peer-") as folder,
        (Path(folder) / "log").open("w+b") as log,
    ):
        process = subprocess.Popen(
            command,
            cwd=folder,  # some write files where they run
            env={**os.environ, "PYTHONPATH": str(_ROOT), "TMPDIR": folder, _MARK: folder},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C must reach the parent alone
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(peer, process, url, log)
            yield url
        finally:
            _end(process, folder)


def _wait(peer: Peer, process: "subprocess.Popen[bytes]", url: str, log: IO[bytes]) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    with httpx.Client(base_url=url, headers=HEADERS) as client:
        while not _scores(peer, client):
            if process.poll() is not None:
                reason = f"the server ended with status {process.returncode}"
            elif time.monotonic() > deadline:
                reason = f"the server did not score within {_START_TIMEOUT_S:.0f} s"
            else:
                time.sleep(0.2)
                continue
            log.seek(0, os.SEEK_END)
            log.seek(max(log.tell() - _LOG_TAIL_BYTES, 0))
            raise PeerUnavailableError(f"{reason}\n{log.read().decode(errors='replace')}")


def _scores(peer: Peer, client: httpx.Client) -> bool:
    """Return whether the server answers a request for two candidates with two scores."""
    try:
        if not client.get(peer.ready_path).is_success:
            return False
        answer = client.post(peer.score_path, content=peer.body("nobody", [1, 2]))
    except httpx.TransportError:
        return False
    return answer.is_success and len(peer.scores(answer.content)) == 2


def _end(process: "subprocess.Popen[bytes]", mark: str) -> None:
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_TIMEOUT_S)
    while members := _marked(mark):
        for pid in members:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    process.kill()
    process.wait()


def _marked(mark: str) -> list[int]:
    """Return the processes that were started with the mark in their environment.

    Neither the process group nor the session holds them all: some servers' workers leave both.
    """
    entry = f"{_MARK}={mark}".encode()
    members = []
    for folder in Path("/proc").glob("[0-9]*"):
        # A process may end meanwhile, or belong to somebody else.
        with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            if entry in (folder / "environ").read_bytes().split(b"\0"):
                members.append(int(folder.name))
    return members
