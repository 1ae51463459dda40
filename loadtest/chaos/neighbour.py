"""A process that uses as much of the processor as a reload does, and gives way as much.

Run as a program, `python -m loadtest.chaos.neighbour SPIN_S EVERY_S` spins for so long, again and
again, with the scheduling class of a new generation of workers (`service/priority.py`), until its
stdin ends. It prints a line when it has begun.
"""

import select
import sys
import time

from loadtest.chaos.child import give_way


def _main(spin_s: float, every_s: float) -> None:
    give_way()
    sys.stdout.write("spinning\n")
    sys.stdout.flush()
    is_over = False
    while not is_over:
        began_s = time.process_time()
        while time.process_time() < began_s + spin_s:
            pass
        is_over = bool(select.select([sys.stdin], [], [], max(0.0, every_s - spin_s))[0])


if __name__ == "__main__":
    _main(*map(float, sys.argv[1:]))
