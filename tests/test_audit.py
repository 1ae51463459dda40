"""The audit of dependencies, by the real pip-audit against an advisory service of our own."""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from loadtest.redis_server import free_port
from tests.audit import audit

ADVISORY = {
    "id": "PYSEC-2026-1",
    "summary": "Lets everybody in.",
    "modified": "2026-01-01T00:00:00Z",
    "affected": [
        {
            "package": {"name": "shaky", "ecosystem": "PyPI"},
            "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "1.1"}]}],
            "versions": ["1.0"],
        }
    ],
}


@contextmanager
def advisories(status: int = 200) -> Iterator[str]:
    """Serve like api.osv.dev, which knows of one package, and yield the address."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            body = {"vulns": [ADVISORY]} if asked["package"]["name"] == "shaky" else {}
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1/query"
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def lock(tmp_path):
    path = tmp_path / "constraints.txt"
    path.write_text("# a comment\nfirm==2.0\nshaky==1.0\n")
    return path


def test_a_known_vulnerability_is_named_and_fails(lock):
    with advisories() as url:
        code, text = audit(lock, url=url)
    assert code == 1
    assert text.splitlines() == [
        "dependency audit: known vulnerabilities",
        "shaky 1.0: PYSEC-2026-1, mended in 1.1: Lets everybody in.",
    ]


def test_where_none_is_known_it_says_how_many_were_checked(lock):
    lock.write_text("firm==2.0\nsolid==1.0\n")
    with advisories() as url:
        assert audit(lock, url=url) == (0, "dependency audit: none known in 2 locked packages")


def test_all_locked_versions_can_be_audited():
    with advisories() as url:
        code, text = audit(url=url)
    assert code == 0
    assert re.fullmatch(r"dependency audit: none known in \d{3} locked packages", text)


@pytest.mark.parametrize("status", [404, 503])
def test_a_service_that_does_not_answer_is_told_and_does_not_fail(lock, status):
    with advisories(status) as url:
        code, text = audit(lock, url=url)
    assert code == 0
    assert text.startswith("dependency audit: SKIPPED, nothing was checked: ")


def test_a_service_that_is_away_is_told_and_does_not_fail(lock):
    code, text = audit(lock, url=f"http://127.0.0.1:{free_port()}/")
    assert code == 0
    assert text.startswith("dependency audit: SKIPPED, nothing was checked: requests.exceptions")


def test_a_lock_that_pins_nothing_is_an_error(lock):
    lock.write_text("firm>=2.0\n")
    with advisories() as url, pytest.raises(RuntimeError, match="firm is not pinned"):
        audit(lock, url=url)
