"""One serving process: `python -m service.worker CONTROL LISTENER...`, of the supervisor's.

The arguments are descriptors that it inherits: its end of the control channel, and the sockets to
listen on. What it is to serve stands on stdin. While others serve, what takes processor time before
this one does, most of it the import of libraries, gives way to them: so little is imported here.
"""

import json
import signal
import socket
import sys
from collections.abc import Sequence
from importlib import import_module

from service.priority import in_background


def main(arguments: Sequence[str]) -> int:
    """Run one worker; return its exit status."""
    # A terminal and some supervisors of services signal all processes of a group.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    control, *listeners = (socket.socket(fileno=int(one)) for one in arguments)
    start = json.load(sys.stdin)
    if start["background"]:
        in_background(lambda: import_module("service.serving"))
    from service.serving import serve

    return serve(control, listeners, start)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
