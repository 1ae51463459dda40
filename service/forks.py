"""Processes that begin with all that a worker imports: forks of one that has imported it.

The import of libraries takes a second of a processor, several times what opening a small bundle
takes. `service/worker.py`, the template, pays it once. It opens no model and has no thread, so to
fork it is safe where to fork a process that serves would not be.
"""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress

from service.prctl import adopting_orphans

# The first answer waits for its imports, on a busy machine.
_FIRST_ANSWER_WITHIN_S = 120.0
_ANSWER_WITHIN_S = 10.0
_ANSWER_BYTES = 256
_HAS_ENDED = "what workers are forks of has ended; its stderr says why"


class Fork:
    """A process that is a child of this one."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        # Unlike its number, which another process may get, it names this one for good.
        self._handle: int | None = os.pidfd_open(pid)

    def kill(self) -> None:
        """End it at once, where it has not ended."""
        if self._handle is not None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._handle, signal.SIGKILL)

    async def wait(self) -> int:
        """Return its exit status, negative a signal's number. To be called once."""
        assert self._handle is not None, "it has not been waited for"
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        loop.add_reader(self._handle, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(self._handle)
        _, status = os.waitpid(self.pid, 0)  # noqa: ASYNC222  # it has ended
        os.close(self._handle)
        self._handle = None
        return os.waitstatus_to_exitcode(status)


class Template:
    """The process that forks are made of, started when one is asked for and none is there.

    `environment`: its variables, and those of all forks.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None
        self._end: socket.socket | None = None

    def fork(self, handed: Sequence[int]) -> Fork:
        """Return a new worker that has got these descriptors.

        It takes milliseconds, but for the first, which waits for the imports. Raises OSError where
        there is no room for a process.
        """
        # For no longer: the orphans of other programs that this process runs are not its own.
        with adopting_orphans():
            answer = self._asked_once_or_twice(handed)
        pid = int(answer)
        if pid < 0:
            raise OSError(-pid, os.strerror(-pid))
        try:
            return Fork(pid)
        except OSError:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise

    def close(self) -> None:
        """End the template; its forks are left alone."""
        if self._end is not None and self._process is not None:
            self._end.close()
            # Rather than wait for it to end: it may be what does not answer.
            self._process.kill()
            self._process.wait()
            self._end = self._process = None

    def _asked_once_or_twice(self, handed: Sequence[int]) -> bytes:
        for _ in range(2):
            # One that has ended before it read the question has made no fork.
            with suppress(BrokenPipeError, ConnectionResetError):
                return self._ask(handed)
        raise OSError(_HAS_ENDED)

    def _ask(self, handed: Sequence[int]) -> bytes:
        if self._end is None:
            self._end = self._start()
        try:
            socket.send_fds(self._end, [b"\0"], handed)
            answer = self._end.recv(_ANSWER_BYTES)
            if not answer:
                raise OSError(_HAS_ENDED)
        except TimeoutError:
            limit_s = self._end.gettimeout()
            self.close()  # its answer must not become that to the next question
            # No TimeoutError: nothing else was too slow.
            raise OSError(
                f"what workers are forks of has not answered within {limit_s:g} s"
            ) from None
        except OSError:
            self.close()
            raise
        self._end.settimeout(_ANSWER_WITHIN_S)
        return answer

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603  # this program
                [sys.executable, "-m", "service.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                # A library's own threads would not be in its forks.
                env={**self._environment, "OPENBLAS_NUM_THREADS": "1"},
            )
        ours.settimeout(_FIRST_ANSWER_WITHIN_S)
        return ours
