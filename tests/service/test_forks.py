"""Workers as forks of a template, whose parent is who asked for them."""

import asyncio
import os
import resource
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from service import forks
from service.forks import Fork, Template
from tests.service.live_service import PATIENCE_S


@pytest.fixture
def template(monkeypatch) -> Iterator[Template]:
    monkeypatch.setenv("MNEME_BUNDLE", "unused")
    made = Template(os.environ)
    yield made
    made.close()


Hand = Callable[[], list[int]]


@pytest.fixture
def hand(tmp_path) -> Iterator[Hand]:
    """Return the descriptors of a worker that ends at once, because it is told to serve nothing."""
    start = tmp_path / "start"
    start.write_text("{}")
    ours, theirs = socket.socketpair()
    with ExitStack() as stack:
        stack.enter_context(ours)
        stack.enter_context(theirs)
        yield lambda: [stack.enter_context(start.open("rb")).fileno(), theirs.fileno()]


async def status_of(fork: Fork) -> int:
    async with asyncio.timeout(PATIENCE_S):
        return await fork.wait()


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


async def test_a_worker_is_a_child_of_who_asked_and_tells_how_it_ended(template, hand):
    fork = template.fork(hand())
    assert parent_of(fork.pid) == os.getpid()
    assert await status_of(fork) == 1  # what it was to serve is no experiment
    fork.kill()  # which does nothing any more


def test_orphans_of_other_programs_are_not_adopted(template, hand):
    asyncio.run(status_of(template.fork(hand())))
    shell = subprocess.run(
        ["sh", "-c", "sleep 60 >&- 2>&- & echo $!"], capture_output=True, check=True
    )
    orphan = int(shell.stdout)
    try:
        assert parent_of(orphan) != os.getpid()
    finally:
        os.kill(orphan, signal.SIGKILL)


async def test_one_that_is_killed_ends_by_that_signal(template, hand):
    read, write = os.pipe()  # nobody says what it is to serve
    fork = template.fork([read, *hand()[1:]])
    fork.kill()
    assert await status_of(fork) == -signal.SIGKILL
    os.close(read)
    os.close(write)


async def test_a_template_that_has_ended_is_started_again(template, hand):
    assert await status_of(template.fork(hand())) == 1
    (pid,) = template_pids()
    kill(pid)
    assert await status_of(template.fork(hand())) == 1
    assert template_pids() != {pid}


async def test_a_template_that_does_not_answer_is_started_again(template, hand, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(forks, "_FIRST_ANSWER_WITHIN_S", 0.01)  # less than it takes to import
        with pytest.raises(OSError, match=r"not answered within 0\.01 s"):
            template.fork(hand())
    assert template_pids() == set()
    assert await status_of(template.fork(hand())) == 1


async def test_without_room_for_a_process_it_says_so_and_goes_on(template, hand):
    assert await status_of(template.fork(hand())) == 1
    (pid,) = template_pids()
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, limits[1]))  # no pipe can be made
    with pytest.raises(OSError, match="Too many open files"):
        template.fork(hand())
    resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
    assert await status_of(template.fork(hand())) == 1
    assert template_pids() == {pid}


async def test_one_that_ended_while_it_was_asked_may_have_made_a_fork(template, hand, monkeypatch):
    """Who asks again might have two workers that read from one socket."""
    assert await status_of(template.fork(hand())) == 1
    (pid,) = template_pids()

    with monkeypatch.context() as patch:
        # As if it had read the question before that.
        patch.setattr(socket, "send_fds", lambda *_: kill(pid))
        with pytest.raises(OSError, match="has ended"):
            template.fork(hand())
    assert await status_of(template.fork(hand())) == 1


async def test_one_that_cannot_start_is_an_error_and_not_a_wait(hand):
    template = Template({**os.environ, "PYTHONPATH": "", "PYTHONSAFEPATH": "1", "PYTHONHOME": "/"})
    with pytest.raises(OSError, match="has ended"):
        template.fork(hand())


def kill(pid: int) -> None:
    """Return when the process has ended; it has been waited for by nobody."""
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def template_pids() -> set[int]:
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return {
        int(pid)
        for pid in children
        if Path(f"/proc/{pid}/comm").read_text().strip() == "mneme-template"
    }
