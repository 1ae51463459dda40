"""`python -m exporter`."""

from exporter.__main__ import main


def test_it_prints_the_parity_table(checkpoint, tmp_path, capsys):
    assert main([str(checkpoint()), str(tmp_path / "bundle")]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[1].split() == ["B", "L", "C", "difference"]
    assert "tiny-" in printed


def test_an_error_is_one_line(tmp_path, capsys):
    assert main([str(tmp_path / "none.pt"), str(tmp_path / "bundle")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'none.pt'}: no such file\n"
