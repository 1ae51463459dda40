"""`python -m service.worker ASKED`, of the supervisor's: the process that workers are forks of.

ASKED is its end of a pair of sockets. Each message by it asks for a fork and hands over its
descriptors: a file that says what to serve, its end of the control channel, and the sockets to
listen on. The answer is the fork's process number, or less than 0, the number of an error.
"""

import gc
import json
import os
import signal
import socket
import sys
from collections.abc import Sequence

from service.prctl import name_process

_MOST_DESCRIPTORS = 64


def main(arguments: Sequence[str]) -> int:
    """Make forks until the supervisor is gone; in a fork, serve. Return the exit status."""
    # A terminal and some supervisors of services signal all processes of a group.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    name_process("mneme-template")
    from service.serving import serve

    # What a fork does not write to, it shares: a collection would write to all.
    gc.collect()
    gc.freeze()
    asked = socket.socket(fileno=int(arguments[0]))
    while True:
        message, handed, _, _ = socket.recv_fds(asked, 1, _MOST_DESCRIPTORS)
        if not message:
            return 0
        try:
            pid = _fork_for_parent()
        except OSError as error:
            pid = -(error.errno or 1)
        if pid == 0:
            break
        for descriptor in handed:
            os.close(descriptor)
        asked.send(str(pid).encode())
    asked.close()
    name_process("mneme-worker")
    wanted, control, *listeners = handed
    with os.fdopen(wanted, "rb") as file:
        start = json.load(file)
    return serve(
        socket.socket(fileno=control), [socket.socket(fileno=one) for one in listeners], start
    )


def _fork_for_parent() -> int:
    """Fork a child of whoever adopts this process's orphans; return its number, and 0 in it.

    Raises OSError where there is no room for one.
    """
    hear, tell = os.pipe()
    try:
        between = os.fork()
        if between == 0:
            _fork_and_end(tell)
            os.close(hear)
            os.close(tell)
            return 0
    except OSError:
        os.close(hear)
        os.close(tell)
        raise
    os.close(tell)
    with os.fdopen(hear, "rb") as file:
        pid = int(file.read())
    os.waitpid(between, 0)
    if pid < 0:
        raise OSError(-pid, os.strerror(-pid))
    return pid


def _fork_and_end(tell: int) -> None:
    """Fork, tell its number, and end; return in the fork alone."""
    try:
        pid = os.fork()
    except OSError as error:
        pid = -(error.errno or 1)
    if pid:
        os.write(tell, str(pid).encode())
        os._exit(0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
