"""What stands at `/`, and what a browser may do with it."""

import re
from pathlib import Path

import pytest

from service import site
from tests.service.problem_answers import assert_problem

FOLDER = Path(site.__file__).parent / "page"
FILES = sorted(path.name for path in FOLDER.iterdir())


def test_the_page_is_answered(service):
    answer = service.client.get("/")
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert "<h1>Mneme</h1>" in answer.text


@pytest.mark.parametrize(
    "path", ["/", *(f"/page/{name}" for name in FILES), "/page/docs/swagger-ui-bundle.js"]
)
def test_nothing_may_come_from_or_go_to_another_host(service, path):
    headers = service.client.get(path).headers
    policy = dict(
        directive.split(" ", 1) for directive in headers["Content-Security-Policy"].split("; ")
    )
    assert policy["default-src"] == "'none'"
    assert set(policy.values()) == {"'none'", "'self'"}
    assert headers["X-Content-Type-Options"] == "nosniff"


def test_the_description_of_the_routes_runs_no_script_but_its_own(service):
    answer = service.client.get("/docs")
    policy = dict(
        directive.split(" ", 1)
        for directive in answer.headers["Content-Security-Policy"].split("; ")
    )
    script, digest = policy["script-src"].split(" ")
    assert script == "'self'"
    assert re.fullmatch(r"'sha256-[\w+/]{43}='", digest)
    assert policy["connect-src"] == "'self'"
    named = re.findall(r'(?:href|src)="([^"]*)"', answer.text)
    assert "/page/docs/swagger-ui-bundle.js" in named
    for path in named:
        assert service.client.get(path).status_code == 200, path


@pytest.mark.parametrize("name", FILES)
def test_no_file_names_another_host_or_carries_inline_code(name):
    text = (FOLDER / name).read_text()
    hosts = set(re.findall(r"https?://[^\s\"'<>)]+", text))
    assert hosts <= {"http://www.w3.org/2000/svg"}  # a name, that nobody fetches
    assert not re.search(r"\son\w+=|\sstyle=|innerHTML|javascript:", text)


def test_all_that_the_page_names_is_there(service):
    named = re.findall(r'(?:href|src)="(/[^"]*)"', service.client.get("/").text)
    assert "/page/page.js" in named
    for path in named:
        assert service.client.get(path).status_code == 200, path


def test_what_is_not_there_is_a_problem(service):
    assert_problem(service.client.get("/page/nothing.js"), 404, "not-found")
    assert_problem(service.client.get("/page/../site.py"), 404, "not-found")
    assert_problem(service.client.post("/nothing"), 404, "not-found")
