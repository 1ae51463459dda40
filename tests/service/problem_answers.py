"""What every error answer must look like."""

from typing import Any

import httpx


def assert_problem(answer: httpx.Response, status: int, kind: str) -> dict[str, Any]:
    """Expect a problem with the stable type, and return it."""
    assert answer.status_code == status, answer.text
    assert answer.headers["Content-Type"] == "application/problem+json"
    problem: dict[str, Any] = answer.json()
    assert problem["type"] == f"urn:mneme:problem:{kind}"
    assert problem["status"] == status
    assert problem["title"]
    assert problem["detail"]
    return problem


def assert_invalid(answer: httpx.Response, field: str, reason: str) -> None:
    """Expect 422 that names the field and the reason, for people and for programs."""
    problem = assert_problem(answer, 422, "invalid-request")
    first = problem["errors"][0]
    assert field in first["field"]
    assert first["reason"]
    assert reason in first["reason"]
    assert problem["detail"].startswith(f"{first['field']}: {first['reason']}")


def assert_retry(answer: httpx.Response, status: int, kind: str) -> None:
    """Expect a problem that passes, with the time after which to try again."""
    assert_problem(answer, status, kind)
    assert int(answer.headers["Retry-After"]) >= 1
