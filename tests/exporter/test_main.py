"""`python -m exporter`."""

import re

from exporter.__main__ import main


def test_it_prints_the_parity_table(checkpoint, tmp_path, capsys):
    assert main([str(checkpoint("popularity")), str(tmp_path / "bundle")]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[1].split() == ["B", "L", "C", "difference"]
    assert "tiny-" in printed


def test_an_error_is_one_line(tmp_path, capsys):
    assert main([str(tmp_path / "none.pt"), str(tmp_path / "bundle")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'none.pt'}: no such file\n"


def test_it_prints_what_a_precision_costs(trained_checkpoint, world_log, tmp_path, capsys):
    arguments = [str(trained_checkpoint), str(tmp_path / "bundle")]
    assert main([*arguments, "--precision", "tf32", "--log", str(world_log)]) == 0
    *_, aucs, last = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"AUC on the test part: fp32 0\.\d{6}, tf32 0\.\d{6}", aucs)
    assert last.endswith("tf32 within 1.0e-03")
