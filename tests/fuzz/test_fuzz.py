"""The fuzzer's targets: their seeds pass, and a short run of each finds nothing."""

from importlib import import_module
from importlib.util import find_spec

import pytest

from tests.fuzz.fuzzing import TARGETS, fuzz

_EXECUTIONS = 3000


@pytest.mark.parametrize("target", TARGETS)
def test_its_seeds_reach_all_that_it_asks(target):
    module = import_module(f"tests.fuzz.{target}")
    seeds = module.seeds()
    for content in seeds:
        module.one_input(content)
    assert {content[0] for content in seeds} == set(range(len(module.ASKED)))


@pytest.mark.skipif(find_spec("atheris") is None, reason="needs atheris: pip install mneme[fuzz]")
@pytest.mark.parametrize("target", TARGETS)
def test_a_short_run_finds_nothing(target, tmp_path):
    """`python -m tests.fuzz` runs longer; docs/results/fuzzing.md says for how long it did."""
    found = fuzz(target, tmp_path, executions=_EXECUTIONS, seed=1)
    assert found.crashes == [], found.output
    assert found.executions >= _EXECUTIONS
