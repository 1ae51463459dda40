"""Locust users that send the traffic of `python -m loadtest rate` to `/score`.

    python -m locust -f loadtest/locustfile.py --host http://127.0.0.1:8000            # its web UI
    python -m locust -f loadtest/locustfile.py --host http://127.0.0.1:8000 --headless \\
        --users 8 --spawn-rate 8 --run-time 60s --html runs/locust.html --zipf 0.8

This is for watching and for playing with a service. Locust is a closed loop: each user waits for
an answer before it sends again, so a service that stalls is asked less, and its latencies look
better than those of people who do not wait. Its percentiles are rounded, too. The judge is
`python -m loadtest rate`.

Locust changes sockets and threads of its whole process when it is imported: nothing imports this
file but `python -m locust`.
"""

import itertools
import sys
import time
from collections.abc import Iterator
from typing import Any

import gevent
from locust import FastHttpUser, events, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment

from loadtest.api_key import api_key_headers
from loadtest.traffic import add_flags, traffic_of

_JSON = {"Content-Type": "application/json"}
_KEY = api_key_headers()
_bodies: Iterator[str] = iter(())
_made_of: dict[str, Any] = {}


def add_settings(parser: LocustArgumentParser, **_: Any) -> None:
    """Add the settings of the traffic to Locust's command line and web UI."""
    add_flags(parser)
    parser.add_argument("--bodies", type=int, default=2000, help="different ones (default 2000)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--think-s", type=float, default=0.0, help="pause of a user after an answer (default 0)"
    )
    parser.add_argument("--deadline-ms", type=int, help="header X-Deadline-Ms")


def prepare(environment: Environment, **_: Any) -> None:
    """Make the first bodies, before the time of a run begins to count; end with exit code 2 and a
    clear line where the settings do not describe a traffic.
    """
    try:
        make_bodies(environment)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        # Locust only logs what else a listener raises, and goes on.
        sys.exit(2)
    # The loop's clock stands still while this process imports and makes bodies: without another
    # look at it a run would end that much too early.
    gevent.sleep(0)


def make_bodies(environment: Environment, **_: Any) -> None:
    """Make the bodies of a test; anew where the web UI has changed the settings."""
    global _bodies, _made_of
    options = environment.parsed_options
    assert options is not None
    if vars(options) == _made_of:
        return
    bodies = traffic_of(options).bodies(options.bodies, seed=options.seed, now=int(time.time()))
    _bodies = itertools.cycle([body.decode() for body in bodies])
    _made_of = dict(vars(options))


class Caller(FastHttpUser):
    """Asks for scores, one request after the other."""

    def wait_time(self) -> float:
        """Return the pause before the next request, in seconds."""
        assert self.environment.parsed_options is not None
        return float(self.environment.parsed_options.think_s)

    @task
    def score(self) -> None:
        """Ask once."""
        assert self.environment.parsed_options is not None
        deadline_ms = self.environment.parsed_options.deadline_ms
        deadline = {"X-Deadline-Ms": str(deadline_ms)} if deadline_ms else {}
        self.client.post("/score", data=next(_bodies), headers={**_JSON, **deadline, **_KEY})


# Locust's own listeners have no types.
events.init_command_line_parser.add_listener(add_settings)  # type: ignore[no-untyped-call]
events.init.add_listener(prepare)  # type: ignore[no-untyped-call]
events.test_start.add_listener(make_bodies)  # type: ignore[no-untyped-call]
