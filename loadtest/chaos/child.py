"""A process of the harness's own, which works until its stdin ends."""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from loadtest.chaos.errors import ChaosError


def give_way() -> None:
    """Let this process run where no other wants to."""
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


class Child:
    """`first_line`: what it said when it was ready."""

    def __init__(self, process: "subprocess.Popen[str]", first_line: str) -> None:
        self._process = process
        self.first_line = first_line

    def tell(self, line: str) -> None:
        """Write a line to its stdin."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()

    def end(self) -> str:
        """End it, and return what it said since it was ready."""
        said, _ = self._process.communicate()
        return said


@contextmanager
def child(module: str, arguments: Sequence[object]) -> Iterator[Child]:
    """Run `python -m module` until the block ends; raises ChaosError when it does not start."""
    with subprocess.Popen(
        [sys.executable, "-m", module, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # Ctrl-C in the terminal must reach the parent alone, which then ends its children.
        process_group=0,
    ) as process:
        try:
            assert process.stdout is not None
            if not (line := process.stdout.readline().strip()):
                raise ChaosError(f"{module} ended with status {process.wait()}")
            yield Child(process, line)
        finally:
            process.kill()
