"""`python -m loadtest chaos` and `soak`, as they are typed."""

import json

import pytest

from loadtest.__main__ import main


@pytest.fixture(autouse=True)
def _short_floods(monkeypatch):
    """The capacity is measured roughly, but soon."""
    monkeypatch.setattr("loadtest.chaos.bench._LOWEST_FLOOD", 2000.0)
    monkeypatch.setattr("loadtest.chaos.bench._HIGHEST_FLOOD", 2000.0)
    monkeypatch.setattr("loadtest.chaos.bench._FLOOD_S", 0.5)


@pytest.fixture
def _prepared(monkeypatch, bundles, expected):
    """The answers and the capacity are known, as if they had been computed and measured."""
    known = dict(zip(bundles, expected, strict=True))
    monkeypatch.setattr("loadtest.chaos.preparation.expect", lambda bundle, *_: known[bundle])
    monkeypatch.setattr("loadtest.chaos.preparation._capacity", lambda _bench: 400.0)


@pytest.fixture
def flags(bundles, tmp_path):
    return [
        *(flag for bundle in bundles for flag in ("--bundle", str(bundle))),
        *("--pool", "30", "--candidates", "5", "--deadline-ms", "2000", "--rate", "50"),
        *("--page", str(tmp_path / "reliability.md")),
    ]


def test_chosen_rows_become_a_page_and_its_figures(flags, tmp_path, capsys):
    folder = tmp_path / "runs"
    asked = ["chaos", "--rows", "redis-paused", "--seconds", "4", "--folder", str(folder)]
    assert main([*asked, *flags]) == 0
    printed = capsys.readouterr().out
    assert "load 50" in printed
    assert "| Redis paused by SIGSTOP (refuse) | 50 |" in printed
    page = tmp_path / "reliability.md"
    assert "`python -m loadtest chaos --seconds 4`" in page.read_text()
    found = json.loads(page.with_suffix(".json").read_text())["figures"]
    assert (found["faults"], found["wrong_scores"], found["lost_events"]) == (1, 0, 0)
    settings = json.loads((folder / "redis-paused" / "settings.json").read_text())
    assert settings["rate"] == 50.0
    assert settings["capacity"] > 0


@pytest.mark.usefixtures("_prepared")
def test_a_row_that_cannot_be_had_is_named_and_fails_the_command(
    flags, bundles, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("loadtest.chaos.preparation._CHECKPOINT", "none.pt")
    folder = tmp_path / "runs"
    asked = ["chaos", "--rows", "disk-full", "--seconds", "4", "--folder", str(folder)]
    assert main([*asked, *flags]) == 1
    reason = f"there is no model.pt beside {bundles[0]} to be exported"
    assert (
        f"- **Not run**: disk full while a bundle is written: {reason}" in capsys.readouterr().out
    )
    assert reason in (tmp_path / "reliability.md").read_text()


@pytest.mark.usefixtures("_prepared")
def test_a_soak_writes_its_section(flags, tmp_path, capsys):
    assert main(["soak", "--minutes", "0.1", *flags]) == 0
    assert "soak_rss_growth" in capsys.readouterr().out
    page = tmp_path / "reliability.md"
    assert "## Soak" in page.read_text()
    found = json.loads(page.with_suffix(".json").read_text())["figures"]
    assert {"soak_rss_growth", "soak_descriptors_growth", "soak_p99_growth"} < set(found)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--seconds", "0"], "--seconds must be positive and finite, got 0"),
        (["--rate", "nan"], "--rate must be positive and finite, got nan"),
        (["--pool", "0"], "--pool must be at least 1, got 0"),
        (["--bundle", "third"], "--bundle is given twice or not at all"),
    ],
)
def test_impossible_flags_are_refused_by_name(flags, wrong, message, capsys):
    assert main(["chaos", *flags, *wrong]) == 2
    assert message in capsys.readouterr().err


def test_two_bundles_of_one_version_are_refused(flags, bundles, capsys):
    first = str(bundles[0])
    same = [first if flag == str(bundles[1]) else flag for flag in flags]
    assert main(["chaos", *same]) == 2
    assert f"{first} and {first} are both version tiny-1" in capsys.readouterr().err
