"""Journals keep what processes wrote, even of one that was killed."""

import subprocess
import sys

from loadtest.ab.journal import Journal, count_lines, read_journals, remove_journals, run_began_s

ONE, OTHER = {"user_id": "1", "at_s": 2.0}, {"user_id": "2", "at_s": 1.0}


def test_lines_can_be_read_as_soon_as_they_are_written(tmp_path):
    journal = Journal(tmp_path)
    for line in (ONE, {"unposted_clicks": 2}, OTHER, {"error": "away"}, {"unposted_clicks": 1}):
        journal.write(line)
    found = read_journals(tmp_path)
    assert found.visits == [OTHER, ONE]  # in order of time
    assert (found.unposted_clicks, found.errors) == (3, ["away"])
    assert count_lines(tmp_path) == 5


def test_all_processes_are_read(tmp_path):
    script = (
        "from pathlib import Path; from loadtest.ab.journal import Journal; "
        f"Journal(Path({str(tmp_path)!r})).write({OTHER!r})"
    )
    Journal(tmp_path).write(ONE)
    subprocess.run([sys.executable, "-c", script], check=True)
    assert read_journals(tmp_path).visits == [OTHER, ONE]


def test_a_part_of_a_line_is_left_out(tmp_path):
    (tmp_path / "journal-1.jsonl").write_text('{"user_id": "1", "at_s": 2.0}\n{"user_id": "2", "a')
    (tmp_path / "journal-2.jsonl").write_text('{"user')
    assert read_journals(tmp_path).visits == [ONE]


def test_an_empty_folder_has_no_visits(tmp_path):
    found = read_journals(tmp_path)
    assert (found.visits, found.unposted_clicks, found.errors) == ([], 0, [])


def test_the_run_began_when_the_first_process_asked(tmp_path):
    script = (
        "from pathlib import Path; from loadtest.ab.journal import run_began_s; "
        f"print(repr(run_began_s(Path({str(tmp_path)!r}))))"
    )
    first = run_began_s(tmp_path)
    other = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    assert float(other.stdout) == run_began_s(tmp_path) == first


def test_removing_leaves_the_other_files(tmp_path):
    (tmp_path / "run.json").touch()
    Journal(tmp_path).write(ONE)
    run_began_s(tmp_path)
    remove_journals(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
