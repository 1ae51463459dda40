"""Every error as `application/problem+json` (RFC 9457), with a stable `type`."""

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.responses import Response

from service.errors import ClientLeft, InvalidRequestError, ServiceError
from service.schemas import Problem

MEDIA_TYPE = "application/problem+json"
_TYPE_PREFIX = "urn:mneme:problem:"
_MAX_ERRORS = 10
_CLIENT_LEFT = 499  # nginx' number: nobody reads it but the metrics


def install(app: FastAPI) -> None:
    """Let `app` answer all errors as problems."""
    app.add_exception_handler(ServiceError, _service_error)
    app.add_exception_handler(ClientLeft, _client_left)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)


def problem_response(
    error: ServiceError, errors: Sequence[dict[str, str]] | None = None
) -> JSONResponse:
    """Return the answer for an error of the service."""
    headers = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(error.retry_after_s)
    if error.challenge is not None:
        headers["WWW-Authenticate"] = error.challenge
    return _response(error.status, error.problem, error.title, error.detail, headers, errors)


def client_left_response() -> Response:
    """Return the answer for a client that is not there any more."""
    return Response(status_code=_CLIENT_LEFT)


def responses(*errors: type[ServiceError]) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI entries of the errors that a route may answer with."""
    described: dict[int | str, dict[str, Any]] = {}
    for error in errors:
        entry = described.setdefault(
            int(error.status), {"content": {MEDIA_TYPE: {"schema": Problem.model_json_schema()}}}
        )
        summary = f"`{_TYPE_PREFIX}{error.problem}`: {error.title}"
        entry["description"] = "; ".join(filter(None, [entry.get("description"), summary]))
    return described


def unreadable(error: BaseException) -> RequestValidationError:
    """Return the error for a body that is JSON, but none that Python reads."""
    return RequestValidationError(
        [{"type": "unreadable", "loc": (), "msg": f"not readable as JSON: {error}"}]
    )


def _response(
    status: int,
    problem: str,
    title: str,
    detail: str,
    headers: dict[str, str],
    errors: Sequence[dict[str, str]] | None = None,
) -> JSONResponse:
    content: dict[str, Any] = {
        "type": _TYPE_PREFIX + problem,
        "title": title,
        "status": int(status),
        "detail": detail,
    }
    if errors:
        content["errors"] = list(errors)
    return JSONResponse(content, status, headers, MEDIA_TYPE)


async def _service_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ServiceError)
    return problem_response(error)


async def _client_left(_: Request, error: Exception) -> Response:
    assert isinstance(error, ClientLeft)
    return client_left_response()


def validation_response(error: RequestValidationError) -> JSONResponse:
    """Return the answer that names the first fields that are wrong."""
    found = error.errors()
    errors = [_described(e) for e in found[:_MAX_ERRORS]]
    first = errors[0]
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    detail = f"{first['field']}: {first['reason']}{more}"
    return problem_response(InvalidRequestError(detail), errors)


async def _validation_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return validation_response(error)


def _described(error: Mapping[str, Any]) -> dict[str, str]:
    if error["type"] == "json_invalid":
        reason = f"not valid JSON at character {error['loc'][-1]}: {error['ctx']['error']}"
        return {"field": "body", "reason": reason}
    return {"field": _field(error["loc"]), "reason": error["msg"].removeprefix("Value error, ")}


def _field(location: Sequence[int | str]) -> str:
    """Return the path of a field: `candidates.3`, or `body` for the whole."""
    if len(location) > 1 and location[0] == "header":
        location = location[1:]
    named = [str(part) for part in location if part not in ("body", "one", "many")]
    return ".".join(named) or "body"


async def _http_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, RecursionError | ValueError):
        # FastAPI's word for a body that json.loads gives up on, other than by JSONDecodeError.
        return validation_response(unreadable(error.__cause__))
    title = HTTPStatus(error.status_code).phrase
    return _response(
        error.status_code,
        title.lower().replace(" ", "-"),
        title,
        str(error.detail),
        dict(error.headers or {}),
    )
