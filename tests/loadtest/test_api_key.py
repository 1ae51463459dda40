"""The API key of a load: sent with every request, and written nowhere."""

from loadtest.api_key import api_key_headers
from loadtest.objective import PASS
from tests.loadtest.recording_server import recording_server
from tests.loadtest.test_rate import EASY, PATIENT, rate

KEY = "mneme_of-a-load"


def test_without_one_there_is_no_header(monkeypatch):
    monkeypatch.delenv("LOADTEST_API_KEY", raising=False)
    assert api_key_headers() == {}
    monkeypatch.setenv("LOADTEST_API_KEY", "")
    assert api_key_headers() == {}


def test_every_request_carries_it_and_the_run_does_not_tell_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("LOADTEST_API_KEY", KEY)
    with recording_server() as server:
        code = rate(
            *("--url", server.url, "--rate", "50", "--duration-s", "0.4"),
            *("--folder", str(tmp_path / "run"), *PATIENT, *EASY),
        )
    assert code == PASS
    assert {one.headers["authorization"] for one in server.received} == {f"Bearer {KEY}"}
    printed = capsys.readouterr()
    assert KEY not in printed.out + printed.err
    files = list((tmp_path / "run").iterdir())
    assert files
    assert not [path.name for path in files if KEY.encode() in path.read_bytes()]
