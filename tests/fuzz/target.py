"""`python -m tests.fuzz.target NAME ...`: one target under libFuzzer, whose options follow.

A process of its own: libFuzzer ends it, and what it instruments must not have been loaded before.
"""

import sys
from importlib import import_module

import atheris

NAMES = ("codec", "bundles", "requests")


def main() -> None:
    """Never returns."""
    name, *options = sys.argv[1:]
    if name not in NAMES:
        sys.exit(f"error: there is no target {name!r}, there are {', '.join(NAMES)}")
    with atheris.instrument_imports(include=["contract", "service"]):
        target = import_module(f"tests.fuzz.{name}")
    atheris.Setup([name, *options], target.one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
