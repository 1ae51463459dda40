"""Who may ask what: roles of routes, keys of callers, what each port answers."""

import math
import time
from collections.abc import Mapping
from functools import lru_cache
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from service.api_keys import ApiKey, ApiKeys, Role, digest_of, find
from service.errors import (
    ForbiddenError,
    ForeignPageError,
    MalformedRequestError,
    NotHereError,
    RateLimitedError,
    ServiceError,
    UnauthenticatedError,
)
from service.metrics import Metrics
from service.problems import problem_response, responses
from service.settings import Settings

# Where the name of the caller's key stands in the ASGI scope.
KEY = "mneme.key"

_PAGE, _HISTORY, _ADMIN, _OTHER = "/page/", "/users/{user_id}/history", "/admin/", "other"
# None: whoever asks. Whoever sees what a user did needs `read`, and an explanation shows it.
ROLES: Mapping[str, Role | None] = {
    "/": None,
    _PAGE: None,
    "/docs": None,
    "/openapi.json": None,
    "/healthz": None,
    "/readyz": None,
    "/score": "score",
    "/recommend": "score",
    "/items/sample": "score",
    "/models": "score",
    "/events": "events",
    "/explain": "read",
    "/users/sample": "read",
    _HISTORY: "read",
    "/metrics": "metrics",
    "/experiments": "admin",
    _ADMIN: "admin",
    _OTHER: "admin",  # what nobody has thought of
}
_EVERYWHERE = frozenset({"/healthz", "/readyz"})
_OF_ADMIN_PORT = frozenset({"metrics", "admin"})
_SCHEME = b"bearer "
_READS = frozenset({"GET", "HEAD", "OPTIONS"})
_OWN_PAGE = frozenset({b"same-origin", b"none"})


def route_of(path: str) -> str:
    """Return the route of a path, as `ROLES` names it, or `other`: paths come from outside."""
    if path in ROLES:
        return path
    if path.startswith("/users/") and path.endswith("/history"):
        return _HISTORY
    return next((prefix for prefix in (_PAGE, _ADMIN) if path.startswith(prefix)), _OTHER)


class Access:
    """Lets a request pass, or raises the ServiceError that says why not.

    `keys`: None lets everybody pass, but for pages of other origins in somebody's browser.
    """

    def __init__(self, settings: Settings, metrics: Metrics, keys: ApiKeys | None) -> None:
        self._settings = settings
        self._metrics = metrics
        self._callers: list[tuple[bytes, _Caller]] | None = None
        self._unknown = metrics.key_requests.labels("", "unauthenticated")
        if keys is not None:
            self.apply(keys)

    def apply(self, keys: ApiKeys) -> None:
        """Let these keys be known from now on, and no others; all of them, or none and an error."""
        kept = {caller.name: caller for _, caller in self._callers or ()}
        callers = []
        for name, key in keys.keys.items():
            caller = kept.get(name)
            if caller is None or caller.key != key:  # what a caller has left stays as it is
                caller = _Caller(name, key, self._metrics, n_workers=self._settings.workers)
            callers.append((bytes.fromhex(key.sha256), caller))
        self._callers = callers
        for name in kept.keys() - keys.keys.keys():
            self._metrics.api_key_expires.labels(name).set(0)

    def check(self, scope: Scope) -> None:
        """Raise what keeps a request from being answered."""
        path = scope["path"]
        if path.endswith("\n"):
            # The `$` at the end of a route's pattern passes it: what `route_of` takes for another
            # path would be answered by that route.
            raise MalformedRequestError("the path ends with a line break, which no route's does")
        role = ROLES[route_of(path)]
        if self._settings.admin_port is not None and path not in _EVERYWHERE:
            server = scope.get("server")
            is_asked = server is not None and server[1] == self._settings.admin_port
            if is_asked != (role in _OF_ADMIN_PORT):
                raise NotHereError("Not Found")
        if self._callers is None:
            self._refuse_foreign_pages(scope)
        elif role is not None:
            caller = self._identify(scope["headers"], self._callers)
            scope[KEY] = caller.name
            caller.take(role)

    def _identify(
        self, headers: list[tuple[bytes, bytes]], callers: list[tuple[bytes, "_Caller"]]
    ) -> "_Caller":
        for name, value in headers:
            if name == b"authorization":
                if value[: len(_SCHEME)].lower() != _SCHEME:
                    break
                caller = find(digest_of(value[len(_SCHEME) :].strip()), callers)
                if caller is not None:
                    return caller
                self._unknown.inc()
                raise UnauthenticatedError("this API key is not known")
        self._unknown.inc()
        raise UnauthenticatedError("send an API key as `Authorization: Bearer KEY`")

    def _refuse_foreign_pages(self, scope: Scope) -> None:
        """Refuse what a browser asks for another page than the service's own.

        Whoever can reach a service without keys may use it, but pages of the web reach it by the
        browsers of those people. Changes by the rule of Go's `http.CrossOriginProtection`; and on
        loopback a name of the web's as Host, which DNS rebinding needs in order to read answers.
        """
        host = origin = site = None
        for name, value in scope["headers"]:
            if name == b"host":
                host = value
            elif name == b"origin":
                origin = value
            elif name == b"sec-fetch-site":
                site = value
        if host is not None and not self._settings.anonymous and not _is_near(host):
            raise ForeignPageError(
                "without API keys this service answers as localhost or by an address, not as "
                f"{host.decode('latin-1')!r}; set api_keys, or anonymous if others guard it"
            )
        if scope["method"] in _READS or (site is None and origin is None):
            return
        is_own = _authority(origin) == host if site is None else site in _OWN_PAGE
        if not is_own:
            raise ForeignPageError("without API keys only the service's own page may ask for this")


class _Caller:
    """Who holds a key, and what is left to do by it."""

    def __init__(self, name: str, key: ApiKey, metrics: Metrics, *, n_workers: int) -> None:
        self.name = name
        self.key = key
        self._expires = math.inf if key.expires is None else key.expires.timestamp()
        self._bucket = None
        if key.requests_per_s is not None:
            rate = key.requests_per_s / n_workers
            burst = (key.requests_per_s if key.burst is None else key.burst) / n_workers
            self._bucket = TokenBucket(rate, burst=max(1.0, burst))
        is_forever = key.expires is None
        metrics.api_key_expires.labels(name).set(0 if is_forever else self._expires)
        outcomes = ("allowed", "expired", "forbidden", "rate-limited")
        self._count = {one: metrics.key_requests.labels(name, one) for one in outcomes}

    def take(self, role: Role) -> None:
        """Use the key once for a route of this role, or raise what keeps it from that."""
        if time.time() >= self._expires:
            self._count["expired"].inc()
            raise UnauthenticatedError(f"the API key {self.name!r} has expired")
        if role not in self.key.roles:
            self._count["forbidden"].inc()
            roles = ", ".join(sorted(self.key.roles))
            raise ForbiddenError(f"this asks for the role {role}; {self.name!r} has {roles}")
        if self._bucket is not None and (wait_s := self._bucket.take(time.monotonic())):
            self._count["rate-limited"].inc()
            raise RateLimitedError(
                f"{self.name!r} may send {self.key.requests_per_s:g} requests a second",
                retry_after_s=math.ceil(wait_s),
            )
        self._count["allowed"].inc()


class TokenBucket:
    """`rate` tokens flow in every second; it holds `burst` at most, and so many at first."""

    def __init__(self, rate: float, *, burst: float) -> None:
        self._rate = rate
        self._burst = self._left = burst
        self._looked: float | None = None

    def take(self, now: float) -> float:
        """Take a token and return 0, or return the seconds until there will be one."""
        if self._looked is not None:
            self._left = min(self._burst, self._left + (now - self._looked) * self._rate)
        self._looked = now
        if self._left < 1:
            return (1 - self._left) / self._rate
        self._left -= 1
        return 0.0


class Guard:
    """ASGI middleware: passes on what `Access` lets pass, and answers the rest."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or answer."""
        if scope["type"] == "http":
            try:
                scope["app"].state.services.access.check(scope)
            except ServiceError as error:
                await problem_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def describe(openapi: dict[str, Any]) -> dict[str, Any]:
    """Add to an OpenAPI document which routes ask for a key, and what they answer without."""
    schemes = openapi.setdefault("components", {}).setdefault("securitySchemes", {})
    schemes["key"] = {
        "type": "http",
        "scheme": "bearer",
        "description": "An API key; each route names the role that it asks for.",
    }
    refusals = responses(UnauthenticatedError, ForbiddenError, RateLimitedError)
    for path, operations in openapi["paths"].items():
        role = ROLES[route_of(path)]
        if role is None:
            continue
        for operation in operations.values():
            operation["security"] = [{"key": [role]}]
            for status, refusal in refusals.items():
                known = operation.setdefault("responses", {}).setdefault(str(status), {**refusal})
                if known["description"] != refusal["description"]:
                    known["description"] += f"; {refusal['description']}"
    return openapi


@lru_cache(maxsize=64)
def _is_near(host: bytes) -> bool:
    """Return whether a Host header is no name that anybody could have made up in DNS."""
    try:
        name = urlsplit(f"//{host.decode('latin-1')}").hostname or ""
    except ValueError:
        return False
    if "." not in name or name.endswith(".localhost"):
        return True
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def _authority(origin: bytes | None) -> bytes:
    return (origin or b"").partition(b"://")[2]
